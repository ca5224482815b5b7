"""Live nodes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dnw
from dnw.count import live_nodes, num_live_nodes
from dnw.graphs import StaticGraph


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
