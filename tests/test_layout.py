"""Which side of a weight its targets are on: exported edges, patterns and rules read every layer the same way round."""

import copy

import pytest
import torch
import torch.nn.functional as F
from processes import GROUP, on_processes
from torch import Tensor, nn

import dnw
from dnw._rules.layer import Layer
from dnw._selection.layout import Layout
from dnw._selection.shards import shard_of


class Conv1D(nn.Module):
    """The linear layer of GPT-2 as transformers has it: ``[sources, targets]``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


LAYERS = {
    "linear": lambda: nn.Linear(6, 8, bias=False),
    "conv1d": lambda: Conv1D(8, 6),
    "conv": lambda: nn.Conv1d(6, 8, 3, padding=1, bias=False),
    "grouped": lambda: nn.Conv1d(6, 8, 3, padding=1, groups=2, bias=False),
    "transposed": lambda: nn.ConvTranspose1d(6, 8, 3, bias=False),
    "transposed_grouped": lambda: nn.ConvTranspose1d(6, 8, 3, groups=2, bias=False),
    "transposed_2d": lambda: nn.ConvTranspose2d(6, 8, (1, 3), bias=False),
}


def wired(layer: nn.Module, **arguments) -> dnw.Wiring:
    return dnw.wire(layer, torch.optim.SGD(layer.parameters(), lr=0.1), **arguments)


@pytest.mark.parametrize("kind", LAYERS)
def test_exported_edges_join_the_channels_that_the_layer_joins(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    edges = wired(layer, density=0.1)["weight"].edges()
    place = layer.weight[0, 0].numel()
    assert edges.shape == (8, 6 * place)
    joined = torch.zeros(8, 6, dtype=torch.bool)
    joined[edges.target, edges.source // place] = True
    for source in range(6):
        channels = torch.eye(6)[source]
        x = (
            channels
            if kind in ("linear", "conv1d")
            else channels.view(6, *[1] * (layer.weight.ndim - 2)).expand(6, *[3] * (layer.weight.ndim - 2))
        )
        y = layer(x[None])[0].detach()
        assert torch.equal(y.flatten(1).any(1) if y.ndim > 1 else y != 0, joined[:, source])
    assert 0 < joined.sum() < 48


def test_a_place_of_a_transposed_kernel_is_a_source_of_its_own():
    layer = nn.ConvTranspose1d(2, 3, 5)
    edges = wired(layer, density=0.5)["weight"].edges()
    dense = torch.zeros(edges.shape)
    dense[edges.target, edges.source] = edges.weight
    assert torch.equal(dense.view(3, 2, 5).transpose(0, 1), layer.weight.detach())


def test_groups_have_sources_of_their_own():
    layer = nn.Conv1d(4, 4, 1, groups=2, bias=False)
    edges = wired(layer, density=1.0)["weight"].edges()
    pairs = [(t, s) for t, s, _ in edges.to_list()]
    assert pairs == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (2, 3), (3, 2), (3, 3)]


def test_edges_of_a_one_dimensional_parameter():
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, -3.0, 2.0]))
    edges = wired(layer, num_edges=2, include=["bias"])["bias"].edges()
    assert (edges.shape, edges.to_list()) == ((3, 1), [(1, 0, -3.0), (2, 0, 2.0)])


PAIRS = {
    "linear": (lambda: nn.Linear(8, 4, bias=False), lambda: Conv1D(4, 8), lambda w: w.T),
    "conv": (
        lambda: nn.Conv1d(8, 4, 1, bias=False),
        lambda: nn.ConvTranspose1d(8, 4, 1, bias=False),
        lambda w: w.transpose(0, 1),
    ),
    "grouped": (
        lambda: nn.Conv1d(8, 4, 1, groups=2, bias=False),
        lambda: nn.ConvTranspose1d(8, 4, 1, groups=2, bias=False),
        lambda w: torch.cat([half.transpose(0, 1) for half in w.split(2)]),
    ),
}
"""A layer, one that computes the same with its weight the other way round, and how its weight goes into the other's."""

WAYS = {
    "n_of_m": {"pattern": dnw.NOfM(2, 4)},
    "blocks": {"pattern": dnw.Blocks(2, 4), "density": 0.5},
    "channels": {"pattern": dnw.Channels(), "density": 0.5},
    "top_kast_channels": {"pattern": dnw.Channels(), "density": 0.5, "rule": dnw.TopKAST()},
    "st3": {"density": 0.3, "rule": dnw.ST3()},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_other_way_round_trains_to_the_same(pair, way):
    torch.manual_seed(0)
    make, make_other, turn = PAIRS[pair]
    layer, other = make(), make_other()
    with torch.no_grad():
        other.weight.copy_(turn(layer.weight))
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.5) for x in (layer, other)]
    wirings = [dnw.wire(x, o, **WAYS[way]) for x, o in zip((layer, other), optimizers, strict=True)]
    for step in range(4):
        shape = (5, 8) if pair == "linear" else (5, 8, 3)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for net, optimizer in zip((layer, other), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        one, two = (w["weight"] for w in wirings)
        torch.testing.assert_close(turn(one.weight), two.weight)
        assert torch.equal(turn(one.active), two.active)


LAYOUTS = {
    "targets_first": (Layout(), (4, 3, 2)),
    "transposed": (Layout(transposed=True), (4, 3, 2)),
    "transposed_grouped": (Layout(transposed=True, groups=2), (6, 3, 2)),
    "experts": (Layout(groups=3, stacked=True), (3, 2, 5)),
    "experts_transposed": (Layout(transposed=True, groups=3, stacked=True), (3, 2, 5)),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_by_target_and_back(kind):
    layout, shape = LAYOUTS[kind]
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    rows = layout.by_target(x)
    assert rows.shape == layout.shape(shape)
    assert torch.equal(layout.from_targets(rows), x)
    spread = rows.flatten(1).sum(1).view(-1, *[1] * (rows.ndim - 1)).expand(rows.shape)
    sums = Layer("w", x, None, 0, layout=layout).sum_by_target(x)
    assert torch.equal(sums.expand(shape), layout.from_targets(spread.contiguous()))


def _sums(rank: int, kind: str, dim: int) -> bool:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    layout, shape = LAYOUTS[kind]
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    part = distribute_tensor(x, init_device_mesh("cpu", (2,)), [Shard(dim)])
    shard = shard_of(part)
    layer = Layer("w", part.to_local(), None, 0, shard=shard, layout=layout)
    whole = Layer("w", x, None, 0, layout=layout).sum_by_target(x).expand(shape)
    return torch.equal(layer.sum_by_target(layer.latent).expand_as(layer.latent), shard.cut(whole))


@pytest.mark.slow
@GROUP
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", ["targets_first", "transposed", "transposed_grouped", "experts_transposed"])
def test_sums_by_target_of_sharded_parameters(kind, dim):
    assert on_processes(2, _sums, kind, dim) == [True, True]


def test_copies_keep_which_side_their_targets_are_on():
    layer = nn.ConvTranspose1d(4, 8, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    wiring = dnw.wire(layer, optimizer, density=0.5, pattern=dnw.Channels())
    other, _, copied = copy.deepcopy((layer, optimizer, wiring))
    copied["weight"].latent = torch.randn(4, 8, 1)
    active = copied["weight"].active
    assert torch.equal(active.any(0), active.all(0))
    average = copy.deepcopy(layer)
    nn.init.normal_(average.weight)
    wiring.project(average)
    kept = average.weight != 0
    assert torch.equal(kept.any(0), kept.all(0))
    assert F.conv_transpose1d(torch.randn(1, 4, 2), average.weight).flatten(1).isfinite().all()
