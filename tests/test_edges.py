"""A wiring as data."""

import json

import pytest
import torch
from torch import nn

import dnw
from dnw.graphs import StaticGraph


def wired_linear():
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, -4.0, 0.2], [3.0, 0.0, 0.3]]))
    return dnw.wire(layer, torch.optim.SGD(layer.parameters(), lr=0.1), num_edges=2)["weight"]


def test_edge_list_and_json():
    edges = wired_linear().edges()
    assert edges.to_list() == [(0, 1, -4.0), (1, 0, 3.0)]
    assert json.loads(edges.to_json()) == {
        "name": "weight",
        "shape": [2, 3],
        "is_graph": False,
        "edges": [[0, 1, -4.0], [1, 0, 3.0]],
    }
    assert len(edges) == 2


def test_whole_wiring_as_json():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), num_edges=2)
    layers = json.loads(wiring.to_json())["layers"]
    assert [(x["name"], len(x["edges"])) for x in layers] == [("0.weight", 2), ("1.weight", 2)]


def test_scipy():
    pytest.importorskip("scipy")
    csr = wired_linear().edges().to_scipy()
    assert csr.format == "csr"
    assert csr.toarray().tolist() == [[0.0, -4.0, 0.0], [3.0, 0.0, 0.0]]


def test_scipy_keeps_an_active_edge_of_weight_zero_and_reads_bfloat16():
    pytest.importorskip("scipy")
    layer = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.zeros_(layer.weight)
    wiring = dnw.wire(layer, torch.optim.SGD(layer.parameters(), lr=0.1), num_edges=5)
    assert wiring["weight"].edges().to_scipy().nnz == 5


def test_convolutions_are_matrices_of_their_flattened_sources():
    conv = nn.Conv2d(2, 3, 3)
    wiring = dnw.wire(conv, torch.optim.SGD(conv.parameters(), lr=0.1), num_edges=10)
    edges = wiring["weight"].edges()
    assert edges.shape == (3, 18)
    dense = torch.zeros(3, 18)
    dense[edges.target, edges.source] = edges.weight
    assert torch.equal(dense.view_as(conv.weight), conv.weight.detach())


def test_networkx():
    networkx = pytest.importorskip("networkx")
    plain = wired_linear().edges().to_networkx()
    assert plain.edges[("source", 1), ("target", 0)]["weight"] == -4.0
    graph = StaticGraph((2, 3), 2)
    wiring = dnw.wire(graph, torch.optim.SGD(graph.parameters(), lr=0.1), num_edges=9)
    found = wiring["weight"].edges().to_networkx()
    assert networkx.is_directed_acyclic_graph(found)
    assert found.number_of_edges() == 9
    adjacency = graph.node_matrix(wiring["weight"].active)
    assert sorted(found.edges) == sorted((s, t) for t, s in adjacency.nonzero().tolist())


def test_a_shared_weight_stands_for_both_of_its_edges():
    graph = StaticGraph((1, 1, 2), 1, shared_outputs=True)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[3, 0] = mask[3, 2] = True  # row 3 serves node 3, which reads level 0, and output 4, which reads all
    wiring = dnw.wire(graph, torch.optim.SGD(graph.parameters(), lr=0.1), rule=dnw.Frozen({"weight": mask}))
    edges = wiring["weight"].edges()
    assert edges.shape == (5, 5)
    weights = graph.weight.detach()
    assert edges.to_list() == [(3, 0, weights[3, 0].item()), (4, 0, weights[3, 0].item()), (4, 2, weights[3, 2].item())]


def test_summary_totals():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    summary = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5).summary()
    assert (summary.candidates, summary.active, summary.dense) == (6, 3, 6)
    assert summary.rows[0].density == 0.5
