"""The generators of randomly wired networks, over the levels of static graphs."""

import pytest
import torch

from dnw.graphs import StaticGraph, barabasi_albert, watts_strogatz
from dnw.models import GraphChain, tiny_cifar10
from dnw.recipes import RECIPES
from dnw.train import override
from dnw.train._network import make_network

DRAWS = [watts_strogatz, barabasi_albert]
GRAPHS = {
    "levels": lambda: StaticGraph([8, 12, 12], 10),
    "shared outputs": lambda: StaticGraph([8, 12, 12], 6, shared_outputs=True),
    "tiny_cifar10": lambda: tiny_cifar10().graph,
    "whatever is ranked": lambda: StaticGraph([4, 16, 16], 4, rank_all_entries=True),
    "one level": lambda: StaticGraph([7], 5),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_exactly_so_many_candidates_shared_out_evenly(draw, name, share):
    graph = GRAPHS[name]()
    candidates = graph.levels.candidates()
    num_edges = max(1, int(share * int(candidates.sum())))
    edges = draw(graph, num_edges, seed=3)
    assert edges.dtype == torch.bool
    assert int(edges.sum()) == num_edges
    assert not (edges & ~candidates).any()
    of_targets, room = edges.sum(1), candidates.sum(1)
    open_ = of_targets[of_targets < room]
    assert open_.numel() == 0 or int(open_.max()) - int(open_.min()) <= 1
    assert torch.equal(edges, draw(graph, num_edges, seed=3))
    if share == 0.3:
        assert not torch.equal(edges, draw(graph, num_edges, seed=4))


def test_the_lattice_reads_the_nearest_sources_and_rewiring_leaves_it():
    graph = StaticGraph([16, 16, 16], 16)
    lattice = watts_strogatz(graph, 3 * 48, rewire=0.0)
    nodes = graph.node_matrix(lattice)
    for level in (1, 2, 3):  # each target reads the three beside it of the level before, around the ring
        for place in range(16):
            read = {int(u) - 16 * (level - 1) for u in nodes[16 * level + place].nonzero()}
            assert read == {(place - 1) % 16, place, (place + 1) % 16}
    moved = [int((watts_strogatz(graph, 3 * 48, rewire=p) & ~lattice).sum()) for p in (0.25, 0.75, 1.0)]
    assert moved == sorted(moved)
    assert moved[-1] == 3 * 48
    assert 0.15 < moved[0] / (3 * 48) < 0.35


def test_who_is_read_is_read_more():
    graph = StaticGraph([40, 40, 40, 40], 40)
    degree = barabasi_albert(graph, 640).sum(0).float()
    lattice = watts_strogatz(graph, 640, rewire=1.0).sum(0).float()
    assert degree[:40].mean() > degree[40:80].mean() > degree[80:120].mean()  # who came first
    assert degree.std() > 1.3 * lattice.std()


@pytest.mark.parametrize("draw", DRAWS)
def test_budgets_that_do_not_fit(draw):
    graph = StaticGraph([4], 3)
    for number in (0, 13, True):
        with pytest.raises(ValueError, match="allowed is a whole number from 1 to 12"):
            draw(graph, number)
    with pytest.raises(ValueError, match="allowed is a probability from 0 to 1"):
        watts_strogatz(graph, 5, rewire=1.5)


@pytest.mark.parametrize("edges", ["watts_strogatz", "barabasi_albert"])
def test_recipes_with_such_edges(edges):
    tiny = make_network(override(RECIPES["cifar10"](), ["rule=frozen", f"edges={edges}", "seeds=1"]), 10)
    assert tiny.wiring.num_active == 32_000
    assert not torch.equal(
        tiny.wiring["graph.weight"].active,
        make_network(override(RECIPES["cifar10"](), ["rule=frozen", f"edges={edges}", "seeds=2"]), 10)
        .wiring["graph.weight"]
        .active,
    )
    chain = override(RECIPES["cifar10_mobilenet_dnw_x225"](), ["rule=frozen", f"edges={edges}", "width=0.225"])
    wiring = make_network(chain, 10).wiring
    assert {name: int(parameter.active.sum()) for name, parameter in wiring.items()} == GraphChain(10).num_edges(0.225)
    for change, message in (
        (["model=mobilenet_v1", "rule=frozen"], "drawn over the levels of static graphs"),
        (["rule=frozen", "rank_all_entries=true"], "leave rank_all_entries out"),
        (["rule=frozen", "pattern=4x4"], "chooses no edges; leave the pattern out"),
        (["rule=dnw"], "rule=dnw finds its own edges"),
    ):
        with pytest.raises(ValueError, match=message):
            override(RECIPES["cifar10"](), [f"edges={edges}", *change])
