"""One wired parameter: its latent weights, and how they go into the parameter and come back around a step.

Contract: outside a step the parameter holds the effective weight. Everything here works on the local part of a sharded
parameter and writes in place, into the same storage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dnw._parameters import Wirable
from dnw._patterns import Pattern
from dnw._rule import Layer, Rule
from dnw._shards import local, shard_of


class WiredLayer(Layer):
    """A layer with its parameter and the book-keeping of the exchange.

    Args:
        found: the parameter.
        seed: of random draws.
        dtype: of the latent weights; the parameter's by default. With a wider one the base optimizer steps in it, on
            latent weights of that dtype in place of the parameter's.
        pattern: which of its edges stand or fall together.
    """

    parameter: nn.Parameter
    module: nn.Module
    is_graph: bool
    """Whether the parameter holds the edges of a graph module."""
    previous: Tensor
    """The active edges before the last step."""
    version: int
    """The parameter's version after it was last projected: if it moved, somebody else wrote to the parameter."""
    exchanged: bool
    """Whether the parameter holds latent weights because a step is in progress."""
    num_active: int
    """Number of active edges, of the whole parameter where it is sharded."""

    def __init__(self, found: Wirable, seed: int, dtype: torch.dtype | None = None, pattern: Pattern | None = None) -> None:
        held = local(found.parameter).detach()
        shard = shard_of(found.parameter)
        candidates = found.candidates
        self._num_candidates = math.prod(found.parameter.shape) if candidates is None else int(candidates.count_nonzero())
        if shard is not None and candidates is not None:
            candidates = shard.cut(candidates)
        super().__init__(found.name, held.to(dtype or held.dtype, copy=True), candidates, seed, shard=shard, pattern=pattern)
        self.parameter, self.module, self.is_graph = found.parameter, found.module, found.is_graph
        self.parameter_dtype = held.dtype
        self.version, self.exchanged, self.num_active = -1, False, 0
        self._given_grad: Tensor | None = None
        self._storage: Tensor | None = None

    @property
    def num_candidates(self) -> int:
        return self._num_candidates

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return tuple(self.parameter.shape)

    @property
    def held(self) -> Tensor:
        """The values of the parameter that this process holds: the parameter's own storage."""
        return local(self.parameter)

    def whole(self, part: Tensor) -> Tensor:
        """A tensor as the user sees it: sharded as the parameter is."""
        return part if self.shard is None else self.shard.wrap(part)

    def part(self, whole: Tensor) -> Tensor:
        """The part of a tensor of the parameter's shape that this process holds; sharded already, or whole."""
        found = local(whole)
        return found if found is not whole else self.cut(whole)

    def total(self, mask: Tensor) -> int:
        """How many entries of a mask are true, over all processes that hold a part of the parameter."""
        count = mask.count_nonzero()
        return int(count if self.shard is None else self.shard.sum(count))

    def count(self) -> int:
        """How many edges are active, of the whole parameter, without messages."""
        if self.shard is not None:
            return self.num_active
        assert self.active is not None
        return int(self.active.count_nonzero())

    def local_grad(self) -> Tensor:
        """The part of the gradient that belongs to the part of the parameter held here."""
        grad: Any = self.parameter.grad
        parameter: Any = self.parameter
        if self.shard is not None and tuple(grad.placements) != tuple(parameter.placements):
            grad = grad.redistribute(placements=parameter.placements)  # partial sums of replicated parameters, say
        return local(grad)

    def see_state(self, state: Mapping[str, Any]) -> None:
        """Shows the rule what the optimizer keeps for the parameter."""
        self.state = {key: local(value) if isinstance(value, Tensor) else value for key, value in state.items()}

    def write(self, value: Tensor) -> None:
        """Writes values into the parameter that are not to be taken for somebody else's."""
        self.held.copy_(value)
        self.version = self._present_version()

    def _present_version(self) -> int:
        """Moves with every write to the parameter; a sharded one counts writes to it and to its local part apart."""
        held = self.held
        return held._version if held is self.parameter else held._version + self.parameter._version

    def activate(self, mask: Tensor) -> None:
        """Takes a new edge set, in place."""
        if self.active is None:
            self.active = mask.clone()
        else:
            self.active.copy_(mask)

    def remember(self) -> None:
        """Makes the present edges the previous ones."""
        assert self.active is not None
        self.previous.copy_(self.active)

    # --- the exchange ---

    def lend(self, value: Tensor, grad: Tensor | None = None) -> None:
        """Puts latent weights, and another gradient where there is one, into the parameter for the base optimizer."""
        self.exchanged = True
        given = self.parameter.grad
        widened = self.latent.dtype != self.parameter_dtype
        if widened:
            self._storage, self.parameter.data = self.parameter.data, value.clone()
            if grad is None and given is not None:
                grad = given
        else:
            self.held.copy_(value)
        if grad is not None:
            self._given_grad = given
            self.parameter.grad = self.whole(grad.to(self.latent.dtype))

    def take_back(self) -> None:
        """Ends the exchange: the parameter has its own storage, dtype and gradient again, its values are to be written."""
        if self._storage is not None:
            self.parameter.data, self._storage = self._storage, None
        if self._given_grad is not None:
            self.parameter.grad, self._given_grad = self._given_grad, None
        self.exchanged = False

    # --- what surrounds it ---

    def follow(self) -> None:
        """Follows the parameter to another device; raises ``RuntimeError`` where it changed in another way."""
        held = self.held
        if self.latent.device != held.device:
            self.latent, self.previous = self.latent.to(held.device), self.previous.to(held.device)
            self.active = None if self.active is None else self.active.to(held.device)
            self.candidates = None if self.candidates is None else self.candidates.to(held.device)
            self.notes = {key: value.to(held.device) for key, value in self.notes.items()}
            self.shard = shard_of(self.parameter)
        if self.parameter_dtype != held.dtype or self.latent.shape != held.shape:
            raise RuntimeError(
                f"the wired parameter {self.name!r} was {self.parameter_dtype} of shape {tuple(self.latent.shape)} when it "
                f"was wired and is {held.dtype} of shape {tuple(held.shape)} now; convert the model before wiring it"
            )

    def is_written(self) -> bool:
        """Whether somebody else has written to the parameter since it was last projected."""
        return self._present_version() != self.version

    def take_over_writes(self, projected: Tensor, rule: Rule) -> tuple[bool, bool]:
        """Takes over values that somebody else wrote to the parameter since it was last projected.

        Entries that differ are taken over one by one. Where dormant entries have got weights and active ones have become
        zero, another sparse weight was put in place of this one: then its zeros count too.

        Args:
            projected: what the parameter would hold without them.
            rule: whose latent weights they are.

        Returns:
            Whether anything differs, so that edges are to be selected anew; whether another sparse weight was put in place.
        """
        held = self.held.detach()
        self.version = self._present_version()
        assert self.active is not None
        written = held != projected.to(held.dtype)
        grown, pruned = written & ~self.active, written & self.active & (held == 0)
        seen = torch.stack([written.any(), grown.any(), pruned.any()]).to(torch.int64)
        any_written, any_grown, any_pruned = (seen if self.shard is None else self.shard.sum(seen)).tolist()
        replaced = bool(any_grown and any_pruned)
        if any_written:
            values = held.to(self.latent.dtype)
            remade = rule.remade(self, written)
            self.latent.copy_(values if replaced else torch.where(remade, rule.latent_of(self, values), self.latent))
        return bool(any_written), replaced
