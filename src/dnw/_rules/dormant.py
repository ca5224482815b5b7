"""What the optimizer does to dormant edges, beside giving them their gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from dnw._checks import listing
from dnw._rules.layer import Layer, clear_others, momentum_of


@dataclass(frozen=True)
class Dormant:
    """What weight decay and momentum do to dormant edges. The default is the paper's: the same as to active ones.

    The gradient of dormant edges is the rule's business; this is about what an optimizer adds of its own accord.

    Attributes:
        weight_decay: whether dormant weights decay. If not, the base optimizer sees 0 in their place, so nothing that it
            derives from a weight's size acts on them; their update is added to the latent weight.
        momentum: "update" keeps it going; "hold" leaves it as it was while an edge is dormant; "zero" clears it, so that an
            edge begins without one when it becomes active. Momentum is ``momentum_buffer`` (SGD, RMSprop, Muon) or
            ``exp_avg`` (Adam and its kin); second moments always go on.
        gradient: how graphs on kernels make the gradient of dormant edges, where the rule needs it; that of active ones is
            exact always. "bfloat16" rounds states and gradients, "pooled" sums over squares of 2x2 pixels first, "pooled
            bfloat16" does both. Without kernels it is exact.
    """

    weight_decay: bool = True
    momentum: Literal["update", "hold", "zero"] = "update"
    gradient: Literal["exact", "bfloat16", "pooled", "pooled bfloat16"] = "exact"

    def __post_init__(self) -> None:
        if self.momentum not in ("update", "hold", "zero"):
            raise ValueError(f"Dormant: momentum={self.momentum!r}; allowed are 'update', 'hold' and 'zero'")
        if self.gradient not in (ways := ("exact", "bfloat16", "pooled", "pooled bfloat16")):
            raise ValueError(f"Dormant: gradient={self.gradient!r}; allowed are {listing(ways)}")

    def shown(self, layer: Layer) -> Tensor:
        """What the base optimizer gets to see of the latent weights."""
        return layer.latent if self.weight_decay else layer.latent.masked_fill(_dormant(layer), 0)

    def updated(self, layer: Layer, stepped: Tensor) -> Tensor:
        """The new latent weights, from what the base optimizer made of those it saw."""
        return stepped if self.weight_decay else stepped + torch.where(_dormant(layer), layer.latent, 0)

    def has_effect(self, layers: Iterable[Layer]) -> bool:
        """Whether the optimizer keeps a momentum for any of the layers that have stepped."""
        return self.momentum == "update" or any(momentum_of(layer) for layer in layers)

    def kept(self, layer: Layer) -> dict[str, Tensor]:
        """The momentum to come back to, before a step."""
        return {key: value.clone() for key, value in momentum_of(layer).items()} if self.momentum == "hold" else {}

    def apply(self, layer: Layer, active: Tensor | None = None, kept: Mapping[str, Tensor] | None = None) -> None:
        """Changes the momentum in place after a step and its selection.

        Args:
            layer: whose momentum it is.
            active: the active edges before the step; by default those after it.
            kept: the momentum before the step, where it is held.
        """
        if self.momentum == "update":
            return
        for key, value in momentum_of(layer).items():
            if self.momentum == "zero":
                clear_others(value, layer.active)
            else:
                before = layer.active if active is None else active
                assert before is not None
                value.copy_(torch.where(before, value, (kept or {}).get(key, torch.zeros_like(value))))


_KEEP_ZEROS = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Whether an optimizer leaves a weight of 0 at 0 where gradient and momentum are 0 too, as those of torch do.

    What mixes the entries of a parameter (Muon), or divides 0 by 0 (eps of 0), does not; of optimizers of others it is not
    known.
    """
    return type(optimizer) in _KEEP_ZEROS and all(group.get("eps", 1) for group in optimizer.param_groups)


def _dormant(layer: Layer) -> Tensor:
    assert layer.active is not None
    return ~layer.active
