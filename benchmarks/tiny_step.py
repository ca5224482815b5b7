"""A training step of the tiny CIFAR-10 classifier, wired and not: python benchmarks/tiny_step.py

Compares, in one run and in turn, the step of the unwired (complete) graph, wired by DNW, wired as a random graph, and the
textbook form of DNW: dense parameters, and a full sort that makes a mask in every forward pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _timing import in_turn, machine, report
from torch import Tensor

import dnw
from dnw.models import tiny_cifar10


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(arguments.batch, 3, 32, 32, device=arguments.device)
    labels = torch.randint(10, (arguments.batch,), device=arguments.device)

    def stepper(rule: dnw.Rule | None, textbook: bool = False) -> Callable[[], None]:
        model = tiny_cifar10(rank_all_entries=textbook).to(arguments.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        if rule is not None:
            dnw.wire(model, optimizer, num_edges=32_000, rule=rule)

        def forward() -> Tensor:
            if not textbook:
                return model(images)
            weight = model.graph.weight
            order = weight.detach().abs().flatten().sort().indices
            mask = torch.zeros_like(weight).flatten().index_fill_(0, order[-32_000:], 1.0).view_as(weight)
            masked = {"graph.weight": _StraightThrough.apply(weight, mask)}
            return torch.func.functional_call(model, masked, (images,))

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(forward(), labels).backward()
            optimizer.step()

        return step

    steps = {
        "complete graph, not wired": stepper(None),
        "random graph": stepper(dnw.RandomGraph()),
        "DNW": stepper(dnw.DNW()),
        "DNW in textbook form": stepper(None, textbook=True),
    }
    print(f"tiny CIFAR-10 classifier, batch {arguments.batch}; {machine()}")
    report(in_turn(steps, arguments.rounds), "complete graph, not wired")


if __name__ == "__main__":
    main()
