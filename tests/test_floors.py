"""What every layer and every target keeps at least, whatever a common budget would give it."""

import copy
import itertools

import pytest
import torch
from helpers import rule_cases, small_net, train_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dnw
from dnw._selection.top_k import Ranking, top_k_each


def slow_with_floors(
    rows: list[list[list[float]]],
    k: int,
    candidates: list[list[list[bool]]],
    least: list[int],
    per_target: list[int],
    per_source: list[int],
) -> list[list[list[bool]]]:
    """By sorting: the largest of each row and column, then of each layer, then of all; the lowest index first among equals."""
    entries = [
        (-abs(rows[i][r][c]), i, r, c)
        for i, r, c in ((i, r, c) for i, layer in enumerate(rows) for r, row in enumerate(layer) for c in range(len(row)))
        if candidates[i][r][c]
    ]
    entries.sort()
    chosen: set[tuple] = set()
    for i, layer in enumerate(rows):
        for r in range(len(layer)):
            chosen |= set([e for e in entries if e[1:3] == (i, r)][: per_target[i]])
        for c in range(len(layer[0])):
            chosen |= set([e for e in entries if (e[1], e[3]) == (i, c)][: per_source[i]])
        rest = [e for e in entries if e[1] == i and e not in chosen]
        chosen |= set(rest[: max(0, least[i] - sum(e[1] == i for e in chosen))])
    chosen |= set([e for e in entries if e not in chosen][: k - len(chosen)])
    places = {e[1:] for e in chosen}
    return [[[(i, r, c) in places for c in range(len(row))] for r, row in enumerate(layer)] for i, layer in enumerate(rows)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_sorting_with_floors(data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3))
    value = st.sampled_from([0.0, 0.5, -0.5, 1.0, 2.0, -3.0])
    rows = [[[data.draw(value) for _ in range(c)] for _ in range(r)] for r, c in shapes]
    may = [[[data.draw(st.booleans()) for _ in range(c)] for _ in range(r)] for r, c in shapes]
    number = [sum(map(sum, layer)) for layer in may]
    if not all(number):
        return
    per_target = [data.draw(st.integers(0, 2)) for _ in shapes]
    per_source = [data.draw(st.integers(0, 2)) for _ in shapes]
    of_targets = [sum(min(n, sum(row)) for row in layer) for layer, n in zip(may, per_target, strict=True)]
    of_sources = [sum(min(n, sum(x)) for x in zip(*layer, strict=True)) for layer, n in zip(may, per_source, strict=True)]
    least = [data.draw(st.integers(0, n)) for n in number]
    needed = sum(max(a, min(b + c, n)) for a, b, c, n in zip(least, of_targets, of_sources, number, strict=True))
    k = data.draw(st.integers(max(1, needed), sum(number)))
    scores = [torch.tensor(layer) for layer in rows]
    masks = [torch.tensor(layer) for layer in may]
    (found,) = top_k_each([Ranking(scores, k, masks, least=least, least_per_target=per_target, least_per_source=per_source)])
    assert [mask.tolist() for mask in found] == slow_with_floors(rows, k, may, least, per_target, per_source)


def uneven_net() -> nn.Sequential:
    """A network whose last layer has weights much smaller than the others'."""
    net = small_net()
    with torch.no_grad():
        net[7].weight.mul_(1e-3)
    return net


def test_a_common_budget_leaves_no_layer_without_edges():
    net = uneven_net()
    wiring = dnw.wire(net, torch.optim.SGD(net.parameters(), lr=0.1), dnw.Global(0.1))
    assert wiring["7.weight"].num_active == 1
    assert wiring.num_active == dnw.num_edges(0.1, wiring.num_candidates)
    assert net[7].weight.count_nonzero() == 1


def test_without_a_floor_an_empty_layer_is_named():
    net = uneven_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"'7\.weight' has no active edge"):
        wiring = dnw.wire(net, optimizer, dnw.Global(0.1), floor=dnw.Floor(edges=0))
    assert wiring["7.weight"].num_active == 0


def test_a_layer_that_becomes_empty_is_named_once():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wiring = dnw.wire(net, optimizer, dnw.Global(0.1), floor=dnw.Floor(edges=0))
    assert all(p.num_active for p in wiring.values())
    wiring["7.weight"].latent = wiring["7.weight"].latent * 1e-6
    with pytest.warns(UserWarning, match=r"'7\.weight' has no active edge") as warned:
        train_steps(net, optimizer, range(3))
    assert sum("no active edge" in str(w.message) for w in warned) == 1


FLOORS = [dnw.Floor(), dnw.Floor(edges=3, density=0.05), dnw.Floor(per_target=1), dnw.Floor(per_target=1, per_source=1)]


@pytest.mark.parametrize("floor", FLOORS, ids=repr)
@pytest.mark.parametrize("name", ["dnw", "iht", "no_update", "magnitude_pruning", "random", "set", "rigl", "sparse_momentum"])
def test_floors_hold_at_every_step(name, floor):
    net = uneven_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    rule = rule_cases(net)[name].rule
    wiring = dnw.wire(net, optimizer, dnw.Global(0.3), rule=rule, floor=floor)
    total = dnw.num_edges(0.3, wiring.num_candidates)
    for step in range(6):
        for parameter in wiring.values():
            assert parameter.num_active >= floor.of(parameter.num_candidates)
            assert int(parameter.active.flatten(1).sum(1).min()) >= floor.per_target
            assert int(parameter.active.transpose(0, 1).flatten(1).sum(1).min()) >= floor.per_source
        assert wiring.num_active == total
        train_steps(net, optimizer, range(step, step + 1))


def test_floors_travel_with_copies_and_checkpoints():
    net = uneven_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    wiring = dnw.wire(net, optimizer, dnw.Global(0.2), floor=dnw.Floor(per_target=1))
    copied, its_optimizer, its_wiring = copy.deepcopy((net, optimizer, wiring))
    assert train_steps(net, optimizer, range(4)) == train_steps(copied, its_optimizer, range(4))
    for name in wiring:
        assert torch.equal(wiring[name].active, its_wiring[name].active)
        assert bool(its_wiring[name].active.flatten(1).any(1).all())


def test_an_average_keeps_the_floors():
    net = uneven_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    wiring = dnw.wire(net, optimizer, dnw.Global(0.1))
    average = torch.optim.swa_utils.AveragedModel(net)
    for step in range(3):
        train_steps(net, optimizer, range(step, step + 1))
        average.update_parameters(net)
    wiring.project(average)
    assert average.module[7].weight.count_nonzero() >= 1


def test_targets_of_a_layer_with_its_own_budget_keep_edges():
    net = small_net()
    with torch.no_grad():
        net[5].weight[2:5] *= 1e-4
    wiring = dnw.wire(net, torch.optim.SGD(net.parameters(), lr=0.1), density=0.1, floor=dnw.Floor(per_target=2), include="5")
    assert int(wiring["5.weight"].active.sum(1).min()) == 2
    assert wiring["5.weight"].num_active == dnw.num_edges(0.1, 32 * 16)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(12, 5),
        nn.Conv1d(12, 8, 3, groups=4),
        nn.ConvTranspose1d(6, 8, 3),
        nn.ConvTranspose1d(12, 8, 3, groups=2),
    ],
    ids=["linear", "grouped", "transposed", "transposed and grouped"],
)
def test_sources_keep_edges_whichever_way_round_the_layer_is(layer):
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape) ** 8)
    model = nn.Sequential(layer)
    wiring = dnw.wire(
        model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5, floor=dnw.Floor(per_target=1, per_source=2)
    )
    edges = wiring["0.weight"].edges()
    sources = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    kernel = layer.weight[0, 0].numel()
    assert (edges.source // kernel).bincount(minlength=sources).min() >= 2
    assert edges.target.unique().numel() == (layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)
    assert wiring.num_active == dnw.num_edges(0.5, layer.weight.numel())


def test_biases_have_no_sources():
    model = nn.Sequential(nn.Linear(4, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    floor = dnw.Floor(per_target=1, per_source=1)
    wiring = dnw.wire(model, optimizer, density=0.5, include=["0.weight", "0.bias"], floor=floor)
    assert wiring["0.bias"].num_active == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": dnw.Global(0.002)}, r"2 edges are too few for what is kept at least, 3"),
        ({"density": 0.05, "floor": dnw.Floor(per_target=2)}, r"'0\.weight'.*raise the density, lower the floor"),
        ({"density": 0.1, "floor": dnw.Floor(density=0.05)}, "a budget of its own, so it would have no effect"),
        ({"density": 0.1, "floor": 3}, r"expected dnw\.Floor"),
        ({"density": 0.5, "floor": dnw.Floor(per_target=1), "pattern": dnw.Channels()}, "without regard to targets"),
        ({"density": 0.5, "floor": dnw.Floor(per_source=1), "pattern": dnw.Channels()}, "to sources; leave per_source out"),
        ({"density": 0.1, "floor": dnw.Floor(per_source=4)}, r"'5\.weight': 51 edges are too few for .*, 128"),
        ({"floor": dnw.Floor(per_target=1), "rule": dnw.Complete()}, "Complete chooses its edges without regard to targets"),
    ],
)
def test_floors_that_do_not_fit_are_refused_and_nothing_is_changed(arguments, message):
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        dnw.wire(net, torch.optim.SGD(net.parameters(), lr=0.1), **arguments)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "arguments", [{"edges": -1}, {"edges": True}, {"density": 1.5}, {"per_target": 0.5}, {"density": "a"}], ids=repr
)
def test_impossible_floors_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        dnw.Floor(**arguments)


def test_floors_of_all_kinds_of_layers():
    assert [dnw.Floor(edges=2, density=0.1).of(n) for n in (1, 10, 100)] == [1, 2, 10]
    assert all(dnw.Floor(edges=e, density=d).of(n) <= n for e, d, n in itertools.product((0, 5), (0, 0.5, 1), (1, 4, 9)))


def test_a_graph_without_a_path_is_named():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), dnw.graphs.StaticGraph((4, 50), 4))
    with pytest.warns(UserWarning, match=r"no path of active edges leads from an input to an output of '1\.weight'"):
        dnw.wire(net, torch.optim.SGD(net.parameters(), lr=0.1), num_edges=1, rule=dnw.RandomGraph(), seed=1)


@pytest.mark.filterwarnings("error:no path of active edges")
def test_where_warnings_are_errors_a_graph_without_a_path_is_not_wired():
    graph = dnw.graphs.StaticGraph((4, 50), 4)
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    with pytest.raises(UserWarning, match="no path of active edges"):
        dnw.wire(graph, optimizer, num_edges=1, rule=dnw.RandomGraph(), seed=1)
    assert list(dnw.wire(graph, optimizer, density=0.9)) == ["weight"]


def test_a_graph_with_one_path_is_not():
    graph = dnw.graphs.StaticGraph((4, 50), 4)
    edges = torch.zeros_like(graph.weight, dtype=torch.bool)
    edges[0, 0], edges[50, 4] = True, True  # from the first input to node 4, and from there to the first output
    wiring = dnw.wire(graph, torch.optim.SGD(graph.parameters(), lr=0.1), rule=dnw.Frozen({"weight": edges}))
    assert wiring.num_active == 2


def test_a_floor_is_refused_where_edges_of_each_sign_are_pruned_apart_in_a_common_budget():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"SET\(by_sign=True\) prunes positive and negative edges of all layers"):
        dnw.wire(model, base, dnw.Global(0.5), rule=dnw.SET(by_sign=True), floor=dnw.Floor(edges=10))
    dnw.wire(model, base, dnw.Global(0.5), rule=dnw.SET(by_sign=True))


def test_a_layer_keeps_whole_units_of_a_pattern():
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(4)])
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="48 edges are too few for what is kept at least, 64"):
        dnw.wire(model, base, dnw.Global(3 / 16), pattern=dnw.Blocks(4, 4))
    wiring = dnw.wire(model, base, dnw.Global(4 / 16), pattern=dnw.Blocks(4, 4))
    assert [edges.num_active for edges in wiring.values()] == [16] * 4


def test_layers_begin_with_what_they_keep_at_least():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 1000, bias=False))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wiring = dnw.wire(
        model,
        base,
        num_edges={"0": 100, "1": 100},
        rule=dnw.SparseMomentum(every=1000),
        floor=dnw.Floor(edges=100),
        schedule=dnw.DensitySchedule(10, initial=0.5),
    )
    assert [edges.num_active for edges in wiring.values()] == [100, 4950]
