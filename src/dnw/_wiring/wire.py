"""``wire``: ties a rule to the parameters of a model and to the optimizer that trains them.

Contract: everything is checked before anything is changed.
"""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnw._checks import check_seed, did_you_mean, listing
from dnw._rules.dormant import Dormant
from dnw._rules.estimators import DNW
from dnw._rules.fixed import Frozen
from dnw._rules.pool import Pool
from dnw._rules.rule import Rule
from dnw._selection.budgets import Budget, ByName, Floor, Shape, Uniform, share_out
from dnw._selection.patterns import NOfM, Pattern
from dnw._selection.schedules import DensitySchedule
from dnw._selection.shards import local, shard_of
from dnw._wiring.foreign import inside_launchers, refuse
from dnw._wiring.membership import owner_of
from dnw._wiring.parameters import Defaults, Selector, Wirable, find_parameters, unwrap_model
from dnw._wiring.state import check_finite as require_finite
from dnw._wiring.wired_layer import WiredLayer, is_in_place
from dnw._wiring.wiring import Wiring
from dnw.graphs._paths import has_path


def wire(
    model: nn.Module,
    optimizer: Optimizer,
    density: float | Mapping[str, float] | Budget | None = None,
    *,
    num_edges: int | Mapping[str, int] | None = None,
    rule: Rule | None = None,
    floor: Floor | None = None,
    schedule: DensitySchedule | None = None,
    pattern: Pattern | None = None,
    include: Selector | Sequence[Selector] | None = None,
    exclude: str | type[nn.Module] | Sequence[Selector] = (),
    seed: int = 0,
    dormant: Dormant | None = None,
    latent_dtype: torch.dtype | None = None,
    check_ranks: bool = True,
    check_finite: bool | None = None,
) -> Wiring:
    """Wires a model: from the next step on, its weights are sparse and which edges they have is learned.

    Call it after the optimizer is made and the model is on its device (and wrapped, where it is trained distributed),
    then train as always.

    Args:
        model: any module. Its wired parameters hold their effective (sparse) weights from here on.
        optimizer: the optimizer that holds the parameters.
        density: share of the candidate edges that is active, in (0, 1]: one for every layer, or by name pattern, or a
            budget such as ``dnw.ErdosRenyiKernel(0.1)`` or ``dnw.Global(0.1)``.
        num_edges: exact number of active edges: for each layer, or by name pattern (beside ``density`` if wanted).
        rule: how active edges are chosen; ``dnw.DNW()`` by default.
        floor: what every layer, or every target of a layer, keeps at least; ``dnw.Floor(edges=1)`` by default.
        schedule: how the number of active edges falls to the budget's during training; it is constant by default.
        pattern: which edges stand or fall together: ``dnw.NOfM(2, 4)``, which needs no budget, ``dnw.Blocks(4, 4)`` or
            ``dnw.Channels()``.
        include: name patterns or module types: exactly what to wire. By default the weights of convolutions (depthwise
            ones apart), linear layers, RNN cells and attention projections; in a model with graphs, only their edges.
            ``[dnw.DEFAULTS, "own.weight"]`` is the defaults and more. What is not trained is wired only by its name.
        exclude: name patterns or module types to leave dense.
        seed: of random draws (random graph and the like).
        dormant: what weight decay and momentum do to dormant edges; by default what the rule says, in the paper's the same as
            to active ones.
        latent_dtype: dtype of the latent weights; by default the parameter's. ``torch.float32`` for half-precision
            parameters makes the optimizer step, and keep its state, in float32.
        check_ranks: whether the first step in a process group compares the processes' latent weights, which takes one
            small message from all of them.
        check_finite: whether every step first looks for NaN and infinity among the gradients, which it then refuses. By
            default it does for parameters on a CPU, where that takes little; on accelerators it waits for the device.

    Returns:
        The wiring. It need not be kept: the optimizer keeps it alive.

    Raises:
        ValueError: a budget, pattern, parameter or optimizer that does not fit; nothing has been changed then.
    """
    given, optimizer = optimizer, inside_launchers(optimizer)  # type: ignore[assignment]
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer: expected a torch.optim.Optimizer, got {type(given).__name__}")
    refuse(optimizer)
    rule = DNW() if rule is None else rule
    if not isinstance(rule, Rule):
        raise ValueError(f"rule: expected a rule such as dnw.DNW(), got {rule!r}")
    found, left = find_parameters(model, None if include is None else _as_list(include), _as_list(exclude))
    _check_parameters(found, optimizer)
    if latent_dtype is not None and not isinstance(latent_dtype, torch.dtype):
        raise ValueError(f"latent_dtype={latent_dtype!r}: expected a dtype such as torch.float32")
    if dormant is not None and not isinstance(dormant, Dormant):
        raise ValueError(f"dormant: expected dnw.Dormant(...), got {dormant!r}")
    seed = check_seed(seed)
    _check_rule(rule, schedule, pattern, found, optimizer)
    shapes = [_shape(f) for f in found]
    if isinstance(rule, Frozen) and (unknown := sorted(set(rule.edges) - {s.name for s in shapes})):
        raise ValueError(
            f"Frozen has edges for {unknown[0]!r}, which is not wired{did_you_mean(unknown[0], [s.name for s in shapes])}"
        )
    if pattern is None:
        shares = _shares(rule, density, num_edges, shapes)
    else:
        by_target = [dataclasses.replace(s, shape=f.layout.shape(s.shape)) for s, f in zip(shapes, found, strict=True)]
        shares = _shares_of(pattern, density, num_edges, by_target)
    dormant = dormant or rule.dormant
    layers = [WiredLayer(f, seed, latent_dtype, pattern, in_place=is_in_place(rule, dormant)) for f in found]
    pools = [Pool([layers[i] for i in indices], k, budget=k) for indices, k in shares]
    _check_shards(layers, pools)
    _set_floors(Floor() if floor is None else floor, rule, pattern, pools)
    if schedule is not None:
        for pool in pools:
            pool.k = schedule.num_edges(0, pool.k // pool.unit, pool.num_candidates // pool.unit) * pool.unit
    if rule.redistributes:
        _check_units(rule, layers)
        if schedule is not None:
            _begin_together(schedule, pools)
    wiring = Wiring(unwrap_model(model), optimizer, rule, layers, pools, left, dormant, schedule, check_ranks, check_finite)
    _warn_of_cut(layers)
    return wiring


def _warn_of_cut(layers: Sequence[WiredLayer]) -> None:
    """Warns of graphs whose outputs no input reaches: they compute the same of every input."""
    cut = []
    for layer in layers:
        sizes = [getattr(layer.module, name, None) for name in ("num_inputs", "num_outputs")]
        if layer.is_graph and layer.shard is None and hasattr(layer.module, "node_matrix") and None not in sizes:
            adjacency: Tensor = layer.module.node_matrix(layer.active)  # type: ignore[operator]
            if not has_path(adjacency, *sizes):  # type: ignore[arg-type]
                cut.append(layer.name)
    if cut:
        warnings.warn(
            f"no path of active edges leads from an input to an output of {listing(cut)}; with more edges, or another "
            "seed, there is one",
            stacklevel=3,
        )


def _check_rule(
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


def _shares_of(
    pattern: Pattern,
    density: float | Mapping[str, float] | Budget | None,
    num_edges: int | Mapping[str, int] | None,
    shapes: Sequence[Shape],
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
    shares = _budget(density, None).shares(whole)
    for indices, _ in shares:
        if len({units[i] for i in indices}) > 1:
            raise ValueError(
                f"{pattern!r} has units of different sizes in {listing(shapes[i].name for i in indices)}, so they cannot share "
                "one budget; give each a density of its own"
            )
    return [(indices, k * units[indices[0]]) for indices, k in shares]


def _check_units(rule: Rule, layers: Sequence[WiredLayer]) -> None:
    if len({Pool([layer], 1).unit for layer in layers}) > 1:
        raise ValueError(
            f"{type(rule).__name__} moves edges between layers, and {layers[0].pattern!r} has units of different sizes in "
            "them; take single edges, or blocks"
        )


def _set_floors(floor: Floor, rule: Rule, pattern: Pattern | None, pools: Sequence[Pool]) -> None:
    """Tells the layers what they keep at least; raises ``ValueError`` where a budget is too small for it."""
    if not isinstance(floor, Floor):
        raise ValueError(f"floor: expected dnw.Floor(...), got {floor!r}")
    by_target = floor.per_target or any(x.least_per_target for pool in pools for x in pool.layers)
    if by_target and not rule.fixed and not rule.fits_floors:
        raise ValueError(
            f"{type(rule).__name__} cannot leave each target a number of edges, which floor=, or a weight norm, asks for; take "
            "another rule, or leave such layers dense with exclude"
        )
    if floor.per_target and (pattern is not None or not rule.fits_floors):
        what = repr(pattern) if pattern is not None else type(rule).__name__
        raise ValueError(f"floor={floor!r}: {what} chooses its edges without regard to targets; leave per_target out")
    for layer in (x for pool in pools for x in pool.layers if x.least_per_target):
        if isinstance(rule, Frozen) and not bool(layer.layout.by_target(rule.edges[layer.name]).flatten(1).any(1).all()):
            raise ValueError(f"Frozen edges for {layer.name!r} leave a target without any, and its weight norm would be 0 / 0")
    shared = rule.redistributes or any(len(pool.layers) > 1 for pool in pools)
    if not shared and (floor.edges > 1 or floor.density):
        raise ValueError(f"floor={floor!r}: every layer has a budget of its own, so it would have no effect; leave it out")
    for pool in pools:
        for layer in pool.layers:
            layer.least = floor.of(layer.num_candidates) if shared else 0
            layer.least_per_target = max(layer.least_per_target, floor.per_target)
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


def _begin_together(schedule: DensitySchedule, pools: Sequence[Pool]) -> None:
    """Shares what a schedule begins with out over pools that are one budget from then on."""
    unit = pools[0].unit
    room = [pool.num_candidates // unit for pool in pools]
    total = schedule.num_edges(0, sum(pool.budget for pool in pools) // unit, sum(room))
    for pool, k in zip(pools, share_out(total, [pool.k for pool in pools], room), strict=True):
        pool.k = max(1, k) * unit


def _check_shards(layers: Sequence[WiredLayer], pools: Sequence[Pool]) -> None:
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


def _as_list(selectors: Selector | Sequence[Selector]) -> list[Selector]:
    return [selectors] if isinstance(selectors, (str, type, Defaults)) else list(selectors)


def _shape(found: Wirable) -> Shape:
    candidates = found.parameter.numel() if found.candidates is None else int(found.candidates.count_nonzero())
    return Shape(found.name, found.module_name, tuple(found.parameter.shape), candidates)


def _check_parameters(found: Sequence[Wirable], optimizer: Optimizer) -> None:
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


def _shares(
    rule: Rule,
    density: float | Mapping[str, float] | Budget | None,
    num_edges: int | Mapping[str, int] | None,
    shapes: Sequence[Shape],
) -> list[tuple[list[int], int]]:
    """The pools of layers and their budgets, from the rule or from the arguments of :func:`wire`."""
    by_rule = [k for k in (rule.num_edges(shape) for shape in shapes) if k is not None]
    if by_rule:
        if density is not None or num_edges is not None:
            raise ValueError(f"{type(rule).__name__} fixes its own number of edges; leave density and num_edges out")
        if len(by_rule) < len(shapes):
            raise ValueError(f"{type(rule).__name__} fixes the number of edges of some layers only; it must of all or none")
        return [([i], k) for i, k in enumerate(by_rule)]
    return _budget(density, num_edges).shares(shapes)


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
