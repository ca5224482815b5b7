"""A training step of a tiny CIFAR-10 classifier: python benchmarks/tiny_step.py [static | discrete | continuous]

Compares, in one run and in turn, the whole step (forward, backward, SGD with momentum) of the complete graph, as layers of
PyTorch, with those of a random graph and of learned wiring, all with 32,000 edges, and with the textbook form of DNW.
"""

from __future__ import annotations

import argparse

import torch
from _steps import compare
from _timing import machine

from dnw.models import tiny_cifar10, tiny_cifar10_continuous, tiny_cifar10_discrete

GRAPHS = {
    "static": lambda: tiny_cifar10(rank_all_entries=False),
    "discrete": tiny_cifar10_discrete,
    "continuous": lambda: tiny_cifar10_continuous(solver="rk4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", nargs="?", choices=GRAPHS, default="static")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--edges", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    print(f"tiny CIFAR-10 classifier, {arguments.graph}, batch {arguments.batch}, {arguments.edges:,} edges; {machine()}")
    torch.manual_seed(0)
    images = torch.randn(arguments.batch, 3, 32, 32, device=arguments.device)
    labels = torch.randint(10, (arguments.batch,), device=arguments.device)
    compare(GRAPHS[arguments.graph], {"graph.weight": arguments.edges}, images, labels, arguments.rounds)


if __name__ == "__main__":
    main()
