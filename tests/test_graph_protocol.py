"""What a graph module offers: our graphs, and graphs of users that derive from nothing of ours."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dnw
from dnw.count import count, graphs_of, live_by_graph, num_live_nodes, parameter_of
from dnw.graphs import ContinuousTimeGraph, DiscreteTimeGraph, Graph, SequenceGraph, StaticGraph
from dnw.graphs._protocol import levels_of, node_functions_of
from dnw.view import GraphShape, SnapshotWriter, inside, read_snapshots, record


class Relay(nn.Module):
    """Two inputs 0 1, three relays 2 3 4, one output 5: a graph without cycles that shares no name with ours."""

    num_nodes, num_inputs, num_outputs = 6, 2, 1

    def __init__(self) -> None:
        super().__init__()
        self.ties = nn.Parameter(torch.randn(4, 5))  # into 2 3 4 5, from 0 1 2 3 4
        self.ears = nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False)
        self.mouths = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)

    def edge_candidates(self):
        return {"ties": self.node_matrix(torch.ones_like(self.ties, dtype=torch.bool))[2:, :5]}

    def node_matrix(self, weight):
        full = weight.new_zeros(6, 6)
        full[2:, :5] = weight
        full[2:5, 2:5] = 0
        return full

    def node_levels(self):
        return 2, 3, 1

    def node_functions(self):
        return [(self.mouths, range(2, 5)), (self.ears, range(2))]

    def forward(self, x):
        heard = self.ears(x.relu())
        said = self.mouths(F.conv2d(heard, self.ties[:3, :2, None, None]).relu())
        return F.conv2d(torch.cat([heard, said], 1), self.ties[3:, :, None, None])


class Echo(nn.Module):
    """Numbers: input 0, nodes 1 2, output 3; any edge but into the input, three times. It says no more than it has to."""

    num_nodes, num_inputs, num_outputs = 4, 1, 1

    def __init__(self) -> None:
        super().__init__()
        self.links = nn.Parameter(torch.randn(3, 4))

    def edge_candidates(self):
        return {"links": torch.ones_like(self.links, dtype=torch.bool)}

    def node_matrix(self, weight):
        return torch.cat([weight.new_zeros(1, 4), weight])

    def forward(self, x):
        nodes = F.pad(x, (0, 3))
        for _ in range(3):
            nodes = torch.cat([x, F.linear(nodes, self.links).relu()], 1)
        return nodes[:, 3:]


class Triangle(nn.Module):
    """Candidates and no more, as the least that a graph module is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def edge_candidates(self):
        return {"weight": torch.ones_like(self.weight, dtype=torch.bool).tril(-1)}

    def forward(self, x):
        return x @ self.weight.tril(-1).T


def mask_of(shape: tuple[int, int], *entries: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    for entry in entries:
        mask[entry] = True
    return mask


RELAY_EDGES = mask_of((4, 5), (0, 0), (3, 2), (1, 1), (3, 4))
"""0 -> 2 -> 5; 1 -> 3, which leads nowhere; 4 -> 5, which nothing reaches."""


@pytest.fixture
def relay() -> tuple[nn.Module, dnw.Wiring]:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(graph=Relay()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, dnw.wire(model, optimizer, rule=dnw.Frozen({"graph.ties": RELAY_EDGES}))


# --- our graphs ---


@pytest.mark.parametrize(
    ("graph", "levels", "functions"),
    [
        (StaticGraph((3, 4, 2), 2), (3, 4, 2, 2), [range(3), range(3, 7), range(7, 9)]),
        (StaticGraph((2, 3), 2, shared_outputs=True), (2, 3, 2), [range(2), range(2, 5)]),
        (DiscreteTimeGraph(9, 2, 3), None, [range(9)]),
        (ContinuousTimeGraph(9, 2, 3, maps=False), None, []),
        (SequenceGraph(DiscreteTimeGraph(9, 2, 3)).graph, None, [range(9)]),
    ],
    ids=["static", "shared", "discrete", "numbers", "sequence"],
)
def test_our_graphs_say_what_their_nodes_are(graph, levels, functions):
    assert isinstance(graph, Graph)
    assert levels_of(graph) == levels
    assert levels is None or sum(levels) == graph.num_nodes
    assert [nodes for _, nodes in node_functions_of(graph)] == functions
    for module, nodes in node_functions_of(graph):
        assert module(torch.zeros(1, len(nodes), 4, 4)).shape == (1, len(nodes), 4, 4)


def test_the_graph_of_a_sequence_is_the_one_inside():
    assert list(graphs_of(SequenceGraph(DiscreteTimeGraph(9, 2, 3, maps=False)))) == ["graph"]


# --- a user's graph ---


def test_a_users_graph_is_wired_and_exported_as_a_graph(relay):
    model, wiring = relay
    assert int(model.graph.edge_candidates()["ties"].sum()) == wiring["graph.ties"].num_candidates == 11
    edges = wiring["graph.ties"].edges()
    assert edges.is_graph
    assert [(target, source) for target, source, _ in edges.to_list()] == [(2, 0), (3, 1), (5, 2), (5, 4)]


def test_a_users_graph_that_is_cut_is_warned_of():
    model, rule = Relay(), dnw.Frozen({"ties": mask_of((4, 5), (0, 0), (3, 4))})
    with pytest.warns(UserWarning, match="no path of active edges leads from an input to an output of 'ties'"):
        dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), rule=rule)


def test_live_nodes_of_a_users_graph(relay):
    model, wiring = relay
    assert parameter_of("graph", model.graph) == "graph.ties"
    assert num_live_nodes(model, wiring) == (3, 6)
    for key in ("graph", "graph.ties"):
        assert live_by_graph(model, {key: RELAY_EDGES})["graph"].tolist() == [True, False, True, False, False, True]
    assert live_by_graph(model, {})["graph"].all()


def test_counts_of_a_users_graph(relay):
    model, wiring = relay
    pixels = 4 * 5
    rows = {row.name.removeprefix("graph."): row for row in count(model, (2, 4, 5), wiring).rows}
    ties, ears, mouths = (rows[name] for name in ("ties", "ears.weight", "mouths.weight"))
    assert (ties.dense, ties.nominal, ties.live) == ((3 * 2 + 5) * pixels, 4 * pixels, 2 * pixels)
    assert (ears.dense, ears.nominal, ears.live) == (2 * 9 * pixels, 2 * 9 * pixels, 9 * pixels)
    assert (mouths.dense, mouths.nominal, mouths.live) == (3 * 9 * pixels, 2 * 9 * pixels, 9 * pixels)


def test_counts_of_a_users_graph_with_cycles_are_those_between_live_nodes():
    cycles = mask_of((3, 4), (0, 0), (1, 1), (0, 2), (2, 2), (2, 3))  # 0 -> 1 <-> 2 -> 3, 3 -> 3
    alone = mask_of((3, 4), (0, 0), (2, 1), (1, 2), (1, 1))  # 0 -> 1 -> 3, and 1 -> 2 -> 2, which leads nowhere
    for mask, live in ((cycles, 5), (alone, 2)):
        (row,) = count(Echo(), (1,), {"links": mask}).rows
        assert (row.dense, row.active, row.live) == (3 * 12, int(mask.sum()), 3 * live)


def test_a_users_graph_is_recorded_with_what_is_inside_its_nodes(relay, tmp_path):
    model, wiring = relay
    images = torch.randn(3, 2, 8, 8)
    seen = inside(model, images, (0.0, 0.0), (1.0, 1.0))
    weights = torch.cat([model.graph.ears.weight, model.graph.mouths.weight]).detach().flatten(1)
    expected = torch.cat([weights, torch.zeros(1, 9)]).numpy().astype(np.float16)
    assert np.array_equal(seen["filters/graph"], expected)
    assert seen["maps/graph"].shape == (3, 6, 8, 8)
    returned = model(images).detach()
    scaled = (128 + 127 * returned / returned.abs().max()).round().to(torch.uint8)
    assert np.array_equal(seen["maps/graph"][:, 5:], scaled.numpy())
    SnapshotWriter(tmp_path).write(wiring, 0, 0.0, seen)
    one = record(model, read_snapshots(tmp_path), name="x")
    assert one.graphs == (GraphShape("graph", True, (2, 3, 1)),)
    assert sorted(zip(one.sources.tolist(), one.targets.tolist(), strict=True)) == [(0, 2), (1, 3), (2, 5), (4, 5)]
    assert one.live.tolist() == [[True, False, True, False, False, True]]
    assert one.filters.any(axis=2).tolist() == [[True] * 5 + [False]]
    assert one.maps[0][0].shape == (3, 6, 8, 8)


def test_a_users_graph_that_says_no_more_is_recorded_as_a_ring(tmp_path):
    model = Echo()
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=1.0)
    assert inside(model, torch.randn(2, 1), (0.0,), (1.0,)) == {}
    SnapshotWriter(tmp_path).write(wiring, 0, 0.0)
    one = record(model, read_snapshots(tmp_path), name="x")
    assert one.graphs == (GraphShape("", False, (1, 2, 1)),)
    assert (len(one.sources), one.live.all(), one.filters.size) == (12, True, 0)


def test_candidates_alone_are_enough_to_be_wired_and_counted():
    model = Triangle()
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), num_edges=5)
    assert not wiring["weight"].edges().is_graph
    assert graphs_of(model) == {}
    assert num_live_nodes(model, wiring) == (0, 0)
    assert count(model, (6,), wiring).rows[0].active == 5


def test_a_graph_that_names_no_parameter():
    class Nothing(Relay):
        def edge_candidates(self):
            return {}

    with pytest.raises(ValueError, match=r"Nothing.edge_candidates\(\) names no parameter"):
        live_by_graph(Nothing(), {})


# --- chains ---


def test_graphs_in_a_sequence_with_names_form_a_chain():
    chain = nn.Sequential(OrderedDict(first=StaticGraph((2,), 2), second=Relay()))
    first = mask_of((2, 2), (0, 0))  # input 0 -> output 0
    live = live_by_graph(chain, {"first": first})
    assert live["first"].tolist() == [True, False, True, False]
    assert live["second"].tolist() == [True, False, True, True, True, True]
    assert live_by_graph(nn.ModuleDict(chain.named_children()), {"first": first})["second"].all()
    rows = {row.name: row for row in count(chain, (2, 1, 1), {"first.weight": first}).rows}
    assert (rows["first.weight"].live, rows["second.ties"].live) == (1, 3 + 1 + 3)


def test_a_graph_that_stands_several_times_is_in_no_chain():
    """What it returns goes to several places, so that no one of them alone says what of it is wanted."""
    twice, last = StaticGraph((2,), 2), StaticGraph((2,), 2)
    of_last = mask_of((2, 2), (0, 0))
    live = live_by_graph(nn.Sequential(twice, twice, last), {"2": of_last})
    assert live["0"].all()
    assert live["2"].tolist() == [True, False, True, False]


def test_graphs_that_do_not_fit_are_in_no_chain():
    live = live_by_graph(nn.Sequential(StaticGraph((2,), 3), Echo()), {"0": mask_of((3, 2), (0, 0))})
    assert live["0"].tolist() == [True, False, True, False, False]
    assert live["1"].all()
