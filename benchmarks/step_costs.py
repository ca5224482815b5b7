"""Where the time of a training step goes, and how it grows: python benchmarks/step_costs.py [chain | static | discrete]

Prints the shares of a step of learned wiring and the rate of each kernel beside that of a large dense product in PyTorch; then
steps of a random graph and of learned wiring, as ratios to the complete graph in PyTorch, by density, batch and threads, with
the peak of memory of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _timing import machine
from torch import Tensor, nn

import dnw
from dnw.graphs import _dynamic_kernels, _static_kernels, set_graph_kernels
from dnw.kernels import _graph
from dnw.models import GraphChain, tiny_cifar10, tiny_cifar10_discrete

MODELS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: GraphChain(10, image_stride=1),
    "static": lambda: tiny_cifar10(rank_all_entries=False),
    "discrete": tiny_cifar10_discrete,
}
DENSITIES = (0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
BATCHES = (1, 2, 4, 8, 32, 128, 512)
WAYS = ("dense", "random", "exact", "pooled bfloat16")


class Trainer:
    """Steps of one model: dense on layers of PyTorch, a random graph, or DNW with a gradient of dormant edges."""

    def __init__(self, model: str, way: str, density: float | None, batch: int) -> None:
        torch.manual_seed(0)
        self.model = MODELS[model]()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
        self.images, self.labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        set_graph_kernels("never" if way == "dense" else "always")
        if way == "dense":
            return
        if density is not None:
            budget: dict[str, Any] = {"density": density}
        elif isinstance(self.model, GraphChain):
            budget = {"num_edges": self.model.num_edges(0.225)}
        else:
            budget = {"num_edges": {"graph.weight": 32_000}}
        rule = dnw.RandomGraph() if way == "random" else dnw.DNW()
        dormant = None if way == "random" else dnw.Dormant(gradient=way)
        dnw.wire(self.model, self.optimizer, include=["*graph*.weight"], rule=rule, dormant=dormant, **budget)

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()


def median_step(trainer: Trainer, rounds: int) -> float:
    """Milliseconds of a step, after two that do not count."""
    seconds = []
    for i in range(rounds + 2):
        started = time.perf_counter()
        trainer.step()
        if i > 1:
            seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


# --- shares ---


def shares(model: str, way: str, rounds: int) -> None:
    """Prints what each kind of kernel takes of a step, and its rate beside that of PyTorch's dense product."""
    spent: Counter[str] = Counter()
    done: Counter[str] = Counter()

    def follow(owner: Any, name: str, label: str, work: Callable[..., float]) -> None:
        function = getattr(owner, name)

        def timed(*given: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*given, **options)
            spent[label] += time.perf_counter() - started
            done[label] += work(*given)
            return result

        setattr(owner, name, timed)

    def of_nodes(nodes: Any, x: Tensor, *rest: Any) -> float:
        return 9 * x.numel() / nodes.stride**2

    follow(_graph.Nodes, "forward", "nodes, forward", of_nodes)
    follow(_graph.Nodes, "backward", "nodes, backward", lambda *given: 2 * of_nodes(*given))
    follow(_graph.Rows, "times", "edges", lambda rows, x, *rest: rows.num_entries * x.shape[1])
    both = "edges, backward with gradients of active ones"
    follow(_graph.Rows, "times_and_products", both, lambda rows, x, *rest: 2 * rows.num_entries * x.shape[1])
    for module in (_static_kernels, _dynamic_kernels):
        label = "gradient of dormant edges"
        follow(module, "product_into", label, lambda out, left, right: len(left) * len(right) * left.shape[1])
        follow(module, "factors", label, lambda *given: 0)
        follow(module, "_compressed", "edges, compressed", lambda *given: 0)
    trainer = Trainer(model, way, None, 128)
    follow(trainer.optimizer, "step", "optimizer, exchange and selection", lambda *given: 0)
    for _ in range(2):
        trainer.step()
    spent.clear()
    done.clear()
    started = time.perf_counter()
    for _ in range(rounds):
        trainer.step()
    total = time.perf_counter() - started
    rest = total - sum(spent.values())
    peak = dense_rate()
    print(
        f"\n{model}, {way}: {total / rounds * 1e3:.0f} ms a step; PyTorch's product of 2048 x 2048: {peak / 1e9:.0f} G a second"
    )
    for label, seconds in [*spent.most_common(), ("everything else", rest)]:
        rate = done[label] / seconds
        of_peak = f"{rate / 1e9:6.1f} G multiply-adds a second, {rate / peak:4.0%}" if rate else ""
        print(f"  {label:<46} {1e3 * seconds / rounds:7.1f} ms  {seconds / total:4.0%}  {of_peak}")


def dense_rate() -> float:
    """Multiply-adds a second of a large product."""
    x = torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - started)
    return 2048**3 / best


# --- growth ---


def one(model: str, way: str, density: float | None, batch: int, threads: int, rounds: int) -> dict[str, float]:
    """A step and the peak of memory, in a process of its own."""
    settings = {"model": model, "way": way, "density": density, "batch": batch, "threads": threads, "rounds": rounds}
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(settings)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def run_one(settings: dict[str, Any]) -> None:
    rounds = settings.pop("rounds")
    torch.set_num_threads(settings.pop("threads"))
    before = memory("VmRSS")
    milliseconds = median_step(Trainer(**settings), rounds)
    megabytes = memory("VmHWM") - before
    print(json.dumps({"ms": milliseconds, "MB": megabytes}))


def memory(kind: str) -> float:
    """MB that this process holds, or has held at most, as Linux says."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1]) / 1024


def table(title: str, model: str, rows: list[tuple[str, float | None, int, int]], rounds: int) -> None:
    print(f"\n{title:<12}" + "".join(f"{way:>28}" for way in WAYS))
    for name, density, batch, threads in rows:
        found = [one(model, way, density, batch, threads, rounds) for way in WAYS]
        cells = [f"{x['ms']:8.1f} ms {x['ms'] / found[0]['ms']:5.2f} {x['MB']:6.0f} MB" for x in found]
        print(f"{name:<12}" + "".join(f"{cell:>28}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=MODELS, default="chain")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(json.loads(arguments.one))
        return
    model, rounds, threads = arguments.model, arguments.rounds, torch.get_num_threads()
    print(machine())
    for way in WAYS[1:]:
        code = f"import step_costs; step_costs.shares({model!r}, {way!r}, {rounds})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=__file__.rpartition("/")[0] or ".")
    table("density", model, [(f"{d:.1%}", d, 128, threads) for d in DENSITIES], rounds)
    table("batch", model, [(str(b), None, b, threads) for b in BATCHES], rounds)
    table("threads", model, [(str(t), None, 128, t) for t in range(1, threads + 1)], rounds)


if __name__ == "__main__":
    main()
