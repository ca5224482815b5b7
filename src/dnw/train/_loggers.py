"""Where a run's metrics go besides its own ``metrics.jsonl``.

Contract: a logger is any callable that takes the directory of a single run and the metrics of an epoch. It is called after
every epoch, by the first process alone; of a run that was killed, it may get an epoch again, with the same
numbers but the seconds; and of a finished run that is resumed it gets all.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dnw._files import write_whole
from dnw.train._run import EpochMetrics, RunDirectory

Logger = Callable[[Path, EpochMetrics], object]


class CSVLogger:
    """Writes ``metrics.csv`` into the run directory, a row an epoch: what ``metrics.jsonl`` holds, for spreadsheets."""

    def __call__(self, path: Path, metrics: EpochMetrics) -> None:
        rows = [dataclasses.asdict(one) for one in RunDirectory(path).metrics()]
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_whole(path / "metrics.csv", text.getvalue().encode())


class TensorBoardLogger:
    """Writes every number of an epoch as a scalar for TensorBoard.

    Args:
        folder: of all runs, each under its own path in it (below the present folder, else its last two names); by default
            ``tensorboard`` in each run directory.

    Raises:
        ImportError: TensorBoard is not installed (extra ``tensorboard``).
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            advice = "install its extra: pip install 'dnw[tensorboard]'"
            raise ModuleNotFoundError(f"TensorBoard is not installed; {advice}", name="tensorboard") from error
        self._folder = None if folder is None else Path(folder)
        self._writer = SummaryWriter
        self._writers: dict[Path, Any] = {}

    def __call__(self, path: Path, metrics: EpochMetrics) -> None:
        if path not in self._writers:
            folder = path / "tensorboard" if self._folder is None else self._folder / _inside(path)
            self._writers[path] = self._writer(str(folder), purge_step=metrics.epoch)
        for name, value in dataclasses.asdict(metrics).items():
            if name not in ("epoch", "step"):
                self._writers[path].add_scalar(name, value, metrics.epoch)
        self._writers[path].flush()


def _inside(path: Path) -> Path:
    """A relative path without ``..`` for a run."""
    whole, here = path.resolve(), Path.cwd()
    return whole.relative_to(here) if whole.is_relative_to(here) and whole != here else Path(*whole.parts[-2:])


LOGGERS: dict[str, Callable[[], Logger]] = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}
"""What ``--log`` of the command names."""
