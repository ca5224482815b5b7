"""The paper's claim (section 2.2): an edge that replaces another one lowers the loss on that mini-batch, to first order."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnw
from dnw.graphs import DiscreteTimeGraph, StaticGraph


def small_network(kind: str, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A graph with a linear head in double precision, and a mini-batch.

    The discrete one is smooth: a node that nothing reaches stays at 0, where ReLU has a kink and the gradient is only that of
    one side.
    """
    torch.manual_seed(seed)
    if kind == "static":
        graph: nn.Module = StaticGraph((3, 4, 4), 3, norm=None)
    else:
        graph = DiscreteTimeGraph(9, 3, 3, steps=3, activation=torch.tanh)
    model = nn.Sequential(graph, nn.Flatten(), nn.Linear(3 * 16, 4)).double()
    return model, torch.randn(6, 3, 4, 4, dtype=torch.float64), torch.randint(4, (6,))


def on_the_verge(weight: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Weights of which two edges into the same node compete for the last place, by a hair and with random signs."""
    row = int(candidates.sum(1).argmax())
    sources = candidates[row].nonzero().squeeze(1)
    first, second = sources[torch.randperm(len(sources))[:2]].tolist()
    signs = torch.where(torch.rand(weight.shape) < 0.5, -1.0, 1.0).double()
    active = torch.rand(weight.shape) < 0.5
    magnitude = torch.where(active, 0.2 + torch.rand(weight.shape), 1e-9 * torch.rand(weight.shape)).double()
    magnitude[row, first], magnitude[row, second] = 1e-7, 1e-7 * (1 - 1e-6)
    active[row, first], active[row, second] = True, False
    return magnitude * signs, active & candidates, (row, first, second)


@pytest.mark.parametrize("kind", ["static", "discrete"])
def test_a_swap_lowers_the_loss_of_its_mini_batch(kind):
    swaps = kept = 0
    for seed in range(120):
        model, images, labels = small_network(kind, seed)
        graph = model[0]
        candidates = graph.edge_candidates()["weight"]
        latent, active, (row, out, into) = on_the_verge(graph.weight.detach(), candidates)
        with torch.no_grad():
            graph.weight.copy_(latent)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        wiring = dnw.wire(model, optimizer, num_edges={"0.weight": int(active.sum())}, include="0.weight")
        assert torch.equal(wiring["0.weight"].active, active)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        now = wiring["0.weight"].active
        if torch.equal(now, active):
            kept += 1
            continue
        assert now[row, into]
        assert not now[row, out]  # (row, into) has replaced (row, out), and nothing else has changed
        assert int((now != active).sum()) == 2
        without = copy.deepcopy(model)
        with torch.no_grad():  # the same step, the old edge instead of the new one
            without[0].weight[row, into] = 0
            without[0].weight[row, out] = wiring["0.weight"].latent[row, out]
            with_swap, without_swap = (F.cross_entropy(m(images), labels).item() for m in (model, without))
        assert with_swap < without_swap, seed
        swaps += 1
    assert swaps > 15
    assert kept > 15
