"""What a rule is: how the active edges are chosen, and what dormant edges get.

Contract: the wiring calls, around each optimizer step, ``gradient`` (before), ``updated``, ``select`` and ``prepare`` (after,
on the updated latent weights) and ``project`` (what the model gets).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import FunctionType
from typing import ClassVar

import torch
from torch import Tensor

from dnw._checks import nearest
from dnw._rules.dormant import Dormant
from dnw._rules.layer import Layer
from dnw._rules.pool import Pool, chosen
from dnw._selection.budgets import LayerShape
from dnw._selection.patterns import Pattern

_HOOKS = (FunctionType, property, bool, Dormant)
"""Of which types the hooks of a rule are."""


@dataclass(frozen=True)
class Rule:
    """How active edges are chosen. Subclass it, override what differs, and add the class to ``RULES``.

    A rule of the common kind overrides :meth:`score` alone.

    Raises:
        TypeError: when a subclass is defined one of whose methods is nearly, but not quite, named as a hook.
    """

    fixed: ClassVar[bool] = False
    """Whether the edges are chosen once, when the model is wired, and never again."""
    has_latent_weights: ClassVar[bool] = True
    """Whether dormant edges keep weights of their own. Where they do not, the parameter itself is stepped, in place."""
    needs_dormant_gradient: ClassVar[bool] = True
    """Whether dormant edges get a gradient. If not, it is set to 0 there, whatever ``gradient`` says."""
    dormant: ClassVar[Dormant] = Dormant()
    """What weight decay and momentum do to dormant edges, unless the user says otherwise."""
    redistributes: ClassVar[bool] = False
    """Whether edges move between layers: then all layers are one pool, and begin with what the budget gives each."""
    needs_momentum: ClassVar[bool] = False
    """Whether the rule reads the optimizer's momentum."""
    selects_by_gradient: ClassVar[bool] = False
    """Whether ``select`` or ``score`` reads ``layer.grad``, which is kept for them only then."""
    fits_floors: ClassVar[bool] = True
    """Whether each target may keep a least number of edges (``dnw.Floor``)."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        inherited = {name: value for base in reversed(cls.__mro__[1:]) for name, value in vars(base).items()}
        settings = {field.name for field in fields(cls)} | vars(cls).get("__annotations__", {}).keys()
        hooks = [n for n, v in inherited.items() if isinstance(v, _HOOKS) and n not in settings and not n.startswith("_")]
        for name, value in vars(cls).items():
            if name in inherited or name in settings or name.startswith("_") or not isinstance(value, _HOOKS):
                continue
            if meant := nearest(name, hooks, cutoff=0.8):
                raise TypeError(
                    f"{cls.__name__}.{name} is no hook of a rule, so nothing would call it; for the hook {meant!r} name it so, "
                    f"and a helper of your own _{name}"
                )

    def is_due(self, step: int) -> bool:
        """Whether edges may change after so many steps. Where not, ``select`` is called only if the number of edges changes."""
        return True

    def fits(self, pattern: Pattern) -> bool:
        """Whether the rule's edges may have a pattern."""
        return True

    @property
    def settles(self) -> bool:
        """Whether ``settle`` differs from ``project``, so that a model is evaluated inside ``wiring.settled()`` only."""
        return type(self).settle is not Rule.settle

    @property
    def is_plain(self) -> bool:
        """Whether it takes the largest latent weights, as they are, and nothing else: then one pass over them does all."""
        hooks = ("score", "updated", "select", "prepare", "project")
        return not self.fixed and all(getattr(type(self), hook) is getattr(Rule, hook) for hook in hooks)

    def num_edges(self, shape: LayerShape) -> int | None:
        """The number of edges of a layer where the rule itself fixes it; None where the budget decides."""
        return None

    def score(self, layer: Layer) -> Tensor:
        """The quantity whose largest magnitudes become active, of the shape of the layer. Default: the latent weights."""
        return layer.latent

    def select(self, pools: Sequence[Pool]) -> list[list[Tensor]]:
        """The active edges of each layer of each pool, as boolean masks; exactly ``pool.k`` are true in each pool."""
        return chosen(pools, [[checked_score(self, "score", x, self.score(x)) for x in pool.layers] for pool in pools])

    def prepare(self, pools: Sequence[Pool]) -> None:
        """Notes in ``layer.notes`` what ``gradient`` and ``project`` need to know of a whole pool; after every selection."""

    def gradient(self, layer: Layer) -> Tensor | None:
        """The gradient that the latent weights get in this step; None leaves it as autograd computed it."""
        return None

    def updated(self, layer: Layer, stepped: Tensor) -> Tensor:
        """The latent weights after a step, from what the optimizer made of ``layer.latent``; as it made them by default.

        It may also change ``layer.state`` in place. Called between ``gradient`` and ``select``.
        """
        return stepped

    def project(self, layer: Layer) -> Tensor:
        """The effective weight that the model trains with. Default: the latent weight on active edges, 0 elsewhere."""
        assert layer.active is not None
        return torch.where(layer.active, layer.latent, torch.zeros((), dtype=layer.latent.dtype, device=layer.latent.device))

    def latent_of(self, layer: Layer, effective: Tensor) -> Tensor:
        """The latent weights that ``project`` makes these effective weights of; for values that others write to the model."""
        return effective

    def remade(self, layer: Layer, written: Tensor) -> Tensor:
        """The entries to which ``latent_of`` gives new latent weights after a write to some; those alone by default."""
        return written

    def settle(self, layer: Layer) -> Tensor:
        """The effective weight that the model is evaluated with, where it differs from the one it trains with."""
        return self.project(layer)


def checked_score(rule: Rule, hook: str, layer: Layer, score: Tensor) -> Tensor:
    """What a hook of a rule gave for ranking; raises where that cannot be ranked.

    Raises:
        TypeError: it is no floating-point tensor of the layer's shape, on its device.
        ValueError: the first time, where every weight is finite, some of it is not a number.
    """
    shape, device = tuple(layer.latent.shape), layer.latent.device
    is_tensor = isinstance(score, Tensor)
    if not is_tensor or not score.is_floating_point() or tuple(score.shape) != shape or score.device != device:
        given = f"{score.dtype} of shape {tuple(score.shape)} on {score.device}" if is_tensor else repr(score)
        raise TypeError(
            f"{type(rule).__name__}.{hook} gave {given} for {layer.name!r}; expected a floating-point tensor of shape {shape} "
            f"on {device}"
        )
    if layer.active is None:
        bad = score.isnan().count_nonzero()
        if int(bad if layer.shard is None else layer.shard.sum(bad)):
            raise ValueError(
                f"{type(rule).__name__}.{hook} gave NaN for {layer.name!r}, and magnitudes cannot be ranked with NaN; give "
                "such edges a number, 0 to rank them last"
            )
    return score


def check_settings(rule: Rule, **allowed: tuple[float, float]) -> None:
    """Raises ``ValueError`` unless the named settings are numbers between two bounds; whole ones where the lower bound is."""
    for name, (low, high) in allowed.items():
        value = getattr(rule, name)
        kind = int if isinstance(low, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or math.isinf(value):
            what = "a whole number" if kind is int else "a number"
            bound = f"from {low:g} on" if high == math.inf else f"from {low:g} to {high:g}"
            raise ValueError(f"{type(rule).__name__}: {name}={value!r}: allowed is {what} {bound}")
