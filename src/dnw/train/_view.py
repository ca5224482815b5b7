"""Pictures of runs: one HTML file for each, and beside another run."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnw.count import graphs_of, parameter_of
from dnw.recipes._config import Config
from dnw.train._network import make_model, num_classes_of_run
from dnw.train._run import RunDirectory
from dnw.view import LayersRecord, NothingToShowError, Record, read_snapshots, record, record_layers, write_page

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
        ValueError: no run directory, one without snapshots or with damaged ones, or a second run without graphs beside one
            that has them.
        OSError: the file cannot be written.
    """
    first, *others = map(RunDirectory, paths)
    if others:
        page = first.path / f"view-beside-{others[0].path.resolve().name}.html"
        records = _records([next(iter(run.members())) for run in (first, *others)])
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
    return _graph_record(*next(iter(RunDirectory(path).members())))


class Page:
    """The page of one run while it trains: written again after an epoch where that takes little of the time.

    Args:
        run: whose page it is; the page of a baseline shows the run above it as well.
        config: of the run.
        model: its network.
    """

    def __init__(self, run: RunDirectory, config: Config, model: nn.Module) -> None:
        self._run, self._config, self._model = run, config, model
        self._cost, self._written, self._warned = 0.0, -1e9, False

    def refresh(self, *, last: bool) -> None:
        """After an epoch; the last time in any case. Whatever befalls a page, training goes on; once, a warning says what."""
        started = time.monotonic()
        if not last and started - self._written < self._cost / _MOST_TIME:
            return
        path, above = self._run.path, RunDirectory(self._run.path.parent)
        reload = None if last else _SECONDS_TO_RELOAD
        try:
            if path.name == "baseline" and above.page.exists():
                view_runs([above.path], reload=reload)
            if last and (path / "baseline").is_dir():
                reload = _SECONDS_TO_RELOAD  # the baseline comes now
            write_page(_records([(self._run, self._config)], self._model), self._run.page, reload=reload)
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


def _with_baseline(run: RunDirectory) -> list[Record] | list[LayersRecord]:
    first, *others = run.members()
    beside = [other for other in others if other[1].seed == first[1].seed and any(other[0].snapshots.glob("step-*.npz"))]
    return _records([first, *beside])


def _records(
    members: Sequence[tuple[RunDirectory, Config]], model: nn.Module | None = None
) -> list[Record] | list[LayersRecord]:
    """Of single runs: their graphs, or where the first has none, the layers of all."""
    run, config = members[0]
    model = _model(run, config) if model is None else model
    if graphs_of(model):
        return [_graph_record(run, config, model), *(_graph_record(*other) for other in members[1:])]
    return [_layers_record(run, config, model), *(_layers_record(*other) for other in members[1:])]


def _model(member: RunDirectory, config: Config) -> nn.Module:
    """The network of a run; its weights do not matter."""
    return make_model(config, num_classes_of_run(member) or _ANY_CLASSES)


def _graph_record(member: RunDirectory, config: Config, model: nn.Module | None = None) -> Record:
    model = _model(member, config) if model is None else model
    sizes = {parameter_of(name): graph.weight.numel() for name, graph in graphs_of(model).items()}
    with _naming(member):
        return record(model, list(read_snapshots(member.snapshots, sizes)), **_told(member, config))


def _layers_record(member: RunDirectory, config: Config, model: nn.Module | None = None) -> LayersRecord:
    model = _model(member, config) if model is None else model
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    device = next(parameter.device for parameter in model.parameters())
    image = torch.zeros(1, len(config.data.mean), config.data.image_size, config.data.image_size, device=device)
    with _naming(member):
        return record_layers(model, read_snapshots(member.snapshots, sizes), example=image, **_told(member, config))


def _told(member: RunDirectory, config: Config) -> dict[str, Any]:
    """What a picture says of a run."""
    top = member.path.resolve()
    while top.name in ("baseline", f"seed-{config.seed}"):
        top = top.parent
    metrics = [dataclasses.asdict(m) for m in member.metrics()]
    return {"name": top.name, "about": f"{config.method}, seed {config.seed}", "metrics": metrics}


@contextmanager
def _naming(member: RunDirectory) -> Iterator[None]:
    """Errors name the run, or a file of it."""
    try:
        yield
    except (ValueError, RuntimeError, IndexError) as error:
        kind = NothingToShowError if isinstance(error, NothingToShowError) else ValueError
        where = "" if str(error).startswith(str(member.path)) else f"{member.path}: "
        raise kind(f"{where}{error}") from None
