"""Run directories: what a run leaves behind and continues from.

Contract: every file is whole or not there, and one in which a bit has changed is found. A run directory holds the files of
``FILES``. One of several seeds holds such a directory for each seed, ``seed-0`` and so on; one with a baseline holds it in
``baseline``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from dnw import __version__
from dnw._checks import did_you_mean
from dnw._files import PART, pretrained_names, read_text, write_whole
from dnw.graphs._way import graph_kernels
from dnw.recipes._config import MOST_BYTES, Config, check_unchanged, config_from_json
from dnw.recipes._settings import short
from dnw.train._lock import NAME as LOCK
from dnw.train._lock import held
from dnw.train._sealed import sealed, unsealed

FILES = {
    "config.json": "what the run is: every setting",
    "environment.json": "what it was started in: versions, machine, threads, commit, what graphs run on, where the data lies, "
    "how many classes it has, and the config once more",
    "metrics.jsonl": "a line per epoch: losses, accuracies, edges, seconds",
    "metrics.csv": "with `--log csv`: the same as a table",
    "tensorboard/events.*": "with `--log tensorboard`: the same for TensorBoard",
    "counts.json": "of a result that `dnw results` keeps: parameters and multiply-adds at the end",
    "network.pt": "of a result that keeps its network (`dnw results --save ... --snapshots`): that, in half precision",
    "last.pt": "the checkpoint of the last epoch, from which `dnw resume` goes on",
    "best.pt": "the checkpoint of the best epoch among those with the final number of edges",
    "first.pt": "of `rule=complete`: the weights that it begins with, to which a ticket is rewound",
    "ticket.pt": "of `edges=ticket`: the edges and the weights that it begins with",
    "wiring.jsonl": "what the wiring did: of each layer edges come and gone, their ages and magnitudes; a line at the "
    "beginning, some within the first epoch, and one after every epoch",
    "snapshots/step-*.npz": "its wiring over time; of a network without graphs about 25 of them, where it has at most 20 "
    "million edges",
    "view.html": "a page of the snapshots, as `dnw view` writes it",
    "view-beside-*.html": "the same of two runs",
    LOCK: "while it is trained: by which process",
}
"""What a run directory may hold, and what it is; a star stands for more of the name."""
_LARGEST_METRICS = 2**26
_LARGEST = {"threads": 4096, "num_classes": 2**31}


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
        train_top1: accuracy on the training images, from 0 to 1, on the fly and as augmented.
        top1, top5: accuracy on the test images, from 0 to 1.
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
    def network(self) -> Path:
        """The weights of a run that is kept without what training goes on with."""
        return self.path / "network.pt"

    @property
    def first(self) -> Path:
        """The weights that a run of rule complete begins with; a lottery ticket is rewound to them."""
        return self.path / "first.pt"

    @property
    def ticket(self) -> Path:
        """The edges and weights that a run of a lottery ticket begins with."""
        return self.path / "ticket.pt"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def records(self) -> Path:
        return self.path / "wiring.jsonl"

    @property
    def page(self) -> Path:
        return self.path / "view.html"

    @property
    def exists(self) -> bool:
        """Whether a run was started there."""
        return (self.path / "config.json").is_file()

    @classmethod
    def create(cls, config: Config, data_dir: Path, num_classes: int, out: str | Path | None) -> RunDirectory:
        """Makes a new run directory: ``out``, or the first free ``runs/<recipe>-<number>``.

        Raises:
            ValueError: ``out`` exists and is not empty.
            OSError: it cannot be made.
        """
        if out is not None:
            path = Path(out)
            _check_new(path)
            path.mkdir(parents=True, exist_ok=True)
        else:
            path = _new_numbered(Path("runs"), config.recipe)
        run = cls(path)
        with held(path):
            _check_new(path)  # again: another process may have been first
            run.start(config, data_dir, num_classes)
        return run

    def start(self, config: Config, data_dir: Path, num_classes: int) -> None:
        """Writes what a run starts with."""
        self.path.mkdir(parents=True, exist_ok=True)
        stored = {"num_classes": num_classes, "config": config.model_dump(mode="json")}
        environment = sealed({**_environment(data_dir, config.device), **stored})
        write_whole(self.path / "environment.json", (json.dumps(environment, indent=2) + "\n").encode())
        write_whole(self.path / "config.json", config.to_json().encode())

    def config(self) -> Config:
        """The stored config.

        Raises:
            ValueError: this is no run directory, or its config is not valid, or another than the run was started with.
        """
        path = self.path / "config.json"
        if not self.exists:
            inside = runs_inside(self.path)
            hint = f"; {inside[0]} is one" if inside else ""
            if str(self.path) in pretrained_names():
                hint = "; it is the name of a pretrained network, which is evaluated, viewed, counted and compiled"
            elif not self.path.exists():
                hint = did_you_mean(self.path.name, pretrained_names(), what="the pretrained network ")
            raise ValueError(f"{self.path}: not a run directory (it has no config.json){hint}")
        config = config_from_json(read_text(path, MOST_BYTES), str(path))
        started = self.environment().get("config")
        if started is not None:
            check_unchanged(config, started, "the run was started", path)
        return config

    def environment(self) -> dict[str, Any]:
        """What a run was started in; empty where nothing says so.

        Older runs are without ``threads``, ``num_classes`` or ``config``.

        Raises:
            ValueError: a damaged ``environment.json``.
        """
        path = self.path / "environment.json"
        if not path.exists():
            return {}
        try:
            values = unsealed(read_text(path, MOST_BYTES))
            unknown = values.keys() - _ENVIRONMENT.keys()
            if unknown:
                raise ValueError(f"nothing is called {min(unknown)!r}")
            wrong = [key for key, value in values.items() if not isinstance(value, _ENVIRONMENT[key] | None)]
            if wrong:
                raise ValueError(f"{wrong[0]} is of another kind")
            for key, largest in _LARGEST.items():
                if values.get(key) is not None and not 1 <= values[key] <= largest:
                    raise ValueError(f"{key}={short(values[key])}: allowed is a whole number from 1 to {largest}")
            return values
        except ValueError as error:
            raise ValueError(
                f"{path}: damaged ({error}); put it back from a copy, or take it away and give --data-dir"
            ) from None

    def data_dir(self) -> Path:
        """Where the data lay when the run was started."""
        found = self.environment().get("data_dir")
        if found is None:
            raise ValueError(f"{self.path}: environment.json does not say where the data is; give --data-dir")
        return Path(found)

    def remove_parts(self) -> None:
        """Removes what a process that was killed has left half-written; for the one that holds the run."""
        for folder in (self.path, self.snapshots):
            for part in folder.glob(f"*{PART}"):
                if _is_part(part.name):
                    part.unlink(missing_ok=True)

    def extend(self, config: Config) -> None:
        """Stores the config of a run that goes on to more epochs than it had.

        Raises:
            ValueError: of a run that this one is not the beginning of.
        """
        present = self.config()
        if present != config:
            check_unchanged(config, present.model_dump(mode="json"), "the run was stored", self.path / "config.json")
            write_whole(self.path / "config.json", config.to_json().encode())

    def whole(self) -> RunDirectory | None:
        """The run that this one is a part of, as one of its seeds or its baseline; None where it stands alone."""
        path = self.path.absolute()
        for above in (path.parent, path.parent.parent):
            found = RunDirectory(above)
            try:
                folders = found.config().singles() if found.exists else {}
            except ValueError:  # of something else that has a config.json
                continue
            if path.relative_to(above) in map(Path, folders):
                return found
        return None

    def is_finished(self, config: Config) -> bool:
        """Whether a single run has all epochs of its config.

        Raises:
            ValueError: it has more.
        """
        done = len(self.metrics())
        if done > config.epochs:
            raise ValueError(f"{self.path}: has {done} epochs of {config.epochs}; put its files back from a copy")
        return done == config.epochs

    def members(self, config: Config | None = None) -> Iterator[tuple[RunDirectory, Config]]:
        """The single runs: one per seed, each with its baseline after it; of the stored config, or of another."""
        for folder, single in (config or self.config()).singles().items():
            yield RunDirectory(self.path / folder), single

    def metrics(self) -> list[EpochMetrics]:
        """The epochs done so far.

        Raises:
            ValueError: a damaged ``metrics.jsonl``; the line is named.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        found: list[EpochMetrics] = []
        for number, line in enumerate(read_text(path, _LARGEST_METRICS).splitlines(), 1):
            try:
                found.append(_metrics(unsealed(line)))
                if found[-1].epoch != found[0].epoch + number - 1:
                    raise ValueError(f"epoch {found[-1].epoch} does not follow epoch {found[-2].epoch}")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: damaged ({error}); put it back from a copy") from None
        return found

    def write_metrics(self, metrics: list[EpochMetrics]) -> None:
        lines = "".join(json.dumps(sealed(dataclasses.asdict(m))) + "\n" for m in metrics)
        write_whole(self.path / "metrics.jsonl", lines.encode())


def _metrics(values: dict[str, Any]) -> EpochMetrics:
    kinds = {field.name: field.type for field in dataclasses.fields(EpochMetrics)}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"nothing is called {name!r}")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole and value >= 0 if kinds[name] == "int" else whole or isinstance(value, float)):
            raise ValueError(f"{name}: expected a {'whole number' if kinds[name] == 'int' else 'number'}, got {short(value)}")
    missing = [name for name in kinds if name not in values and name != "evaluations"]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    return EpochMetrics(**values)


def _check_new(path: Path) -> None:
    """Raises ``ValueError`` unless a run can begin there: nothing is there, or only what one leaves that was killed at once."""
    if not path.exists():
        return
    if not path.is_dir() or any(
        entry.name not in ("environment.json", LOCK) and not _is_part(entry.name) for entry in path.iterdir()
    ):
        raise ValueError(f"{path}: exists already; name a new directory with --out, or continue it with dnw resume")


def _is_part(name: str) -> bool:
    """Whether a file of ours is called so while it is written."""
    return name.endswith(PART) and any(fnmatchcase(name, f"{own.rpartition('/')[2]}.*") for own in FILES)


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


_ENVIRONMENT: dict[str, type] = {
    "dnw": str,
    "commit": str,
    "torch": str,
    "python": str,
    "machine": str,
    "threads": int,
    "accelerator": str,
    "graph_kernels": str,
    "data_dir": str,
    "num_classes": int,
    "config": dict,
}


def _environment(data_dir: Path, device: str) -> dict[str, Any]:
    return {
        "dnw": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else None,
        "graph_kernels": graph_kernels(),
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
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        known = subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, timeout=10)
        if known.returncode:  # installed, perhaps within somebody's own checkout
            return None
        commit = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() or None
