"""Static neural graphs against an evaluation edge by edge."""

from functools import partial

import pytest
import torch
from helpers import slow_static_graph
from torch import nn

import dnw
from dnw.graphs import Levels, StaticGraph

INSTANCE = partial(nn.InstanceNorm2d, affine=True)
GRAPHS = {
    "levels": lambda: StaticGraph((3, 4, 2), 3),
    "instance_norm": lambda: StaticGraph((2, 3, 3), 2, norm=INSTANCE),
    "no_norm": lambda: StaticGraph((2, 3), 2, norm=None),
    "inputs_only": lambda: StaticGraph((3,), 2),
    "plain_dag": lambda: StaticGraph((1, 1, 1, 1, 1, 1), 1),
    "stride": lambda: StaticGraph((2, 3), 2, stride=2),
    "shared_outputs": lambda: StaticGraph((2, 3, 4), 3, norm=INSTANCE, shared_outputs=True),
    "all_shared": lambda: StaticGraph((2, 3, 4), 4, shared_outputs=True),
}


def randomise(graph: StaticGraph) -> None:
    """Norm statistics and biases that are not trivial."""
    for module in graph.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("wired", [False, True])
@pytest.mark.filterwarnings("ignore:no path of active edges")
def test_forward_equals_the_edge_by_edge_loop(name, wired):
    torch.manual_seed(0)
    graph = GRAPHS[name]().eval()
    randomise(graph)
    mask = graph.edge_candidates()["weight"]
    if wired:
        mask = dnw.wire(graph, torch.optim.SGD(graph.parameters(), lr=0.1), density=0.4)["weight"].active
    x = torch.randn(2, graph.levels.num_inputs, 6, 5)
    expected = slow_static_graph(graph, mask, x)
    torch.testing.assert_close(graph(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GRAPHS)
def test_gradients_equal_those_of_the_edge_by_edge_loop(name):
    torch.manual_seed(1)
    graph = GRAPHS[name]().eval()
    randomise(graph)
    x = torch.randn(2, graph.levels.num_inputs, 5, 5, requires_grad=True)
    mask = graph.edge_candidates()["weight"]
    probe = torch.randn_like(graph(x))
    parameters = [x, *graph.parameters()]
    fast = torch.autograd.grad((graph(x) * probe).sum(), parameters)
    slow = torch.autograd.grad((slow_static_graph(graph, mask, x) * probe).sum(), parameters)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", GRAPHS)
def test_candidates_are_the_entries_that_the_forward_pass_reads(name):
    graph = GRAPHS[name]().double().eval()
    for parameter in graph.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)  # all positive, so that no ReLU hides an edge
    for norm in (m.norm for m in graph.nodes if not isinstance(m.norm, nn.Identity)):
        nn.init.constant_(norm.bias, 5.0)
    graph(torch.rand(2, graph.levels.num_inputs, 8, 8, dtype=torch.float64)).sum().backward()
    assert torch.equal(graph.weight.grad != 0, graph.edge_candidates()["weight"])


def test_published_numbers_of_candidates():
    tiny = Levels((32, 192, 192, 192, 192), 100, shared_outputs=True)
    assert int(tiny.candidates().sum()) == 264_960
    stages = [((32,), 64), ((64, 128), 128), ((128, 256), 256), ((256, *[512] * 5), 512), ((512, 1024), 1024)]
    assert [int(Levels(s, o).candidates().sum()) for s, o in stages] == [2048, 32768, 131072, 4718592, 2097152]
    assert [Levels(s, o).num_sources for s, o in stages] == [32, 192, 384, 2816, 1536]


def test_plain_dag_candidates_are_the_lower_triangle():
    assert Levels((1, 1, 1, 1), 1).candidates().tolist() == torch.ones(4, 4).tril().bool().tolist()


def test_adjacency_counts_a_shared_weight_for_both_of_its_targets():
    levels = Levels((1, 1, 2), 1, shared_outputs=True)  # nodes 0 | 1 | 2 3 | output 4, row 3 serves 3 and 4
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[3, 0] = mask[3, 2] = mask[0, 1] = True
    assert levels.node_matrix(mask).nonzero().tolist() == [[3, 0], [4, 0], [4, 2]]


def test_initialisation():
    torch.manual_seed(0)
    weight = StaticGraph((50, 50), 20).weight
    assert weight.shape == (70, 100)
    assert weight.abs().max() <= 0.1
    assert weight.abs().max() > 0.099


def test_rank_all_entries():
    graph = StaticGraph((2, 3), 2, rank_all_entries=True)
    assert graph.edge_candidates()["weight"].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 0), 2), "every level needs at least one node"),
        (((), 2), "every level needs at least one node"),
        (((3, 2), 0), "needs at least one output"),
    ],
)
def test_bad_levels(arguments, message):
    with pytest.raises(ValueError, match=message):
        StaticGraph(*arguments)


def test_bad_shared_outputs_and_input():
    with pytest.raises(ValueError, match="among the 2 nodes of the last level"):
        StaticGraph((3, 2), 3, shared_outputs=True)
    with pytest.raises(ValueError, match=r"\[batch, 3, height, width\], got a tensor of shape \(2, 4, 5, 5\)"):
        StaticGraph((3,), 1)(torch.zeros(2, 4, 5, 5))
