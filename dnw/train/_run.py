"""Run directories: what a run leaves behind and continues from.

Contract: every file is whole or not there. A run directory holds ``config.json`` (the resolved config),
``environment.json`` (versions, machine, commit, where the data lies), ``metrics.jsonl`` (one line per epoch), ``last.pt``
and ``best.pt`` (checkpoints of plain tensors) and ``snapshots/`` (the wiring over time). A run of several seeds holds one
such directory per seed, ``seed-0`` and so on; a run with a baseline holds it in ``baseline``.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dnw import __version__
from dnw._files import read_tensors, write_whole
from dnw.train._config import Config, config_from_json

CHECKPOINT_FORMAT = 1


class TrainingStoppedError(Exception):
    """Training cannot go on; the run directory holds the last good checkpoint."""


@dataclass(frozen=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``.

    Attributes:
        epoch: epochs done, from 1 on.
        step: optimizer steps done.
        lr: learning rate at the end of the epoch.
        train_loss, test_loss: mean cross-entropy, in nats.
        train_top1: share of training images right, on the fly and as augmented.
        top1, top5: share of test images right.
        active, entered: active edges, and how many of them were not active an epoch ago.
        live, nodes: live nodes and all nodes of the graphs.
        seconds: wall-clock time of the epoch, testing included.
        evaluations: of the right-hand side of a graph in continuous time, per forward pass; 0 where there is none.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_top1: float
    test_loss: float
    top1: float
    top5: float
    active: int
    entered: int
    live: int
    nodes: int
    seconds: float
    evaluations: float = 0.0


def runs_inside(path: Path) -> list[Path]:
    """The run directories in a directory, such as that of a sweep, by name."""
    return sorted(found.parent for found in path.glob("*/config.json"))


class RunDirectory:
    """One run on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / "best.pt"

    @property
    def first(self) -> Path:
        """The weights that a run of rule complete begins with; a lottery ticket is rewound to them."""
        return self.path / "first.pt"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @classmethod
    def create(cls, config: Config, data_dir: Path, out: Path | None) -> RunDirectory:
        """Makes a new run directory: ``out``, or the first free ``runs/<recipe>-<number>``.

        Raises:
            ValueError: ``out`` exists and is not empty.
            OSError: it cannot be made.
        """
        if out is not None:
            begun = {"environment.json", "environment.json.part", "config.json.part"}  # of a run that was killed at once
            if out.exists() and (not out.is_dir() or any(entry.name not in begun for entry in out.iterdir())):
                raise ValueError(f"{out}: exists already; name a new directory with --out, or continue it with dnw resume")
            out.mkdir(parents=True, exist_ok=True)
            path = out
        else:
            path = _new_numbered(Path("runs"), config.recipe)
        run = cls(path)
        run.start(config, data_dir)
        return run

    def start(self, config: Config, data_dir: Path) -> None:
        """Writes what a run starts with."""
        self.path.mkdir(parents=True, exist_ok=True)
        environment = json.dumps(_environment(data_dir), indent=2) + "\n"
        write_whole(self.path / "environment.json", environment.encode())
        write_whole(self.path / "config.json", config.to_json().encode())

    def config(self) -> Config:
        """The stored config.

        Raises:
            ValueError: this is no run directory, or its config is not valid.
        """
        path = self.path / "config.json"
        if not path.is_file():
            inside = runs_inside(self.path)
            hint = f"; {inside[0]} is one" if inside else ""
            raise ValueError(f"{self.path}: not a run directory (it has no config.json){hint}")
        return config_from_json(path.read_text(), str(path))

    def data_dir(self) -> Path:
        """Where the data lay when the run was started."""
        try:
            return Path(json.loads((self.path / "environment.json").read_text())["data_dir"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path}: environment.json does not say where the data is; give --data-dir") from None

    def members(self) -> Iterator[tuple[RunDirectory, Config]]:
        """The single runs: one per seed, each with its baseline after it."""
        config = self.config()
        for seed in config.seeds:
            path = self.path if len(config.seeds) == 1 else self.path / f"seed-{seed}"
            one = config.model_copy(update={"seeds": (seed,), "baseline": None})
            yield RunDirectory(path), one
            if config.baseline is not None:
                yield RunDirectory(path / "baseline"), one.of_rule(config.baseline)

    def metrics(self) -> list[EpochMetrics]:
        """The epochs done so far.

        Raises:
            ValueError: a damaged ``metrics.jsonl``.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        try:
            return [EpochMetrics(**json.loads(line)) for line in path.read_text().splitlines()]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({error})") from None

    def write_metrics(self, metrics: list[EpochMetrics]) -> None:
        lines = "".join(json.dumps(dataclasses.asdict(m)) + "\n" for m in metrics)
        write_whole(self.path / "metrics.jsonl", lines.encode())


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Stores tensors and plain values; the file is whole or not there."""
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **content}, buffer)
    write_whole(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what :func:`write_checkpoint` wrote; nothing in the file is run.

    Raises:
        ValueError: no checkpoint of ours, a damaged one, or one of a newer version.
    """
    content = read_tensors(path)
    if not isinstance(content, dict) or not {"model", "optimizer", "epoch", "step"} <= content.keys():
        raise ValueError(f"{path}: not a checkpoint of a run")
    version = content.get("format")
    if version != CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: a checkpoint of format {version}; this version of dnw reads {CHECKPOINT_FORMAT}")
    return content


def _new_numbered(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = parent / f"{name}-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _environment(data_dir: Path) -> dict[str, Any]:
    return {
        "dnw": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "data_dir": str(data_dir.absolute()),
    }


def _processor() -> str:
    """The name of the processor, or its architecture where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name} ({platform.machine()})" if name else platform.machine()


def _commit() -> str | None:
    """The commit that the package was run from; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() or None
