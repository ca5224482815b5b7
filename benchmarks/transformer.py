"""Sparse transformers at equal weights and tokens: python benchmarks/transformer.py [--seeds 0,1]

Each is trained by examples/sparse_transformer.py on the same bytes, at the learning rate that was best for it of those tried
with seed 0 (1e-3, 3e-3 and 1e-2 of a dense network). What came out is kept in benchmarks/transformer.json, from which the table
of docs/circuits.md is made: --table prints it without training anything. Called again it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STORED = HERE / "transformer.json"
CONTENDERS = {
    "iht": ("top k without latent weights (`IHT`)", ["--rule", "iht", "--lr", "3e-3"]),
    "dnw": ("top k with latent weights (`DNW`)", ["--rule", "dnw", "--lr", "3e-3"]),
    "pruning": ("a dense network pruned by magnitude", ["--rule", "magnitude_pruning", "--lr", "3e-3"]),
    "narrow": ("dense, as many weights (width 36)", ["--rule", "complete", "--width", "36", "--lr", "1e-2"]),
}
KEPT = ("rule", "width", "lr", "density", "steps", "seed", "test_loss", "edges", "weights", "seconds", "bytes", "torch")


def table(rows: list[dict]) -> str:
    """Loss by contender, and its difference to top k with latent weights on the same seeds."""
    of = {name: {row["seed"]: row for row in rows if row["name"] == name} for name in CONTENDERS}
    lines = ["| | weights | of them edges | nats per byte | against latent weights | seeds |", "|---|---|---|---|---|---|"]
    for name, (label, _) in CONTENDERS.items():
        own = of[name]
        if not own:
            continue
        losses = [row["test_loss"] for row in own.values()]
        one = next(iter(own.values()))
        against = [row["test_loss"] - of["dnw"][seed]["test_loss"] for seed, row in own.items() if seed in of["dnw"]]
        difference = "" if name == "dnw" or not against else f"{statistics.mean(against):+.3f}{spread(against)}"
        edges = "all" if one["rule"] == "complete" else f"{one['edges']:,}"
        loss = f"{statistics.mean(losses):.3f}{spread(losses)}"
        lines.append(f"| {label} | {one['weights']:,} | {edges} | {loss} | {difference} | {', '.join(map(str, sorted(own)))} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """The standard deviation, where there are two or more."""
    return f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="separated by commas (default: all)")
    parser.add_argument("--seeds", default="0,1", help="separated by commas")
    parser.add_argument("--out", type=Path, default=Path("runs/transformer"))
    parser.add_argument("--table", action="store_true", help="print the table of what is stored, and train nothing")
    given = parser.parse_args()
    rows = json.loads(STORED.read_text()) if STORED.exists() else []
    for seed in [] if given.table else map(int, given.seeds.split(",")):
        for name in given.contenders.split(","):
            run = given.out / f"{name}-{seed}"
            command = [sys.executable, HERE.parent / "examples" / "sparse_transformer.py", *CONTENDERS[name][1]]
            subprocess.run([*command, "--seed", str(seed), "--out", run], check=True)  # which returns where it is finished
            result = json.loads((run / "result.json").read_text())
            rows = [row for row in rows if (row["name"], row["seed"]) != (name, seed)]
            rows.append({"name": name, **{key: result[key] for key in KEPT}})
            rows.sort(key=lambda row: (list(CONTENDERS).index(row["name"]), row["seed"]))
            aside = STORED.with_suffix(".part")
            aside.write_text(json.dumps(rows, indent=1) + "\n")
            aside.replace(STORED)
    print(table(rows))


if __name__ == "__main__":
    main()
