"""Pictures of runs: one HTML file for each, and beside another run."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dnw.count import graphs_of
from dnw.train._build import make_model
from dnw.train._config import Config
from dnw.train._run import RunDirectory
from dnw.view import Record, read_snapshots, record, write_page

_SHARE = 0.05
"""Of the time of a training run, what refreshing its page may take."""
_SECONDS_TO_RELOAD = 30


def view_runs(paths: Sequence[Path], out: Path | None = None, *, reload: int | None = None) -> Path:
    """Writes the page of a run, or of two beside each other.

    Of a run of several seeds the first is shown; where it has a baseline and no other run stands beside it, that does.

    Args:
        paths: one run directory or two.
        out: where to write; by default ``view.html`` in the first run, or ``view-beside-<second>.html``.
        reload: see :func:`dnw.view.write_page`.

    Raises:
        ValueError: no run directory, or one without snapshots, with damaged ones, or without a graph.
        OSError: the file cannot be written.
    """
    if len(paths) == 1:
        out = out or paths[0] / "view.html"
        records = _with_baseline(RunDirectory(paths[0]))
    else:
        out = out or paths[0] / f"view-beside-{paths[1].resolve().name}.html"
        records = [_record(*next(iter(RunDirectory(path).members()))) for path in paths]
    write_page(records, out, reload=reload)
    return out


def run_record(path: Path) -> Record:
    """What a picture shows of a run; of its first seed, without its baseline.

    Raises:
        ValueError: no run directory, or one without snapshots, with damaged ones, or without a graph.
    """
    return _record(*next(iter(RunDirectory(path).members())))


class Page:
    """The page of one run while it trains: written again after an epoch where that takes little of the time.

    Args:
        run: whose page it is; the page of a baseline shows the run above it as well.
        config: of the run.
        model: where it has no graphs there is no page.
    """

    def __init__(self, run: RunDirectory, config: Config, model: nn.Module) -> None:
        self._run, self._config = run, config
        self._has_graphs = bool(graphs_of(model))
        self._cost, self._written = 0.0, -1e9

    def refresh(self, *, last: bool) -> None:
        """After an epoch; the last time in any case. A page that cannot be written is a warning: training goes on."""
        started = time.monotonic()
        if not self._has_graphs or (not last and started - self._written < self._cost / _SHARE):
            return
        path = self._run.path
        reload = None if last else _SECONDS_TO_RELOAD
        try:
            if path.name == "baseline" and (path.parent / "view.html").exists():
                view_runs([path.parent], reload=reload)
            if last and (path / "baseline").is_dir():
                reload = _SECONDS_TO_RELOAD  # the baseline comes now
            write_page([_record(self._run, self._config)], path / "view.html", reload=reload)
        except ValueError:  # nothing to show
            pass
        except OSError as error:
            warnings.warn(f"no page of this run: {error}", stacklevel=2)
        self._written = time.monotonic()
        self._cost = self._written - started


def _with_baseline(run: RunDirectory) -> list[Record]:
    members = list(run.members())
    seed = members[0][1].seeds
    shown = [member for member in members if member[1].seeds == seed]
    others = [(member, config) for member, config in shown[1:] if any(member.snapshots.glob("step-*.npz"))]
    return [_record(*shown[0]), *(_record(*other) for other in others)]


def _record(member: RunDirectory, config: Config) -> Record:
    (seed,) = config.seeds
    top = member.path.resolve()
    while top.name in ("baseline", f"seed-{seed}"):
        top = top.parent
    snapshots = list(read_snapshots(member.snapshots))
    if not snapshots:
        raise ValueError(f"{member.path}: no snapshots to show; a run writes them while it trains")
    metrics = [dataclasses.asdict(m) for m in member.metrics()]
    try:
        return record(make_model(config, 10), snapshots, name=top.name, about=f"{config.rule}, seed {seed}", metrics=metrics)
    except (ValueError, RuntimeError, IndexError) as error:
        raise ValueError(f"{member.path}: {error}") from None
