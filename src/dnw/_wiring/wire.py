"""``wire``: ties a rule to the parameters of a model and to the optimizer that trains them.

Contract: everything is checked before anything is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from dnw._checks import check_seed, listing
from dnw._rules.dormant import Dormant
from dnw._rules.estimators import DNW
from dnw._rules.pool import Pool
from dnw._rules.rule import Rule
from dnw._selection.budgets import Budget, Floor
from dnw._selection.patterns import Pattern
from dnw._selection.schedules import DensitySchedule
from dnw._wiring.allot import allot, begin_together, set_floors
from dnw._wiring.fits import check_layers, check_parameters, check_rule, check_units
from dnw._wiring.foreign import inside_launchers, refuse
from dnw._wiring.parameters import Defaults, Selector, find_parameters, unwrap_model
from dnw._wiring.wired_layer import WiredLayer, is_in_place
from dnw._wiring.wiring import Wiring
from dnw.graphs._paths import has_path
from dnw.graphs._protocol import Graph


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
    check_parameters(found, optimizer)
    if latent_dtype is not None and not isinstance(latent_dtype, torch.dtype):
        raise ValueError(f"latent_dtype={latent_dtype!r}: expected a dtype such as torch.float32")
    if dormant is not None and not isinstance(dormant, Dormant):
        raise ValueError(f"dormant: expected dnw.Dormant(...), got {dormant!r}")
    seed = check_seed(seed)
    check_rule(rule, schedule, pattern, found, optimizer)
    allotted = allot(rule, density, num_edges, pattern, found)
    dormant = dormant or rule.dormant
    layers = [WiredLayer(f, seed, latent_dtype, pattern, in_place=is_in_place(rule, dormant)) for f in found]
    pools = [Pool([layers[i] for i in indices], k, budget=k) for indices, k in allotted]
    check_layers(layers, pools)
    set_floors(Floor() if floor is None else floor, rule, pattern, pools)
    if schedule is not None:
        for pool in pools:
            pool.k = pool.num_edges_at(0, schedule)
    if rule.redistributes:
        check_units(rule, layers)
        if schedule is not None:
            begin_together(schedule, pools)
    wiring = Wiring(unwrap_model(model), optimizer, rule, layers, pools, left, dormant, schedule, check_ranks, check_finite)
    try:
        wiring._weights.pools.warn_of_empty(layers)
        _warn_of_cut(layers)
    except Warning:  # where warnings are errors
        wiring.remove(keep="latent")
        raise
    return wiring


def _warn_of_cut(layers: Sequence[WiredLayer]) -> None:
    """Warns of graphs whose outputs no input reaches: they compute the same of every input."""
    cut = []
    for layer in layers:
        graph = layer.module
        if layer.is_graph and layer.shard is None and isinstance(graph, Graph):
            assert layer.active is not None
            if not has_path(graph.node_matrix(layer.active), graph.num_inputs, graph.num_outputs):
                cut.append(layer.name)
    if cut:
        warnings.warn(
            f"no path of active edges leads from an input to an output of {listing(cut)}; with more edges, or another "
            "seed, there is one",
            stacklevel=3,
        )


def _as_list(selectors: Selector | Sequence[Selector]) -> list[Selector]:
    return [selectors] if isinstance(selectors, (str, type, Defaults)) else list(selectors)
