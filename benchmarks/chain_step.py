"""One training step of MobileNetV1 as a chain of graphs on CIFAR-10 shapes: python benchmarks/chain_step.py

Compares, in one run and in turn, the whole step (forward, backward, SGD with momentum) of the complete graph, as layers of
PyTorch, with those of a random graph and of learned wiring, all with the edges of width x0.225, and with the textbook form of
DNW.
"""

from __future__ import annotations

import argparse

import torch
from _steps import compare
from _timing import machine

from dnw.models import GraphChain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--width", type=float, default=0.225, help="multiplier that says how many edges there are")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    stride = 1 if arguments.size <= 64 else 2
    print(f"MobileNetV1 x{arguments.width:g} as graphs, batch {arguments.batch} at {arguments.size} px; {machine()}")
    torch.manual_seed(0)
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=arguments.device)
    labels = torch.randint(10, (arguments.batch,), device=arguments.device)
    budget = GraphChain(10).num_edges(arguments.width)
    compare(lambda: GraphChain(10, image_stride=stride), budget, images, labels, arguments.rounds)


if __name__ == "__main__":
    main()
