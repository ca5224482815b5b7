"""A weight-sparse transformer on the bytes of Python's own library: python examples/sparse_transformer.py --density 0.02

A decoder of two blocks learns to predict the next byte of the standard library of the interpreter that runs it; a twentieth
of the files is held out. Its density falls from 1 to the wanted one over half of the run, and the learning rate grows with the
root of what is left out: where few weights are left, each has to be larger. What it did lies in --out: its result, a record of
the wiring, snapshots and a page of its layers, the network, and a checkpoint from which it goes on where it was stopped.

    --rule dnw                 dormant edges keep latent weights
    --rule iht                 they do not: all but the k largest are 0 after every step
    --rule magnitude_pruning   what is pruned stays away
    --rule complete            a dense network; with --width and --depth as large as one likes
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnw
from dnw.data import read_python_source
from dnw.models import Decoder
from dnw.view import Recorder, SnapshotWriter, read_snapshots, record_layers, write_page

RULES = ("dnw", "iht", "magnitude_pruning", "complete")


def wired(model: nn.Module, given: argparse.Namespace) -> tuple[torch.optim.Optimizer, dnw.Wiring]:
    """AdamW, and the two lines."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, betas=(0.9, 0.95), weight_decay=given.weight_decay)
    if given.rule == "complete":
        return optimizer, dnw.wire(model, optimizer, rule=dnw.Complete())
    schedule = dnw.DensitySchedule(end=given.steps // 2, begin=given.steps // 100, every=10)
    floor = dnw.Floor(per_target=given.floor, per_source=given.floor)
    include = [dnw.DEFAULTS, *(["embed", "place"] if given.embeddings else [])]
    if given.biases:
        include += [name for name, parameter in model.named_parameters() if parameter.ndim == 1]
    rule = dnw.RULES[given.rule]()
    wiring = dnw.wire(model, optimizer, density=given.density, rule=rule, schedule=schedule, floor=floor, include=include)
    return optimizer, wiring


def learning_rate(step: int, wiring: dnw.Wiring, given: argparse.Namespace) -> float:
    """A rise over a hundredth of the run, then a line down to 0; times the root of one over the density of that moment."""
    shape = min(1.0, 100 * (step + 1) / given.steps) * (1 - step / given.steps)
    density = wiring.num_active / wiring.num_candidates
    return given.lr * shape * (1 if given.rule == "complete" else density**-0.5)


def windows(source: Tensor, context: int, count: int, generator: torch.Generator) -> Tensor:
    """Some bytes of the source with those that follow, int64 ``[count, context + 1]``."""
    starts = torch.randint(len(source) - context, (count, 1), generator=generator)
    return source[starts + torch.arange(context + 1)].long()


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Nats per byte."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def measured(model: nn.Module, source: Tensor, context: int) -> float:
    """Nats per byte of the held-out files: of a thousand windows, always the same ones."""
    tokens = windows(source, context, 1000, torch.Generator().manual_seed(0))
    return sum(float(loss_of(model, part)) * len(part) for part in tokens.split(50)) / len(tokens)


def saved(path: Path, **content: Any) -> None:
    """Writes a file aside, and renames it; JSON where its name ends so."""
    aside = path.with_suffix(".part")
    if path.suffix == ".json":
        aside.write_text(json.dumps(content, indent=2) + "\n")
    else:
        torch.save(content, aside)
    os.replace(aside, path)


def parsed() -> tuple[argparse.Namespace, dict[str, Any]]:
    """What was given, and those of it that a run depends on; fails where --out holds a run with others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rule", choices=RULES, default="dnw")
    parser.add_argument("--density", type=float, default=0.02, help="of each matrix (default: 1 weight in 50)")
    parser.add_argument("--floor", type=int, default=1, help="edges that every target and every source keeps")
    parser.add_argument("--embeddings", action="store_true", help="embeddings are sparse, too")
    parser.add_argument("--biases", action="store_true", help="biases are sparse, too")
    parser.add_argument("--share", type=float, help="of the activations of all nodes, the largest, that are kept")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=96, help="bytes")
    parser.add_argument("--batch", type=int, default=32, help="windows in a step")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=3e-3, help="of a dense network")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--every", type=int, default=250, help="steps between measurements, snapshots and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/transformer"))
    given = parser.parse_args()
    settings = {name: value for name, value in vars(given).items() if name != "out"}
    settings_file = given.out / "settings.json"
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        parser.error(f"{given.out} holds a run with other settings (settings.json); give another --out")
    given.out.mkdir(parents=True, exist_ok=True)
    saved(settings_file, **settings)
    return given, settings


def main() -> None:
    given, settings = parsed()
    checkpoint = given.out / "last.pt"
    if (given.out / "result.json").exists():
        print(f"{given.out}: finished already")
        return

    train, test = read_python_source()
    torch.manual_seed(given.seed)
    shape = {"width": given.width, "depth": given.depth, "heads": given.heads, "context": given.context, "share": given.share}
    model = Decoder(**shape)
    optimizer, wiring = wired(model, given)
    generator, step, seconds, metrics = torch.Generator().manual_seed(given.seed), 0, 0.0, []
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        generator.set_state(stored["generator"])
        step, seconds, metrics = stored["step"], stored["seconds"], stored["metrics"]
    recorder = Recorder(wiring, given.out / "wiring.jsonl")
    if checkpoint.exists():
        recorder.load_state_dict(stored["recorder"])
    writer = SnapshotWriter(given.out / "snapshots", step)
    writer.write(wiring, step, step * given.batch * given.context / len(train))
    print(f"{given.rule}: {len(train):,} bytes to train with, {len(test):,} held out")
    print(wiring.summary())

    epoch = len(train) / (given.batch * given.context)  # in steps
    started = time.perf_counter() - seconds
    while step < given.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, wiring, given)
        loss = loss_of(model, windows(train, given.context, given.batch, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % given.every and step != given.steps:
            continue
        seconds = time.perf_counter() - started
        held_out = measured(model, test, given.context)
        row = {"step": step, "epoch": step / epoch, "train_loss": float(loss.detach()), "test_loss": held_out}
        row |= {"active": wiring.num_active, "seconds": round(seconds, 1)}
        metrics.append(row)
        recorder.record(test_loss=held_out)
        writer.write(wiring, step, step / epoch)
        saved(
            checkpoint,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            generator=generator.get_state(),
            recorder=recorder.state_dict(),
            step=step,
            seconds=seconds,
            metrics=metrics,
        )
        print(f"step {step:,}  {held_out:.3f} nats per byte  {wiring.num_active:,} edges  {seconds:.0f} s", flush=True)
        started = time.perf_counter() - seconds

    dense = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in wiring)
    result = {
        **settings,
        "test_loss": metrics[-1]["test_loss"],
        "edges": wiring.num_active,
        "weights": wiring.num_active + dense,
    }
    result |= {
        "seconds": seconds,
        "torch": torch.__version__,
        "bytes": len(train),
        "bits": metrics[-1]["test_loss"] / math.log(2),
    }
    saved(given.out / "network.pt", shape=shape, model=model.state_dict(), wired=list(wiring))
    example = windows(test, given.context, 1, torch.Generator().manual_seed(0))[:, :-1]
    snapshots = read_snapshots(given.out / "snapshots")
    page = record_layers(model, snapshots, example=example, name=given.out.name, about=given.rule, metrics=metrics)
    write_page([page], given.out / "view.html")
    saved(given.out / "result.json", **result)  # last: it says that all is there
    print(f"{given.out / 'view.html'}: its layers; {given.out / 'network.pt'}: the network")


if __name__ == "__main__":
    main()
