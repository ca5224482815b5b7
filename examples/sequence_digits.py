"""A recurrent network and a neural ODE whose wiring is learned, on digits read row by row: python examples/sequence_digits.py

Each image is a sequence of 8 rows of 8 pixels. A dynamic graph of 100 nodes takes a row at a time, keeps its state, and is
read after the last one. Of its 10,000 candidate edges, cycles and self-edges included, 200 may be active.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnw
from dnw.data import read_digits
from dnw.graphs import ContinuousTimeGraph, DiscreteTimeGraph, DynamicGraph, SequenceGraph


class Reader(nn.Module):
    def __init__(self, graph: DynamicGraph) -> None:
        super().__init__()
        self.sequence = SequenceGraph(graph)
        self.classifier = nn.Linear(graph.num_outputs, 10)

    def forward(self, rows: Tensor) -> Tensor:
        outputs, _ = self.sequence(rows)
        return self.classifier(outputs[:, -1])


def make(kind: str) -> Reader:
    if kind == "discrete":
        return Reader(DiscreteTimeGraph(100, 8, 32, steps=2, maps=False, activation=torch.tanh))
    return Reader(ContinuousTimeGraph(100, 8, 32, solver="rk4", solver_steps=2, leak=0.5, maps=False, activation=torch.tanh))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--edges", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train, test = ((x.images[:, 0].float() / 255, x.labels) for x in read_digits())
    for kind in ("discrete", "continuous"):
        for rule in (dnw.DNW(), dnw.RandomGraph()):
            torch.manual_seed(arguments.seed)
            model = make(kind)
            optimizer = torch.optim.Adam(model.parameters())
            wiring = dnw.wire(model, optimizer, num_edges=arguments.edges, rule=rule, seed=arguments.seed)
            batches = -(-len(train[1]) // 64)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=arguments.epochs * batches)
            for _ in range(arguments.epochs):
                for batch in torch.randperm(len(train[1])).split(64):
                    optimizer.zero_grad()
                    F.cross_entropy(model(train[0][batch]), train[1][batch]).backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
            with torch.no_grad():
                accuracy = (model(test[0]).argmax(1) == test[1]).float().mean()
            live, nodes = dnw.count.num_live_nodes(model, wiring)
            name = f"{kind}, {type(rule).__name__}:"
            print(
                f"{name:<25} {wiring.num_active} edges  live nodes {live}/{nodes}  steps {wiring.step}  accuracy {accuracy:.4f}"
            )


if __name__ == "__main__":
    main()
