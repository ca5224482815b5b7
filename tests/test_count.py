"""Live nodes, parameters and multiply-adds."""

import numpy as np
import pytest
import torch
from helpers import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dnw
from dnw.count import count, live_by_graph, live_nodes, num_live_nodes, published_count
from dnw.graphs import StaticGraph
from dnw.models import GraphChain, mobilenet_v1, tiny_cifar10, tiny_cifar10_continuous, tiny_cifar10_discrete


def nodes(num: int, chosen: set[int]) -> torch.Tensor:
    return torch.tensor([i in chosen for i in range(num)])


def adjacency(num: int, edges: list[tuple[int, int]]) -> torch.Tensor:
    mask = torch.zeros(num, num, dtype=torch.bool)
    for source, target in edges:
        mask[target, source] = True
    return mask


def test_literal_graph():
    edges = [(0, 2), (2, 5), (3, 5), (2, 4)]  # 3 has no input, 4 leads nowhere, 1 is read by nobody
    live = live_nodes(adjacency(6, edges), nodes(6, {0, 1}), nodes(6, {5}))
    assert live.tolist() == [True, False, True, False, False, True]


def test_cycles_and_self_edges():
    edges = [(0, 1), (1, 2), (2, 1), (2, 2), (2, 3), (4, 4), (5, 4)]
    live = live_nodes(adjacency(6, edges), nodes(6, {0}), nodes(6, {3}))
    assert live.tolist() == [True, True, True, True, False, False]


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 7), st.data())
def test_equals_paths_found_by_matrix_powers(num, data):
    pairs = st.tuples(st.integers(0, num - 1), st.integers(0, num - 1))
    mask = adjacency(num, data.draw(st.lists(pairs, max_size=12)))
    inputs = nodes(num, data.draw(st.sets(st.integers(0, num - 1), min_size=1)))
    outputs = nodes(num, data.draw(st.sets(st.integers(0, num - 1), min_size=1)))
    closure = torch.eye(num)
    for _ in range(num):
        closure = ((closure + mask.float() @ closure) > 0).float()
    expected = (closure @ inputs.float() > 0) & (closure.T @ outputs.float() > 0)
    assert torch.equal(live_nodes(mask, inputs, outputs), expected)


def test_live_nodes_of_a_wired_graph():
    graph = StaticGraph((2, 2), 1)  # nodes 0 1 | 2 3 | 4
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 0] = mask[2, 2] = mask[2, 3] = True  # 0 -> 2 -> 4, and 3 -> 4 without anything into 3
    wiring = dnw.wire(graph, torch.optim.SGD(graph.parameters(), lr=0.1), rule=dnw.Frozen({"weight": mask}))
    assert num_live_nodes(graph, wiring) == (3, 5)


def test_a_model_without_graphs_has_no_nodes():
    model = torch.nn.Linear(3, 3)
    assert num_live_nodes(model, dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5)) == (0, 0)


# --- chains of graphs, dynamic graphs ---


def test_live_nodes_of_a_chain():
    """Two graphs of two inputs, two inner nodes and two outputs each, in which most paths end."""
    chain = nn.Sequential(dnw.graphs.StaticGraph((2, 2), 2), dnw.graphs.StaticGraph((2, 2), 2))
    first = torch.zeros(4, 4, dtype=torch.bool)
    first[0, 0] = first[2, 2] = True  # input 0 -> inner 0 -> output 0
    first[3, 1] = True  # input 1 -> output 1, which the second graph does not read
    first[1, 0] = True  # input 0 -> inner 1, which leads nowhere
    second = torch.zeros(4, 4, dtype=torch.bool)
    second[0, 0] = second[3, 2] = True  # input 0 -> inner 0 -> output 1
    second[2, 3] = True  # inner 1, which nothing reaches, -> output 0
    live = live_by_graph(chain, {"0.weight": first, "1.weight": second})
    assert live["0"].tolist() == [True, False, True, False, True, False]
    assert live["1"].tolist() == [True, False, True, False, False, True]
    alone = live_by_graph(nn.ModuleList(chain), {"0.weight": first, "1.weight": second})
    assert alone["0"].tolist() == [True, True, True, False, True, True]


def test_live_nodes_of_a_dynamic_graph_with_cycles():
    graph = dnw.graphs.DiscreteTimeGraph(6, 1, 1, maps=False)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[1, 0] = mask[2, 1] = mask[1, 2] = mask[5, 2] = True  # 0 -> 1 <-> 2 -> 5
    mask[3, 3] = mask[4, 0] = True  # by itself; a dead end
    assert live_by_graph(graph, {"weight": mask})[""].tolist() == [True, True, True, False, False, True]


# --- multiply-adds ---


@pytest.mark.parametrize(("width", "parameters", "products"), [(0.25, 0.470, 41.0), (0.5, 1.332, 149.5), (1.0, 4.232, 568.7)])
def test_plain_mobilenets_have_the_known_counts(width, parameters, products):
    found = count(mobilenet_v1(width=width), (3, 224, 224))
    assert found.parameters / 1e6 == pytest.approx(parameters, abs=6e-4)
    assert found.dense / 1e6 == pytest.approx(products, abs=0.06)
    assert found.dense == found.nominal == found.live


def test_any_module_counts():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, 6, 2, batch_first=True)
            self.attention = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)

        def forward(self, x):
            return self.attention(self.rnn(x)[0])

    model = Mixed()
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.25)
    found = count(model, (7, 5), wiring)
    rows = {row.name: row for row in found.rows}
    assert rows["rnn.weight_ih_l0"].dense == 7 * 24 * 5
    assert rows["rnn.weight_hh_l1"].dense == 7 * 24 * 6
    assert rows["attention.self_attn.in_proj_weight"].dense == 7 * 18 * 6
    assert rows["attention.self_attn.in_proj_weight"].nominal == 7 * 27
    assert rows["attention.linear1.weight"].nominal == 7 * 18
    assert rows["attention.self_attn"].dense == 2 * 7 * 7 * 6  # scores and their use, without a parameter
    assert found.active == found.parameters - wiring.num_candidates + wiring.num_active
    assert "total, with norms and biases" in str(found)


def test_counts_of_a_static_graph_edge_by_edge():
    graph = dnw.graphs.StaticGraph((3, 4), 2)
    wiring = dnw.wire(graph, torch.optim.SGD(graph.parameters(), lr=0.1), num_edges=8)
    rows = {row.name: row for row in count(graph, (3, 5, 5), wiring).rows}
    matrix = wiring["weight"].edges()
    live = live_by_graph(graph, {"weight": wiring["weight"].active})[""]
    between = sum(bool(live[t] and live[s]) for t, s, _ in matrix.to_list())
    assert (rows["weight"].dense, rows["weight"].nominal, rows["weight"].live) == (25 * 26, 25 * 8, 25 * between)
    sending = {s for _, s, _ in matrix.to_list()}
    for level, nodes in enumerate((range(3), range(3, 7))):
        row = rows[f"nodes.{level}.conv.weight"]
        assert row.dense == 25 * 9 * len(nodes)
        assert row.nominal == 25 * 9 * sum(v in sending for v in nodes)
        assert row.live == 25 * 9 * sum(v in sending and bool(live[v]) for v in nodes)


def test_shared_outputs_count_an_entry_once():
    model = tiny_cifar10()
    assert next(r.dense for r in count(model, (3, 32, 32)).rows if r.name == "graph.weight") == 264_960 * 64
    graph = dnw.graphs.StaticGraph((2, 3), 2, shared_outputs=True)
    mask = graph.edge_candidates()["weight"]
    assert graph.levels.num_edges_between(mask, torch.ones(7, dtype=torch.bool)) == int(mask.sum())
    assert graph.levels.num_edges_between(mask, torch.arange(7) < 5) == 6  # the inner nodes' own
    only_first_output = torch.ones(7, dtype=torch.bool)
    only_first_output[[3, 4, 6]] = False  # rows 3 and 4 serve outputs 5 and 6
    assert graph.levels.num_edges_between(mask, only_first_output) == 2 + 3  # into node 2, and into output 5 from nodes 0, 1, 2


@pytest.mark.parametrize("make", [tiny_cifar10_discrete, tiny_cifar10_continuous])
def test_dynamic_graphs_count_every_evaluation(make):
    times = 5 if make is tiny_cifar10_discrete else 11
    found = count(make(), (3, 32, 32), evaluations=11)
    assert next(r.dense for r in found.rows if r.name == "graph.weight") == times * 640_000 * 64
    assert next(r.dense for r in found.rows if r.name == "graph.conv.weight") == times * 7200 * 64
    assert found.evaluations == ({} if make is tiny_cifar10_discrete else {"graph": 11})


def chain_and_wiring(width: float, seed: int = 0) -> tuple[GraphChain, dnw.Wiring]:
    model = GraphChain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, dnw.wire(model, optimizer, num_edges=model.num_edges(width), rule=dnw.RandomGraph(), seed=seed)


@pytest.mark.parametrize(("width", "products", "parameters"), [(0.225, 55.7, 1.2), (0.51, 169.6, 1.886)])
def test_random_chains_are_as_large_as_published(width, products, parameters):
    model, wiring = chain_and_wiring(width)
    found = count(model, (3, 224, 224), wiring)
    assert found.nominal / 1e6 == pytest.approx(products, rel=0.02)
    assert found.live <= found.nominal
    published = published_count(model, {n: wiring[n].active for n in wiring}, width=width)
    assert published[0] / 1e6 == pytest.approx(products, rel=0.02)
    assert published[1] / 1e6 == pytest.approx(parameters, rel=0.04)
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert found.active - norms == pytest.approx(published[1], rel=0.01)


@pytest.mark.data
def test_reproduces_the_originals_own_count():
    with np.load(reference("imagenet_mobilenetv1_dnw_small_x225.npz"), allow_pickle=False) as archive:
        recorded = {k: archive[k] for k in archive.files}
    model = GraphChain(learned_classifier=True, rank_all_entries=True)
    masks = {
        f"graphs.{i}.weight": torch.from_numpy(recorded[f"state.layers.{i}.graph.weight"][:, :, 0, 0]) != 0 for i in range(5)
    }
    assert published_count(model, masks, width=0.225) == (int(recorded["macs"]), int(recorded["params"]))


def test_bad_counts():
    with pytest.raises(ValueError, match="the model does not take an input of 4x32x32"):
        count(tiny_cifar10(), (4, 32, 32))
    with pytest.raises(ValueError, match=r"active edges for 'graph.w' of shape \(2,\), which fit no parameter"):
        count(tiny_cifar10(), (3, 32, 32), {"graph.w": torch.ones(2)})
    model = tiny_cifar10()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    count(model, (3, 32, 32))
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert model.training
