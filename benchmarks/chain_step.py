"""One training step of MobileNetV1 as a chain of graphs on CIFAR-10 shapes: python benchmarks/chain_step.py

Compares, in one run and in turn, the whole step (forward, backward, SGD with momentum) of the complete graph, unwired, with
the same step of a random graph and of learned wiring, both with the edges of width x0.225, and of the plain MobileNetV1 of
width x0.25.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _timing import in_turn, machine, report
from torch import nn

import dnw
from dnw.models import GraphChain, mobilenet_v1


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    stride = 1 if arguments.size <= 64 else 2
    print(f"MobileNetV1 x0.225 as graphs, batch {arguments.batch} at {arguments.size} px; {machine()}")
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=arguments.device)
    labels = torch.randint(10, (arguments.batch,), device=arguments.device)
    steps = {}
    for name, rule in (("complete graph, unwired", None), ("random graph", dnw.RandomGraph()), ("learned wiring", dnw.DNW())):
        model = GraphChain(10, image_stride=stride).to(arguments.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        if rule is not None:
            dnw.wire(model, optimizer, num_edges=model.num_edges(0.225), rule=rule)
        steps[name] = step_of(model, optimizer, images, labels)
    plain = mobilenet_v1(10, width=0.25, image_stride=stride).to(arguments.device)
    steps["plain MobileNetV1 x0.25"] = step_of(
        plain, torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9), images, labels
    )
    report(in_turn(steps, arguments.rounds), "complete graph, unwired")


if __name__ == "__main__":
    main()
