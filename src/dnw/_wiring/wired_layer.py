"""One wired parameter: its latent weights, and how they go into the parameter and come back around a step.

Contract: outside a step the parameter holds the effective weight. Everything here works on the local part of a sharded
parameter and writes in place, into the same storage. Where dormant edges have no weights of their own, the effective weight is
the latent one: the parameter is stepped in place, and nothing is exchanged but its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dnw._rules.dormant import Dormant
from dnw._rules.layer import Layer
from dnw._rules.rule import Rule
from dnw._selection.patterns import Pattern
from dnw._selection.shards import local, shard_of
from dnw._wiring.parameters import Wirable

MARGIN = 1 << 16
"""How far the k-th largest magnitude may move in a step, at first, in units of the last place of a float32: 0.8 %."""


def is_in_place(rule: Rule, dormant: Dormant) -> bool:
    """Whether parameters hold their latent weights themselves: dormant edges have none, and the others are as they are."""
    hooks = ("updated", "project", "latent_of", "remade", "settle")
    plain = all(getattr(type(rule), hook) is getattr(Rule, hook) for hook in hooks)
    return not rule.has_latent_weights and plain and dormant.momentum != "hold"


class WiredLayer(Layer):
    """A layer with its parameter and the book-keeping of the exchange.

    Args:
        found: the parameter.
        seed: of random draws.
        dtype: of the latent weights; the parameter's by default. With a wider one the base optimizer steps in it, on
            latent weights of that dtype in place of the parameter's.
        pattern: which of its edges stand or fall together.
        in_place: whether the parameter itself holds its latent weights.
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
    progress: Tensor
    """One number: how many entries of the latent weights are those of the step that is being taken over."""
    threshold: int | None
    """The smallest magnitude of an active edge at the last selection in one pass, as bits, and how far it may move."""
    margin: int
    aside: Tensor | None
    """The dense weights between the parts of a step that perturbs them; None otherwise."""

    def __init__(
        self,
        found: Wirable,
        seed: int,
        dtype: torch.dtype | None = None,
        pattern: Pattern | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        self.parameter, self.module, self.is_graph = found.parameter, found.module, found.is_graph
        held = local(found.parameter).detach()
        shard = shard_of(found.parameter)
        self.in_place = in_place and dtype in (None, held.dtype)
        candidates = found.candidates
        self._num_candidates = math.prod(found.parameter.shape) if candidates is None else int(candidates.count_nonzero())
        if candidates is not None:
            candidates = (candidates if shard is None else shard.cut(candidates)).contiguous()
        latent = held if self.in_place else held.to(dtype or held.dtype, copy=True)
        super().__init__(found.name, latent, candidates, seed, shard=shard, pattern=pattern, layout=found.layout)
        self.least_per_target = found.least_per_target
        self.parameter_dtype = held.dtype
        self.version, self.exchanged, self.num_active = -1, False, 0
        self.progress = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.threshold, self.margin = None, MARGIN
        self._buffer: Tensor | None = None
        self._changed = False  # whether active edges may differ from the previous ones
        self.aside: Tensor | None = None
        self._given_grad: Tensor | None = None
        self._lent_grad: Tensor | None = None
        self._storage: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of it is made of: nothing of a step, nothing that is made anew."""
        own = {key: vars(self)[key].clone() for key in ("_latent", "active") if vars(self).get(key) is not None}
        return {**vars(self), **own, "state": {}, "notes": {}, "grad": None, "aside": None, "threshold": None, "_buffer": None}

    def begin(self, rule: Rule) -> None:
        """Puts the effective weight of the edges that it has into the parameter, for the first time."""
        assert self.active is not None
        self.previous = self.active.clone()
        self.write(rule.project(self))

    def with_latent(self, latent: Tensor) -> Layer:
        """What a rule would see of it with other latent weights, outside a step."""
        return Layer(
            self.name,
            latent,
            self.candidates,
            self.seed,
            self.active,
            step=self.step,
            shard=self.shard,
            pattern=self.pattern,
            least=self.least,
            least_per_target=self.least_per_target,
            least_per_source=self.least_per_source,
            layout=self.layout,
        )

    @property
    def latent(self) -> Tensor:
        return self.held.detach() if self.in_place else self._latent

    @latent.setter
    def latent(self, value: Tensor) -> None:
        if not self.in_place:
            self._latent = value
        elif value.data_ptr() != self.held.data_ptr():
            self.held.copy_(value)

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

    def buffer(self, like: Tensor) -> Tensor:
        """Memory for a gradient like this one, kept from step to step."""
        kept = self._buffer
        if kept is None or (kept.shape, kept.dtype, kept.device) != (like.shape, like.dtype, like.device):
            self._buffer = kept = torch.empty_like(like, memory_format=torch.contiguous_format)
        return kept

    def see_state(self, state: Mapping[str, Any]) -> None:
        """Shows the rule what the optimizer keeps for the parameter."""
        self.state = {key: local(value) if isinstance(value, Tensor) else value for key, value in state.items()}

    def write(self, value: Tensor) -> None:
        """Writes values into the parameter that are not to be taken for somebody else's."""
        self.held.copy_(value)
        self.accept()

    def accept(self) -> None:
        """Takes what the parameter holds for its effective weight."""
        self.version = self._present_version()

    def clear_dormant(self) -> None:
        """Sets the latent weights of dormant edges to 0: of the parameter itself where it holds them."""
        assert self.active is not None
        self.latent.masked_fill_(~self.active, 0)
        if self.in_place:
            self.accept()

    def _present_version(self) -> int:
        """Moves with every write to the parameter; a sharded one counts writes to it and to its local part apart."""
        held = self.held
        return held._version if held is self.parameter else held._version + self.parameter._version

    def activate(self, mask: Tensor) -> None:
        """Takes a new edge set, in place."""
        self._changed = True
        if self.active is None:
            self.active = mask.clone(memory_format=torch.contiguous_format)
        else:
            self.active.copy_(mask)

    def begin_selection(self) -> Tensor:
        """The mask of active edges, to be overwritten."""
        assert self.active is not None
        self._changed = True
        return self.active

    @property
    def has_changed(self) -> bool:
        """Whether edges have been chosen since the last were remembered, be they the same."""
        return self._changed

    def remember(self) -> None:
        """Makes the present edges the previous ones."""
        assert self.active is not None
        if self._changed:
            self.previous.copy_(self.active)
            self._changed = False

    # --- the exchange ---

    def lend(self, value: Tensor) -> None:
        """Puts latent weights into the parameter for the base optimizer.

        The parameter gets another storage for the time where they are of another dtype, or where the optimizer differentiates
        through the gradient, which forbids to overwrite what the gradient was made of.
        """
        self.exchanged = True
        self.progress.zero_()
        grad = self.parameter.grad
        if self.latent.dtype != self.parameter_dtype or (grad is not None and grad.grad_fn is not None):
            self._storage, self.parameter.data = self.parameter.data, value.clone()
        elif not self.in_place:
            self.held.copy_(value)

    def lend_gradient(self, grad: Tensor | None) -> None:
        """Gives the base optimizer another gradient where there is one, in the dtype of the latent weights."""
        given = self.parameter.grad
        if grad is None and given is not None and given.dtype != self.latent.dtype:
            grad = self.local_grad()
        if grad is not None:
            self._given_grad = given
            self._lent_grad = self.parameter.grad = self.whole(grad.to(self.latent.dtype))

    def give_gradient_back(self) -> None:
        """The parameter has its own gradient again, unless somebody has put another in the place of the one that was lent."""
        if self._given_grad is not None and self.parameter.grad is self._lent_grad:
            self.parameter.grad = self._given_grad
        self._given_grad = self._lent_grad = None

    @property
    def has_other_storage(self) -> bool:
        """Whether the parameter has another storage than its own for the time of a step."""
        return self._storage is not None

    def take(self, stepped: Tensor) -> None:
        """Takes over latent weights that the base optimizer has made, as far as they are not yet."""
        done = int(self.progress)
        if not self.in_place and not done:
            self.latent.copy_(stepped)
        elif not self.in_place and done < self.latent.numel():  # only what lies in one piece is taken over in parts
            self.latent.view(-1)[done:].copy_(stepped.reshape(-1)[done:])
        self.progress.fill_(self.latent.numel())

    def take_back(self) -> None:
        """Ends the exchange: the parameter has its own storage, dtype and gradient again, its values are to be written."""
        if self._storage is not None:
            if self.in_place:
                self._storage.copy_(self.parameter.data)
            self.parameter.data, self._storage = self._storage, None
        self.give_gradient_back()
        self.exchanged = False

    # --- what surrounds it ---

    @property
    def is_alike(self) -> bool:
        """Whether the parameter has the dtype and shape that it was wired with."""
        return (self.parameter_dtype, self.previous.shape) == (self.held.dtype, self.held.shape)

    def follow(self) -> None:
        """Follows the parameter to another device; raises ``RuntimeError`` where it changed in another way."""
        held = self.held
        if self.previous.device != held.device:
            self.latent, self.previous = self.latent.to(held.device), self.previous.to(held.device)
            self.active = None if self.active is None else self.active.to(held.device)
            self.candidates = None if self.candidates is None else self.candidates.to(held.device)
            self.notes = {key: value.to(held.device) for key, value in self.notes.items()}
            self.shard = shard_of(self.parameter)
        if not self.is_alike:
            raise RuntimeError(
                f"the wired parameter {self.name!r} was {self.parameter_dtype} of shape {tuple(self.previous.shape)} when it "
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
        grown, pruned = written & ~self.active & (held != 0), written & self.active & (held == 0)
        seen = torch.stack([written.any(), grown.any(), pruned.any()]).to(torch.int64)
        any_written, any_grown, any_pruned = (seen if self.shard is None else self.shard.sum(seen)).tolist()
        replaced = bool(any_grown and any_pruned)
        if any_written and not self.in_place:
            values = held.to(self.latent.dtype)
            remade = rule.remade(self, written)
            self.latent.copy_(values if replaced else torch.where(remade, rule.latent_of(self, values), self.latent))
        return bool(any_written), replaced
