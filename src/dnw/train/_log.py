"""What a run shows while it trains: where it is within the epoch, one line per epoch, a table at the end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dnw._wiring.edges import Summary
from dnw.recipes._config import Config
from dnw.train._images import ImageData
from dnw.train._run import EpochMetrics

SECONDS_BETWEEN_LINES = 30.0
"""Of an epoch, where output goes into a file or a pipe."""


class Log:
    """Progress on standard output; silent in all processes but the first.

    Args:
        quiet: silent in the first, too.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.enabled = not quiet
        self._console = Console(highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        if self.enabled:
            self._console.print(text, markup=False)

    def data(self, config: Config, data: ImageData) -> None:
        """The first line, before anything takes long."""
        train, test = map(len, data)
        classes = len(data[0].classes)
        what = "held out of them" if config.data.validation else "for testing"
        self.line(f"{config.recipe}: {train:,} images for training and {test:,} {what}, of {classes} classes")

    def start(self, config: Config, path: Path, summary: Summary, done: int) -> None:
        density = summary.active / summary.candidates
        self.line(
            f"{config.recipe}: rule {config.method}, seed {config.seed}, {summary.active:,} of {summary.candidates:,} "
            f"candidate edges ({density:.1%}), {config.epochs} epoch{'s' if config.epochs > 1 else ''} in {path}"
        )
        if done:
            self.line(f"continuing after epoch {done}")

    def epoch(self, m: EpochMetrics, epochs: int) -> None:
        self.line(
            f"epoch {m.epoch:>{len(str(epochs))}}/{epochs}  loss {m.train_loss:.3f}  test loss {m.test_loss:.3f}  "
            f"accuracy {m.top1:6.2%}  edges {m.active:,}  entered {m.entered:,}  "
            + (f"live nodes {m.live}/{m.nodes}  " if m.nodes else "")
            + (f"evaluations {m.evaluations:.1f}  " if m.evaluations else "")
            + f"{m.seconds:.1f} s"
        )

    def results(self, runs: Sequence[tuple[Config, list[EpochMetrics]]]) -> None:
        """A line per rule: accuracy at the best and at the last epoch, over seeds."""
        for rule in dict.fromkeys(config.method for config, _ in runs):
            metrics = [m for config, m in runs if config.method == rule and m]  # a run that was imported finished has none
            if not metrics:
                continue
            best = [max(x.top1 for x in m if x.active == m[-1].active) for m in metrics]
            last = [m[-1].top1 for m in metrics]
            seeds = f"  ({len(metrics)} seeds)" if len(metrics) > 1 else ""
            what = "validation" if runs[0][0].data.validation else "test"
            self.line(f"{rule:>10}: {what} accuracy {_mean(last)} at the last epoch, {_mean(best)} at the best{seeds}")

    def end(self, run: Path, page: Path) -> None:
        """Where a run lies, and what can be done with it."""
        self.line(f"run: {run}")
        if page.exists():
            self.line(f"  look at it:  {page}   (dnw view {run} --open)")
        self.line(f"  test it:     dnw eval {run}")
        self.line(f"  compile it:  dnw compile {run} --out net.dnw")

    @contextmanager
    def progress(self, batches: int, epoch: int, epochs: int) -> Iterator[Callable[[], None]]:
        """A bar over the batches of an epoch, or in a file a line now and then, each with the time that the run still takes.

        Yields:
            The function that moves it on by one batch.
        """
        name, started = f"epoch {epoch + 1}/{epochs}", time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        terminal = self._console.is_terminal
        done, said = 0, started

        def advance() -> None:
            nonlocal done, said
            done, now = done + 1, time.monotonic()
            left = (now - started) / done * (batches * (epochs - epoch) - done)
            if terminal:
                bar.update(task, advance=1, left=f"{_clock(left)} left")
            elif now - said >= SECONDS_BETWEEN_LINES:
                said = now
                self.line(f"{name}  step {done}/{batches}  about {_clock(left)} left")

        with Progress(*columns, console=self._console, transient=True, disable=not (self.enabled and terminal)) as bar:
            task = bar.add_task(name, total=batches, left="")
            yield advance


def _clock(seconds: float) -> str:
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    return f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min" if minutes else f"{round(seconds)} s"


def _mean(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2%}"
    return f"{statistics.mean(values):.2%} +- {statistics.stdev(values):.2%}"
