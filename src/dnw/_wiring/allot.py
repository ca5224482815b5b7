"""Who gets how many edges: the budget arguments of ``wire`` as pools of layers, and what every layer keeps at least."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from dnw._checks import did_you_mean, listing
from dnw._rules.fixed import Frozen
from dnw._rules.growing import SET
from dnw._rules.pool import Pool
from dnw._rules.rule import Rule
from dnw._selection.budgets import Allotment, Budget, ByName, Floor, LayerShape, Uniform, apportion
from dnw._selection.patterns import Pattern
from dnw._selection.schedules import DensitySchedule
from dnw._wiring.parameters import Wirable


def allot(
    rule: Rule,
    density: float | Mapping[str, float] | Budget | None,
    num_edges: int | Mapping[str, int] | None,
    pattern: Pattern | None,
    found: Sequence[Wirable],
) -> Allotment:
    """The pools of the parameters that were found and their budgets, from the rule, the pattern or the arguments of ``wire``.

    Raises:
        ValueError: the arguments say too little, too much, or what does not fit.
    """
    shapes = [_shape(f) for f in found]
    if isinstance(rule, Frozen) and (unknown := sorted(set(rule.edges) - {s.name for s in shapes})):
        raise ValueError(
            f"Frozen has edges for {unknown[0]!r}, which is not wired{did_you_mean(unknown[0], [s.name for s in shapes])}"
        )
    if pattern is None:
        return _by_layers(rule, density, num_edges, shapes)
    by_target = [dataclasses.replace(s, shape=f.layout.shape(s.shape)) for s, f in zip(shapes, found, strict=True)]
    return _by_units(pattern, density, num_edges, by_target)


def _shape(found: Wirable) -> LayerShape:
    candidates = found.parameter.numel() if found.candidates is None else int(found.candidates.count_nonzero())
    return LayerShape(found.name, found.module_name, tuple(found.parameter.shape), candidates)


def _by_layers(
    rule: Rule,
    density: float | Mapping[str, float] | Budget | None,
    num_edges: int | Mapping[str, int] | None,
    shapes: Sequence[LayerShape],
) -> list[tuple[list[int], int]]:
    """The pools of layers and their budgets, from the rule or from the arguments of :func:`wire`."""
    by_rule = [k for k in (rule.num_edges(shape) for shape in shapes) if k is not None]
    if by_rule:
        if density is not None or num_edges is not None:
            raise ValueError(f"{type(rule).__name__} fixes its own number of edges; leave density and num_edges out")
        if len(by_rule) < len(shapes):
            raise ValueError(f"{type(rule).__name__} fixes the number of edges of some layers only; it must of all or none")
        return [([i], k) for i, k in enumerate(by_rule)]
    return _budget(density, num_edges).allot(shapes)


def _by_units(
    pattern: Pattern,
    density: float | Mapping[str, float] | Budget | None,
    num_edges: int | Mapping[str, int] | None,
    shapes: Sequence[LayerShape],
) -> list[tuple[list[int], int]]:
    """The pools of layers and their budgets, in whole units of a pattern."""
    fixed = [k for k in (pattern.num_edges(s.shape) for s in shapes) if k is not None]
    if fixed:
        if density is not None or num_edges is not None:
            raise ValueError(f"{pattern!r} fixes the number of edges; leave density and num_edges out")
        return [([i], k) for i, k in enumerate(fixed)]
    if num_edges is not None:
        raise ValueError(f"{pattern!r} takes a budget in units of several edges; give density instead of num_edges")
    units = [pattern.unit(s.shape) for s in shapes]
    whole = [dataclasses.replace(s, candidates=s.candidates // unit) for s, unit in zip(shapes, units, strict=True)]
    allotted = _budget(density, None).allot(whole)
    for indices, _ in allotted:
        if len({units[i] for i in indices}) > 1:
            raise ValueError(
                f"{pattern!r} has units of different sizes in {listing(shapes[i].name for i in indices)}, so they cannot share "
                "one budget; give each a density of its own"
            )
    return [(indices, k * units[indices[0]]) for indices, k in allotted]


def _budget(density: float | Mapping[str, float] | Budget | None, num_edges: int | Mapping[str, int] | None) -> Budget:
    """The arguments of :func:`wire` as one budget."""
    if density is None and num_edges is None:
        raise ValueError("a wiring needs a budget: give density, or num_edges, or both by name pattern")
    if isinstance(density, Budget):
        if num_edges is not None:
            raise ValueError(f"density={density!r} is a budget for every layer; leave num_edges out")
        return density
    if density is not None and num_edges is None and not isinstance(density, Mapping):
        return Uniform(density)
    if (
        density is not None
        and num_edges is not None
        and not isinstance(density, Mapping)
        and not isinstance(num_edges, Mapping)
    ):
        raise ValueError("density and num_edges are both given for every layer; give one, or give them by name pattern")
    densities = density if isinstance(density, Mapping) else {} if density is None else {"*": density}
    numbers = num_edges if isinstance(num_edges, Mapping) else {} if num_edges is None else {"*": num_edges}
    return ByName(dict(densities), dict(numbers))


def set_floors(floor: Floor, rule: Rule, pattern: Pattern | None, pools: Sequence[Pool]) -> None:
    """Tells the layers what they keep at least; raises ``ValueError`` where a budget is too small for it."""
    if not isinstance(floor, Floor):
        raise ValueError(f"floor: expected dnw.Floor(...), got {floor!r}")
    by_node = floor.per_target or floor.per_source or any(x.least_per_target for pool in pools for x in pool.layers)
    if by_node and not rule.fixed and not rule.fits_floors:
        raise ValueError(
            f"{type(rule).__name__} cannot leave each target or source a number of edges, which floor=, or a weight norm, asks "
            "for; take another rule, or leave such layers dense with exclude"
        )
    if (floor.per_target or floor.per_source) and (pattern is not None or not rule.fits_floors):
        what, end = repr(pattern) if pattern is not None else type(rule).__name__, "target" if floor.per_target else "source"
        raise ValueError(f"floor={floor!r}: {what} chooses its edges without regard to {end}s; leave per_{end} out")
    for layer in (x for pool in pools for x in pool.layers if x.least_per_target):
        if isinstance(rule, Frozen) and not bool(layer.layout.by_target(rule.edges[layer.name]).flatten(1).any(1).all()):
            raise ValueError(f"Frozen edges for {layer.name!r} leave a target without any, and its weight norm would be 0 / 0")
    shared = rule.redistributes or any(len(pool.layers) > 1 for pool in pools)
    if not shared and (floor.edges > 1 or floor.density):
        raise ValueError(f"floor={floor!r}: every layer has a budget of its own, so it would have no effect; leave it out")
    if shared and isinstance(rule, SET) and rule.by_sign and (floor.edges > 1 or floor.density):
        raise ValueError(
            f"floor={floor!r}: SET(by_sign=True) prunes positive and negative edges of all layers, without regard to what each "
            "keeps; leave one of the two out"
        )
    for pool in pools:
        for layer in pool.layers:
            layer.least = floor.of(layer.num_candidates) if shared else 0
            is_matrix = layer.latent.ndim > 1  # the entries of a vector are its targets, and it has no sources
            layer.least_per_target = max(layer.least_per_target, floor.per_target if is_matrix else 0)
            layer.least_per_source = floor.per_source if is_matrix else 0
            if layer.least_per_source and layer.shard is not None:
                raise ValueError(
                    f"{layer.name!r} is sharded, so its sources cannot keep edges of their own; leave per_source out"
                )
            if layer.least_per_target and layer.shard is not None and layer.shard.splits(layer.layout.target_dims):
                raise ValueError(
                    f"{layer.name!r} is sharded within its targets, so each cannot keep {layer.least_per_target} edges; shard "
                    "it along its first dimension, or leave per_target out"
                )
        if pool.least > pool.budget:
            raise ValueError(
                f"{listing(x.name for x in pool.layers)}: {pool.budget:,} edges are too few for what is kept at least, "
                f"{pool.least:,} ({floor!r}); raise the density, lower the floor or exclude layers"
            )


def begin_together(schedule: DensitySchedule, pools: Sequence[Pool]) -> None:
    """Divides what a schedule begins with among pools that are one budget from then on."""
    unit = pools[0].unit
    room = [pool.num_candidates // unit for pool in pools]
    total = schedule.num_edges(0, sum(pool.budget for pool in pools) // unit, sum(room))
    least = [max(1, pool.least // unit) for pool in pools]
    units = apportion(total, [pool.k for pool in pools], room)
    if any(k < few for k, few in zip(units, least, strict=True)):
        above = apportion(
            total - sum(least),
            [max(0, k - few) for k, few in zip(units, least, strict=True)],
            [most - few for most, few in zip(room, least, strict=True)],
        )
        units = [few + more for few, more in zip(least, above, strict=True)]
    for pool, k in zip(pools, units, strict=True):
        pool.k = k * unit
