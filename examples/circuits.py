"""The circuit of a task in a trained transformer: python examples/circuits.py runs/transformer --task quotes

Looks for the fewest nodes of a network of examples/sparse_transformer.py with which the task is still solved, every other node
at its mean, and writes them beside it, as JSON and as a page that draws them. Several runs are put beside each other, each at
the same loss of the task: a sparse network and a dense one, say.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from dnw.circuits import TASKS, find_circuit, python_task, task_loss, write_circuit
from dnw.data import read_python_source
from dnw.models import Decoder


def network(run: Path) -> Decoder:
    """The network of a run, as it was at its end."""
    stored = torch.load(run / "network.pt", weights_only=True)
    model = Decoder(**stored["shape"])
    model.load_state_dict(stored["model"])
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="of examples/sparse_transformer.py")
    parser.add_argument("--task", choices=TASKS, default="quotes")
    parser.add_argument("--loss", type=float, default=0.15, help="of the task, that a circuit may have (nats; a coin has 0.69)")
    parser.add_argument("--steps", type=int, default=300, help="over which gates are learned")
    parser.add_argument("--pairs", type=int, default=200, help="of prompts; a half finds the circuit, the other measures it")
    parser.add_argument("--out", type=Path, help="of the page (default: circuit-TASK.html in the first run)")
    given = parser.parse_args()
    _, held_out = read_python_source()
    found = []
    for run in given.runs:
        model = network(run)
        task = python_task(given.task, held_out, length=min(64, model.context), pairs=given.pairs)
        starts = torch.randint(len(held_out) - model.context, (200, 1), generator=torch.Generator().manual_seed(0))
        text = held_out[starts + torch.arange(model.context)].long()
        with torch.no_grad():
            print(f"{run}: loss of {given.task} {float(task_loss(model, task)):.3f} nats by the whole network")
        started = time.perf_counter()
        circuit = find_circuit(
            model,
            task,
            text,
            wires=model.wires(),
            answers="to_logits.weight",
            tokens="embed.weight",
            loss=given.loss,
            steps=given.steps,
        )
        (run / f"circuit-{given.task}.json").write_text(circuit.to_json())
        print(
            f"  {len(circuit.nodes)} of {circuit.num_nodes:,} nodes, {circuit.num_edges:,} of {circuit.num_weights:,} edges: "
            f"loss {circuit.loss:.3f}, on other prompts {circuit.held_out_loss:.3f}, {circuit.accuracy:.1%} right "
            f"({time.perf_counter() - started:.0f} s)"
        )
        found.append(circuit)
    page = given.out or given.runs[0] / f"circuit-{given.task}.html"
    names = " and ".join(run.name for run in given.runs)
    write_circuit(found, page, name=f"{given.task}: {names}")
    print(page)


if __name__ == "__main__":
    main()
