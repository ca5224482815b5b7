"""Dynamic neural graphs: the state of every node evolves over time, any edge may exist (Wortsman et al., 2019, section 2.3).

Contract: nodes are channels of image-shaped maps or plain numbers; inputs come first, outputs last. One right-hand side,
``norm(W conv(activation(state)))``, is stepped in discrete time or integrated in continuous time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnw.graphs._dynamic_kernels import is_relu, run_nodes
from dnw.graphs._ode import Solver, solver_named
from dnw.graphs._way import has_hooks, is_convolution, norm_kind, why_not

INSTANCE_NORM = partial(nn.InstanceNorm2d, affine=True)


class DynamicGraph(nn.Module, ABC):
    """What graphs in discrete and in continuous time share: nodes, edges and the right-hand side.

    The weight is one matrix ``[nodes, nodes]``, targets by sources. Every entry is a candidate edge: cycles and edges from a
    node to itself are allowed. On its own the graph is complete; :func:`dnw.wire` makes it sparse and learns its edges.

    Args:
        num_nodes: all nodes, inputs and outputs included.
        num_inputs: the first nodes, which start with what is fed in; all others start at 0.
        num_outputs: the last nodes, whose state is what comes out.
        maps: whether a node is an image-shaped map, which passes a 3x3 convolution of its own before it is sent along the
            edges, or a plain number, which gets a bias of its own after it.
        norm: makes the normalisation of what has reached the nodes from their number; None for none.
        activation: what a state passes first.
    """

    def __init__(
        self,
        num_nodes: int,
        num_inputs: int,
        num_outputs: int,
        *,
        maps: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        numbers = num_nodes, num_inputs, num_outputs
        if (
            any(isinstance(n, bool) or not isinstance(n, int) for n in numbers)
            or min(numbers) < 1
            or num_inputs + num_outputs > num_nodes
        ):
            raise ValueError(
                f"num_nodes={num_nodes}, num_inputs={num_inputs}, num_outputs={num_outputs}: a dynamic graph needs inputs and "
                "outputs, at least one of each, whole numbers, and no node can be both"
            )
        self.num_nodes, self.num_inputs, self.num_outputs, self.maps = num_nodes, num_inputs, num_outputs, maps
        self.weight = nn.Parameter(torch.empty(num_nodes, num_nodes))
        self.norm = nn.Identity() if norm is None else norm(num_nodes)
        self.conv = nn.Conv2d(num_nodes, num_nodes, 3, padding=1, groups=num_nodes, bias=False) if maps else nn.Identity()
        self.bias = None if maps else nn.Parameter(torch.zeros(num_nodes))
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the edges uniformly from +-1 / sqrt(number of sources)."""
        bound = 1 / math.sqrt(self.num_nodes)
        nn.init.uniform_(self.weight, -bound, bound)

    def edge_candidates(self) -> dict[str, Tensor]:
        return {"weight": torch.ones(self.weight.shape, dtype=torch.bool, device="cpu")}

    def node_matrix(self, weight: Tensor) -> Tensor:
        """A weight or mask as a matrix between the nodes: itself."""
        return weight

    def node_functions(self) -> list[tuple[nn.Module, range]]:
        """The convolution of all nodes, where nodes are maps."""
        return [(self.conv, range(self.num_nodes))] if self.maps else []

    def extra_repr(self) -> str:
        return f"nodes={self.num_nodes}, inputs={self.num_inputs}, outputs={self.num_outputs}, maps={self.maps}"

    def start(self, x: Tensor) -> Tensor:
        """The state in which the inputs hold ``x`` and all other nodes 0.

        Args:
            x: ``[batch, inputs, height, width]`` for maps, ``[batch, inputs]`` for numbers.

        Returns:
            ``[batch, nodes, ...]``.
        """
        self._check(x)
        rest = x.new_zeros(x.shape[0], self.num_nodes - self.num_inputs, *x.shape[2:])
        return torch.cat([x, rest], dim=1)

    def feed(self, state: Tensor, x: Tensor) -> Tensor:
        """A state with ``x`` added to its inputs."""
        self._check(x)
        return torch.cat([state[:, : self.num_inputs] + x, state[:, self.num_inputs :]], dim=1)

    def read(self, state: Tensor) -> Tensor:
        """The outputs of a state: ``[batch, outputs, ...]``."""
        return state[:, -self.num_outputs :]

    def why_layers(self, x: Tensor) -> str:
        """Why the graph would run as layers of PyTorch; empty where it would run on kernels that skip absent edges.

        Args:
            x: what it would be given, or a state.
        """
        if self.maps and not is_convolution(self.conv):
            return "the nodes' convolution has been replaced"
        return why_not(x, self.weight, self.weight.numel(), [self.conv])

    def rate(self, state: Tensor) -> Tensor:
        """The right-hand side: what reaches every node from the present states, normalised. ``[batch, nodes, ...]``."""
        on_kernels = not self.why_layers(state)
        if on_kernels and isinstance(self.conv, nn.Conv2d) and is_relu(self.activation) and not has_hooks(self.activation):
            sent = run_nodes(self.conv.weight.flatten(1), state)
        else:
            sent = self.conv(self.activation(state))
        if on_kernels:
            reached = torch.ops.dnw.edges(sent, self.weight)
            return self.norm(reached if self.bias is None else reached + self.bias)
        if self.maps:
            return self.norm(F.conv2d(sent, self.weight[:, :, None, None]))
        return self.norm(F.linear(sent, self.weight, self.bias))

    @abstractmethod
    def advance(self, state: Tensor) -> Tensor:
        """The state after the graph's time has passed."""

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.advance(self.start(x)))

    def _check(self, x: Tensor) -> None:
        if x.ndim != (4 if self.maps else 2) or x.shape[1] != self.num_inputs:
            wanted = f"maps [batch, {self.num_inputs}, height, width]" if self.maps else f"numbers [batch, {self.num_inputs}]"
            raise ValueError(f"expected {wanted}, got a tensor of shape {tuple(x.shape)}")


class DiscreteTimeGraph(DynamicGraph):
    """A neural graph in discrete time: the same edges and node functions at every step (section 2.3, equation 7).

    Args:
        num_nodes, num_inputs, num_outputs, maps, norm, activation: see :class:`DynamicGraph`.
        steps: how often the states are replaced by what reaches the nodes.

    Shape:
        ``[batch, inputs, height, width]`` to ``[batch, outputs, height, width]``, or without height and width.
    """

    def __init__(
        self,
        num_nodes: int,
        num_inputs: int,
        num_outputs: int,
        *,
        steps: int = 5,
        maps: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__(num_nodes, num_inputs, num_outputs, maps=maps, norm=norm, activation=activation)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r}: a whole number from 1 on")
        self.steps = steps

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, steps={self.steps}"

    def advance(self, state: Tensor) -> Tensor:
        """The state after ``steps`` steps."""
        if self._is_fused(state):
            return self.norm(self._reached(state))
        for _ in range(self.steps):
            state = self.rate(state)
        return state

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if not self._is_fused(x):
            return super().forward(x)
        reached = self._reached(x)  # all other nodes are 0, and send nothing
        if not isinstance(self.norm, nn.InstanceNorm2d):
            return self.read(self.norm(reached))
        scale, shift = (None if p is None else p[-self.num_outputs :] for p in (self.norm.weight, self.norm.bias))
        return F.instance_norm(self.read(reached), None, None, scale, shift, True, eps=self.norm.eps)

    def _is_fused(self, x: Tensor) -> bool:
        """Whether kernels do the norm of a step with the node functions of the next one."""
        if not self.maps or norm_kind([self.norm], x.shape[2] * x.shape[3], x.shape[0]) is None or not is_relu(self.activation):
            return False
        return not (has_hooks(self.norm) or has_hooks(self.activation) or self.why_layers(x))

    def _reached(self, state: Tensor) -> Tensor:
        """What reaches the nodes in the last step, before the norm, from the state of the first nodes."""
        conv: Any = self.conv
        filters = conv.weight.flatten(1)
        sent = run_nodes(filters[: state.shape[1]], state)
        for _ in range(self.steps - 1):
            sent = run_nodes(filters, torch.ops.dnw.edges(sent, self.weight), self.norm)
        return torch.ops.dnw.edges(sent, self.weight)


class ContinuousTimeGraph(DynamicGraph):
    """A neural graph in continuous time: an ordinary differential equation between the nodes (section 2.3, equation 8).

    Args:
        num_nodes, num_inputs, num_outputs, maps, norm, activation: see :class:`DynamicGraph`.
        duration: how long the states evolve; the paper's 1.
        leak: what the states lose per unit of time of themselves: the rate is ``norm(...) - leak * state``. The paper has 0.
        solver: "euler", "midpoint" or "rk4" with ``solver_steps`` equal steps, which need nothing but torch; or an adaptive
            one of torchdiffeq ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"), which needs ``dnw[ode]``.
        solver_steps: of the solvers with equal steps.
        rtol, atol: tolerances of the adaptive solvers; the paper's 1e-3.
        adjoint: whether gradients come from a second equation solved backwards, which keeps no intermediate states, instead
            of from backpropagation through the solver's steps. Needs ``dnw[ode]``.
        rectify_in_place: whether the activation is a ReLU that also overwrites the solver's own states, as in the authors'
            code, whose checkpoints need it. Off, as in the paper.

    Attributes:
        num_evaluations: of the right-hand side since the module was made, forward passes only; compiled ones do not count.
        num_solves: how many times the equation was solved forwards since then.
    """

    def __init__(
        self,
        num_nodes: int,
        num_inputs: int,
        num_outputs: int,
        *,
        duration: float = 1.0,
        leak: float = 0.0,
        solver: str = "dopri5",
        solver_steps: int = 8,
        rtol: float = 1e-3,
        atol: float = 1e-3,
        adjoint: bool = False,
        maps: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
        activation: Callable[[Tensor], Tensor] = F.relu,
        rectify_in_place: bool = False,
    ) -> None:
        super().__init__(num_nodes, num_inputs, num_outputs, maps=maps, norm=norm, activation=activation)
        if not (0 < duration < math.inf and 0 <= leak < math.inf):
            raise ValueError(
                f"duration={duration}, leak={leak}: the duration is above 0, the leak not below, and both are finite"
            )
        if rectify_in_place and adjoint:
            raise ValueError(
                "rectify_in_place changes the solver's states, so the adjoint equation has other ones; use one of them"
            )
        self.duration, self.leak, self.rectify_in_place = duration, leak, rectify_in_place
        self.solver: Solver = solver_named(solver, solver_steps, rtol, atol, adjoint)
        self.num_evaluations = self.num_solves = 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, duration={self.duration:g}, leak={self.leak:g}, solver={self.solver}"

    def why_layers(self, x: Tensor) -> str:
        if self.rectify_in_place:  # where a state is rectified at 0 is chaotic: rounding of another kind is a different network
            return "states are rectified in place, to follow the authors' checkpoints number by number"
        return super().why_layers(x)

    def rate(self, state: Tensor) -> Tensor:
        """The rate of change of every node's state: ``[batch, nodes, ...]``."""
        if self.rectify_in_place:
            state = F.relu_(state)
        rate = super().rate(state)
        return rate - self.leak * state if self.leak else rate

    def advance(self, state: Tensor) -> Tensor:
        """The state after ``duration``.

        Raises:
            FloatingPointError: an adaptive solver could not go on with a step that still makes a difference.
        """
        evaluations = 0

        def rate(time: Tensor | float, state: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return self.rate(state)

        final = self.solver.solve(rate, state, self.duration, tuple(self.parameters()))
        if not torch.compiler.is_compiling():  # which would compile anew whenever they have changed
            self.num_evaluations += evaluations
            self.num_solves += 1
        return final
