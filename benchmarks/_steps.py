"""Training steps of graphs to compare: dense, wired in every way, and the textbook form of DNW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _timing import in_turn, report
from torch import Tensor, nn

import dnw
from dnw.graphs import set_graph_kernels

WAYS: dict[str, dict[str, Any]] = {
    "random graph": {"rule": dnw.RandomGraph()},
    "RigL, every 100 steps": {"rule": dnw.RigL(every=100)},
    "NormSTE, an edge to each target kept": {"rule": dnw.NormSTE(), "floor": dnw.Floor(per_target=1)},
    "DNW, exact": {"dormant": dnw.Dormant()},
    "DNW, bfloat16": {"dormant": dnw.Dormant(gradient="bfloat16")},
    "DNW, pooled": {"dormant": dnw.Dormant(gradient="pooled")},
    "DNW, pooled and bfloat16": {"dormant": dnw.Dormant(gradient="pooled bfloat16")},
}
"""What :func:`dnw.wire` is given besides the edges."""
COMPLETE = "complete graph, layers of PyTorch"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def textbook(model: nn.Module, num_edges: Mapping[str, int], images: Tensor) -> Tensor:
    """DNW as it is usually written: a full sort that makes a mask in every forward pass."""
    masked = {}
    for name, k in num_edges.items():
        weight = model.get_parameter(name)
        order = weight.detach().abs().flatten().sort().indices
        mask = torch.zeros_like(weight).flatten().index_fill_(0, order[-k:], 1.0).view_as(weight)
        masked[name] = _StraightThrough.apply(weight, mask)
    return torch.func.functional_call(model, masked, (images,))


def compare(make: Callable[[], nn.Module], num_edges: Mapping[str, int], images: Tensor, labels: Tensor, rounds: int) -> None:
    """Prints whole steps, with PyTorch's fused SGD and momentum, and their ratio to that of the complete graph."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, forward: Callable[[Tensor], Tensor], mode: str) -> None:
        set_graph_kernels(mode)
        optimizer.zero_grad()
        F.cross_entropy(forward(images), labels).backward()
        optimizer.step()

    steps: dict[str, Callable[[], None]] = {}
    for name in (COMPLETE, *WAYS, "DNW in textbook form, layers"):
        torch.manual_seed(0)
        model = make().to(images.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
        forward = partial(textbook, model, num_edges) if "textbook" in name else model
        if name in WAYS:
            dnw.wire(model, optimizer, num_edges=dict(num_edges), **WAYS[name])
        steps[name] = partial(step, model, optimizer, forward, "auto" if name in WAYS else "never")
    report(in_turn(steps, rounds, rest=0.2), COMPLETE)
