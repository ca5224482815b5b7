"""What the steps of a network do with channels: which vary with the image, which are wanted, which are constant.

Contract: in double precision, on the CPU. Each step is asked three times (_analysis.py): forwards for what varies and the
values of what does not, backwards for what is wanted, and forwards again for its instructions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnw.compile._program import (
    Affine,
    Constant,
    Convolution,
    Edges,
    Graph,
    InstanceNorm,
    Instruction,
    Linear,
    Mean,
    Rectify,
)
from dnw.graphs import DiscreteTimeGraph, StaticGraph

_SPARSE_BELOW = 0.5
"""Density below which a 1x1 convolution becomes sums along edges."""


@dataclass(frozen=True, eq=False)
class Channels:
    """Channels between two steps.

    Attributes:
        varies: boolean ``[channels]``: whether a channel depends on the image.
        value: ``[channels, h, w]`` or ``[channels]``, double: of those that do not; 0 elsewhere.
        pooled: whether numbers are maps of one place to PyTorch, until they are flattened.
    """

    varies: Tensor
    value: Tensor
    pooled: bool = False

    @classmethod
    def of(cls, varies: Tensor, value: Tensor, pooled: bool = False) -> Channels:
        mask = varies.view(-1, *[1] * (value.ndim - 1))
        return cls(varies, value.masked_fill(mask, 0.0), pooled)

    def require_maps(self, what: str) -> None:
        """Raises ``ValueError`` where these are numbers."""
        if self.value.ndim != 3:
            raise ValueError(f"{what} after the maps have become numbers is not compiled")


class Step(ABC):
    """One step of a network, on all channels."""

    source: Channels
    """What came in, noted by ``forward``."""

    @abstractmethod
    def forward(self, x: Channels) -> Channels: ...

    def backward(self, wanted: Tensor) -> Tensor:
        """Which of the channels that come in and vary are wanted, from those wanted of what goes out."""
        return wanted & self.source.varies

    @abstractmethod
    def emit(self, taken: Tensor, given: Tensor) -> Iterator[Instruction]:
        """Instructions from the kept channels that come in to those that go out, boolean masks."""


class Norm(Step):
    """Normalisation in eval mode, channel by channel."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.instance = isinstance(module, nn.InstanceNorm2d)
        assert isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d))
        size = module.num_features
        weight = torch.ones(size) if module.weight is None else module.weight
        bias = torch.zeros(size) if module.bias is None else module.bias
        self.scale, self.shift, self.eps = _double(weight), _double(bias), module.eps
        if module.running_mean is not None and module.running_var is not None:
            self.instance = False
            self.scale = self.scale / (_double(module.running_var) + module.eps).sqrt()
            self.shift = self.shift - _double(module.running_mean) * self.scale
        elif not self.instance:
            raise ValueError(f"{name}: a batch norm without running statistics depends on the other images; it is not compiled")

    def forward(self, x: Channels) -> Channels:
        self.source = x
        if len(self.scale) != len(x.varies):
            raise ValueError(f"a norm of {len(self.scale)} channels is given {len(x.varies)}")
        if self.instance:
            x.require_maps("an instance norm")
        if x.value.ndim == 1 and not x.pooled:
            raise ValueError("a norm of maps is given numbers")
        return Channels.of(x.varies & (self.scale != 0), self.normalised(x.value), x.pooled)

    def normalised(self, value: Tensor) -> Tensor:
        shape = (-1, *[1] * (value.ndim - 1))
        if self.instance:
            spread = value.var(dim=(1, 2), keepdim=True, unbiased=False)
            value = (value - value.mean(dim=(1, 2), keepdim=True)) / (spread + self.eps).sqrt()
        return value * self.scale.view(shape) + self.shift.view(shape)

    def emit(self, taken: Tensor, given: Tensor) -> Iterator[Instruction]:
        scale, shift = self.scale[given].float(), self.shift[given].float()
        yield InstanceNorm(scale, shift, self.eps) if self.instance else Affine(scale, shift)


class Relu(Step):
    def forward(self, x: Channels) -> Channels:
        self.source = x
        return Channels(x.varies, x.value.relu(), x.pooled)

    def emit(self, taken: Tensor, given: Tensor) -> Iterator[Instruction]:
        yield Rectify()


class Depthwise(Step):
    """A convolution of each channel by itself."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.weight, self.stride, self.padding = _double(module.weight), pair(module.stride), pair(module.padding)
        self.bias = None if module.bias is None else _double(module.bias)

    def forward(self, x: Channels) -> Channels:
        self.source = x
        x.require_maps("a convolution")
        value = F.conv2d(
            x.value[None], self.weight, self.bias, stride=self.stride, padding=self.padding, groups=len(self.weight)
        )[0]
        self.sides = value.shape[1:]
        return Channels.of(x.varies & self.weight.flatten(1).any(1), value)

    def emit(self, taken: Tensor, given: Tensor) -> Iterator[Instruction]:
        constant = None
        if self.bias is not None:
            constant = Constant.of(self.bias[given].view(-1, 1, 1).expand(-1, *self.sides))
        yield Convolution(self.weight[given].float(), constant, self.stride, self.padding, int(given.count_nonzero()))


class Mix(Step):
    """A convolution or a matrix from all channels to all channels; constant channels become part of what is added."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        on_numbers: bool = False,
    ):
        self.weight = _double(weight)
        self.bias = None if bias is None else _double(bias)
        self.stride, self.padding, self.on_numbers = stride, padding, on_numbers
        self.reads = self.weight != 0 if weight.ndim == 2 else self.weight.flatten(2).any(2)

    def forward(self, x: Channels) -> Channels:
        self.source = x
        if self.on_numbers:
            if x.value.ndim != 1 or x.pooled:
                raise ValueError("a linear layer on maps is not compiled; flatten pooled maps with nn.Flatten()")
            self.constant = F.linear(x.value, self.weight, self.bias)
        else:
            x.require_maps("a convolution")
            weight = self.weight[:, :, None, None] if self.weight.ndim == 2 else self.weight
            self.constant = F.conv2d(x.value[None], weight, self.bias, stride=self.stride, padding=self.padding)[0]
        return Channels.of(self.reads[:, x.varies].any(1), self.constant)

    def backward(self, wanted: Tensor) -> Tensor:
        return self.reads[wanted].any(0) & self.source.varies

    def emit(self, taken: Tensor, given: Tensor) -> Iterator[Instruction]:
        weight, constant = self.weight[given][:, taken], self.constant[given]
        if constant.ndim == 1:
            yield Linear(weight.float(), constant.float())
            return
        pointwise = weight.ndim == 2 or (weight.shape[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0))
        matrix = weight.flatten(1) if pointwise else weight
        if pointwise and int(matrix.count_nonzero()) < _SPARSE_BELOW * matrix.numel():
            yield Edges.of(matrix, Constant.of(constant))
        else:
            weight = weight[:, :, None, None] if weight.ndim == 2 else weight
            yield Convolution(weight.float(), Constant.of(constant), self.stride, self.padding, 1)


class Average(Step):
    """The mean over a square window, or over the whole map."""

    def __init__(self, start: int, stop: int | None, pooled: bool = False) -> None:
        self.start, self.stop, self.pooled = start, stop, pooled

    def forward(self, x: Channels) -> Channels:
        self.source = x
        x.require_maps("a mean over maps")
        self.end = max(x.value.shape[1:]) if self.stop is None else self.stop
        if self.start >= min(self.end, *x.value.shape[1:]):
            raise ValueError(f"a window from {self.start} to {self.end} has no place in maps of {tuple(x.value.shape[1:])}")
        return Channels(x.varies, x.value[:, self.start : self.end, self.start : self.end].mean(dim=(1, 2)), self.pooled)

    def emit(self, taken: Tensor, given: Tensor) -> Iterator[Instruction]:
        yield Mean(self.start, self.end)


class Flatten(Step):
    """From each channel's one number to a vector of them."""

    def forward(self, x: Channels) -> Channels:
        self.source = x
        self.from_maps = x.value.ndim == 3
        if self.from_maps and x.value.shape[1:] != (1, 1):
            raise ValueError(f"flattening maps of {tuple(x.value.shape[1:])} places is not compiled; pool them first")
        return Channels(x.varies, x.value.flatten())

    def emit(self, taken: Tensor, given: Tensor) -> Iterator[Instruction]:
        if self.from_maps:
            yield Mean(0, 1)


class Begin(Step):
    """The first states of a graph in discrete time: the inputs, and 0 for all other nodes."""

    def __init__(self, graph: DiscreteTimeGraph) -> None:
        self.more = graph.num_nodes - graph.num_inputs

    def forward(self, x: Channels) -> Channels:
        self.source = x
        x.require_maps("a graph")
        varies = torch.cat([x.varies, x.varies.new_zeros(self.more)])
        return Channels(varies, torch.cat([x.value, x.value.new_zeros(self.more, *x.value.shape[1:])]))

    def backward(self, wanted: Tensor) -> Tensor:
        return wanted[: len(self.source.varies)] & self.source.varies

    def emit(self, taken: Tensor, given: Tensor) -> Iterator[Instruction]:
        yield from ()


class Last(Step):
    """The states of the last nodes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def forward(self, x: Channels) -> Channels:
        self.source = x
        return Channels(x.varies[-self.count :], x.value[-self.count :])

    def backward(self, wanted: Tensor) -> Tensor:
        whole = torch.zeros_like(self.source.varies)
        whole[-self.count :] = wanted
        return whole & self.source.varies

    def emit(self, taken: Tensor, given: Tensor) -> Iterator[Instruction]:
        yield from ()


class GraphStep(Step):
    """A static graph. What its nodes receive and emit is analysed node by node, level by level."""

    def __init__(self, graph: StaticGraph, name: str, nodes: list[list[Step]]) -> None:
        self.name, self.nodes = name, nodes
        self.sizes, self.num_outputs = graph.levels.sizes, graph.levels.num_outputs
        self.matrix = graph.levels.node_matrix(_double(graph.weight))
        if not all(isinstance(step, (Norm, Relu, Depthwise)) for node in self.nodes for step in node):
            raise ValueError(f"{name}: nodes that do more than normalise, rectify and convolve by themselves are not compiled")

    def forward(self, x: Channels) -> Channels:
        self.source = x
        x.require_maps("a graph")
        states = _through(self.nodes[0], x)
        self.received, start = [x], self.sizes[0]
        for size, node in zip(self.sizes[1:], self.nodes[1:], strict=True):
            self.received.append(self._sums(start, start + size, states))
            new = _through(node, self._of_constants(self.received[-1]))
            states = Channels(torch.cat([states.varies, new.varies]), torch.cat([states.value, new.value]))
            start += size
        self.states = states
        self.received.append(self._sums(start, start + self.num_outputs, states))
        return self._of_constants(self.received[-1])

    def _sums(self, start: int, stop: int, states: Channels) -> Channels:
        """What reaches some nodes from earlier ones. The value is what constant ones send, also where others vary."""
        weight = self.matrix[start:stop, : len(states.varies)]
        value = torch.einsum("ts,shw->thw", weight, states.value)
        return Channels((weight != 0)[:, states.varies].any(1), value)

    @staticmethod
    def _of_constants(received: Channels) -> Channels:
        return Channels.of(received.varies, received.value)

    def backward(self, wanted: Tensor) -> Tensor:
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes) + 1)]
        reads = self.matrix != 0
        self.kept_outputs = wanted & self.received[-1].varies
        self.kept: list[Tensor] = []  # nodes, from the last level to the first
        readers = torch.zeros(reads.shape[0], dtype=torch.bool)
        readers[starts[-1] :] = self.kept_outputs
        for level in reversed(range(len(self.sizes))):
            columns = slice(starts[level], starts[level + 1])
            kept = reads[readers][:, columns].any(0) & self.states.varies[columns]
            for step in reversed(self.nodes[level]):
                kept = step.backward(kept)
            if level:
                readers[columns] = kept
            self.kept.insert(0, kept)
        return self.kept[0] & self.source.varies

    def emit(self, taken: Tensor, given: Tensor) -> Iterator[Instruction]:
        kept = [taken, *self.kept[1:]]
        levels, sources = [], kept[0]
        start = self.sizes[0]
        for size, node, mask, received in zip(self.sizes[1:], self.nodes[1:], kept[1:], self.received[1:-1], strict=True):
            if mask.any():
                matrix = self.matrix[start : start + size, : len(sources)][mask][:, sources]
                levels.append((Edges.of(matrix, Constant.of(received.value[mask])), tuple(_emitted(node, mask))))
            sources = torch.cat([sources, mask])
            start += size
        matrix = self.matrix[start:, : len(sources)][given][:, sources]
        outputs = Edges.of(matrix, Constant.of(self.received[-1].value[given]))
        yield Graph(tuple(_emitted(self.nodes[0], taken)), tuple(levels), outputs)

    @property
    def constants(self) -> int:
        """How many nodes do not depend on the image, although something that does reads them."""
        varying = torch.cat([*self.kept[1:], self.kept_outputs])
        readers = torch.cat([torch.zeros(self.sizes[0], dtype=torch.bool), varying])
        silent = ~self.states.varies & self.states.value.flatten(1).any(1)
        return int(((self.matrix != 0)[readers][:, : len(silent)].any(0) & silent).count_nonzero())


def _through(steps: list[Step], x: Channels) -> Channels:
    for step in steps:
        x = step.forward(x)
    return x


def _emitted(steps: list[Step], kept: Tensor) -> Iterator[Instruction]:
    """The instructions of steps that work channel by channel."""
    for step in steps:
        yield from step.emit(kept, kept)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def pair(value: int | str | tuple[int, ...]) -> tuple[int, int]:
    assert not isinstance(value, str)
    return (value, value) if isinstance(value, int) else (value[0], value[1])
