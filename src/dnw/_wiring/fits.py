"""Whether a rule, a schedule, a pattern, parameters and an optimizer go together.

Contract: pure checks; each raises ``ValueError`` and changes nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

from torch.optim import Optimizer

from dnw._checks import listing
from dnw._rules.pool import Pool
from dnw._rules.rule import Rule
from dnw._selection.patterns import NOfM, Pattern
from dnw._selection.schedules import DensitySchedule
from dnw._selection.shards import local, shard_of
from dnw._wiring.membership import owner_of
from dnw._wiring.parameters import Wirable
from dnw._wiring.state import check_finite as require_finite
from dnw._wiring.wired_layer import WiredLayer


def check_rule(
    rule: Rule, schedule: DensitySchedule | None, pattern: Pattern | None, found: Sequence[Wirable], optimizer: Optimizer
) -> None:
    """Raises ``ValueError`` where a rule, a schedule, a pattern, the parameters and the optimizer do not go together."""
    name = type(rule).__name__
    if schedule is not None and not isinstance(schedule, DensitySchedule):
        raise ValueError(f"schedule: expected dnw.DensitySchedule(...), got {schedule!r}")
    if schedule is not None and rule.fixed:
        raise ValueError(f"{name} never changes its edges, so it cannot follow a schedule; leave the schedule out")
    if pattern is not None:
        _check_pattern(rule, schedule, pattern, found)
    if rule.selects_by_gradient or rule.needs_momentum:
        without = [f.name for f in found if not f.parameter.requires_grad]
        if without:
            raise ValueError(
                f"{name} chooses edges by gradients, and {listing(without)} get none (requires_grad=False); leave them "
                "dense with exclude, or take a rule that goes by magnitude"
            )
    if rule.needs_momentum:
        held = {id(f.parameter) for f in found}
        for group in optimizer.param_groups:
            if any(id(p) in held for p in group["params"]) and not (group.get("momentum") or group.get("betas", (0,))[0]):
                raise ValueError(
                    f"{name} chooses edges by the optimizer's momentum, and this {type(optimizer).__name__} keeps none; give "
                    "it momentum=0.9, say"
                )


def _check_pattern(rule: Rule, schedule: DensitySchedule | None, pattern: Pattern, found: Sequence[Wirable]) -> None:
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern: expected a pattern such as dnw.NOfM(2, 4), got {pattern!r}")
    if not rule.fits(pattern):
        raise ValueError(f"{type(rule).__name__} cannot choose edges of the pattern {pattern!r}; dnw.DNW() can")
    for f in found:
        shape = f.layout.shape(tuple(f.parameter.shape))
        pattern.check(f.name, shape)
        if f.least_per_target and not isinstance(pattern, NOfM):
            raise ValueError(
                f"{f.name!r} is under a weight norm, where every target needs an edge, and {pattern!r} may take all of a "
                "target's; leave it dense with exclude, or choose single edges"
            )
        if f.candidates is not None and not bool(f.candidates.all()):
            raise ValueError(
                f"{f.name!r} has entries that are no candidate edges, and patterns are for parameters all of whose entries "
                "are; leave it dense with exclude"
            )
        if shard_of(f.parameter) is not None:
            raise ValueError(f"{f.name!r} is sharded, and patterns are for whole parameters; choose single edges instead")
        if schedule is not None and pattern.num_edges(shape) is not None:
            raise ValueError(f"{pattern!r} fixes the number of edges, so it cannot follow a schedule; leave one of them out")


def check_parameters(found: Sequence[Wirable], optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(owner_of(f.parameter) is not None for f in found):
        gc.collect()  # the wiring of an optimizer that is gone lives until its cycle is collected
    for f in found:
        if owner_of(f.parameter) is not None:
            raise ValueError(
                f"{f.name!r} is wired already; take that wiring off with wiring.remove() first, or leave the parameter "
                "out with exclude"
            )
        require_finite(f.name, local(f.parameter).detach(), shard_of(f.parameter))
    missing = [f.name for f in found if id(f.parameter) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {listing(missing)}; give it these parameters before wiring, or leave them dense "
            "with exclude"
        )


def check_units(rule: Rule, layers: Sequence[WiredLayer]) -> None:
    if len({Pool([layer], 1).unit for layer in layers}) > 1:
        raise ValueError(
            f"{type(rule).__name__} moves edges between layers, and {layers[0].pattern!r} has units of different sizes in "
            "them; take single edges, or blocks"
        )


def check_layers(layers: Sequence[WiredLayer], pools: Sequence[Pool]) -> None:
    for layer in layers:
        if layer.latent.dtype == layer.parameter_dtype:
            continue
        if not layer.latent.is_floating_point() or layer.latent.element_size() < layer.held.element_size():
            raise ValueError(
                f"latent_dtype={layer.latent.dtype} for {layer.name!r}, which is {layer.parameter_dtype}: allowed is a "
                "floating-point dtype that is at least as wide"
            )
        if layer.shard is not None:
            raise ValueError(
                f"latent_dtype={layer.latent.dtype} for {layer.name!r}, which is sharded: keep sharded parameters in that "
                "dtype and compute in a narrower one by the sharding's own mixed-precision policy"
            )
    for pool in pools:
        spread = {tuple(map(id, x.shard.groups)) if x.shard is not None else None for x in pool.layers}
        if len(spread) > 1:
            raise ValueError(
                f"{listing(x.name for x in pool.layers)} share one budget but are spread over different processes; give "
                "each a budget of its own"
            )
