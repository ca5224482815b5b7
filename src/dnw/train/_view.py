"""Pictures of runs: one HTML file for each, and beside another run."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dnw.count import graphs_of, parameter_of
from dnw.recipes._config import Config
from dnw.train._network import make_model, num_classes_of_run
from dnw.train._run import RunDirectory
from dnw.view import NothingToShowError, Record, read_snapshots, record, write_page

_MOST_TIME = 0.05
"""Of the time of a training run, what refreshing its page may take."""
_SECONDS_TO_RELOAD = 30
_ANY_CLASSES = 10
"""Of a run that says nowhere how many it has; the graphs of most networks are the same for any number."""


def view_runs(paths: Sequence[str | Path], out: str | Path | None = None, *, reload: int | None = None) -> Path:
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
    first, *others = map(RunDirectory, paths)
    if others:
        page = first.path / f"view-beside-{others[0].path.resolve().name}.html"
        records = [_record(*next(iter(run.members()))) for run in (first, *others)]
    else:
        page, records = first.page, _with_baseline(first)
    page = page if out is None else Path(out)
    write_page(records, page, reload=reload)
    return page


def run_record(path: str | Path) -> Record:
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
        self._run, self._config, self._model = run, config, model
        self._has_graphs = bool(graphs_of(model))
        self._cost, self._written, self._warned = 0.0, -1e9, False

    def refresh(self, *, last: bool) -> None:
        """After an epoch; the last time in any case. Whatever befalls a page, training goes on; once, a warning says what."""
        started = time.monotonic()
        if not self._has_graphs or (not last and started - self._written < self._cost / _MOST_TIME):
            return
        path, above = self._run.path, RunDirectory(self._run.path.parent)
        reload = None if last else _SECONDS_TO_RELOAD
        try:
            if path.name == "baseline" and above.page.exists():
                view_runs([above.path], reload=reload)
            if last and (path / "baseline").is_dir():
                reload = _SECONDS_TO_RELOAD  # the baseline comes now
            write_page([_record(self._run, self._config, self._model)], self._run.page, reload=reload)
        except NothingToShowError:
            pass
        except Exception as error:  # a picture is not worth a training run
            if not self._warned:
                self._warned = True
                # of other errors the text alone says little
                reason = error if isinstance(error, (OSError, ValueError)) else repr(error)
                warnings.warn(f"no page of this run: {reason}", stacklevel=2)
        self._written = time.monotonic()
        self._cost = self._written - started


def _with_baseline(run: RunDirectory) -> list[Record]:
    first, *others = run.members()
    beside = [other for other in others if other[1].seed == first[1].seed and any(other[0].snapshots.glob("step-*.npz"))]
    return [_record(*first), *(_record(*other) for other in beside)]


def _record(member: RunDirectory, config: Config, model: nn.Module | None = None) -> Record:
    """Of a single run; of its model, whose weights do not matter, the graphs are shown."""
    top = member.path.resolve()
    while top.name in ("baseline", f"seed-{config.seed}"):
        top = top.parent
    if model is None:
        model = make_model(config, num_classes_of_run(member) or _ANY_CLASSES)
    sizes = {parameter_of(name): graph.weight.numel() for name, graph in graphs_of(model).items()}
    snapshots = list(read_snapshots(member.snapshots, sizes))
    metrics = [dataclasses.asdict(m) for m in member.metrics()]
    try:
        return record(model, snapshots, name=top.name, about=f"{config.method}, seed {config.seed}", metrics=metrics)
    except NothingToShowError as error:
        raise NothingToShowError(f"{member.path}: {error}") from None
    except (ValueError, RuntimeError, IndexError) as error:
        raise ValueError(f"{member.path}: {error}") from None
