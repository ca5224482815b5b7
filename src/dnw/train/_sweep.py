"""A sweep: one recipe at several values of one setting, as runs side by side, with a plot of accuracy against it.

Contract: each value has a run directory of its own, so a sweep that was stopped goes on where it was, and more values can be
added later.
"""

from __future__ import annotations

import glob
import importlib.util
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dnw.recipes import config_of
from dnw.recipes._config import Config, alike, override
from dnw.train._log import Log
from dnw.train._loggers import Logger
from dnw.train._loop import resume, train
from dnw.train._run import RunDirectory, TrainingStoppedError
from dnw.view._figure import save_figure


def sweep(
    recipe: str | Path | Config,
    key: str,
    values: Sequence[Any],
    *,
    data_dir: str | Path = "data",
    out: str | Path,
    log: Log | None = None,
    loggers: Sequence[Logger] = (),
) -> dict[str, Path]:
    """Trains a config at every value of one setting; runs that are there already are continued.

    A run whose loss is not finite any more is left as it is, and the others are trained.

    Args:
        recipe: its name, a config, or the path of a stored ``config.json``.
        key: the setting, such as ``density`` or ``rule``.
        values: as they are written on the command line, or numbers.
        data_dir: where the data lies.
        out: directory of the runs, ``<key>-<value>`` each.
        log, loggers: as for :func:`train`.

    Returns:
        The run directories of all values that have been trained there, now or before, by value.

    Raises:
        ValueError: a value that is not allowed (nothing has been trained then), or a run that is there with other settings.
    """
    config, out, values = config_of(recipe), Path(out), [str(value) for value in values]
    if len(set(values)) != len(values) or not values:
        raise ValueError(f"--over {key}={','.join(values)}: give one or more different values")
    for value in values:
        if not re.fullmatch(r"[A-Za-z0-9_.+-]+", value) or value.startswith("."):
            raise ValueError(
                f"--over {key}={value}: a value names a directory, so only letters, digits and _ . + - are allowed"
            )
    configs = {value: override(config, [f"{key}={value}"]) for value in values}
    runs = {value: RunDirectory(out / f"{key}-{value}") for value in values}
    for value, run in _there(out, key).items():  # all of them are drawn
        if value not in configs:
            configs[value] = override(config, [f"{key}={value}"])
        if alike(run.config()) != alike(configs[value]):
            raise ValueError(f"{run.path}: a run with other settings is there already; name another directory with --out")
    log = log or Log()
    for value, run in runs.items():
        try:
            if run.exists:
                resume(run.path, data_dir=data_dir, log=log, loggers=loggers)
            else:
                train(configs[value], data_dir=data_dir, out=run.path, log=log, loggers=loggers)
        except TrainingStoppedError as error:
            log.line(f"{key}={value}: {error}")
    finished = {value: run.path for value, run in _there(out, key).items() if _is_finished(run)}
    return dict(sorted(finished.items(), key=lambda item: _number(item[0])))


def _there(out: Path, key: str) -> dict[str, RunDirectory]:
    """The runs of a sweep by the values of its setting, those of earlier calls too."""
    runs = {path.name.removeprefix(f"{key}-"): RunDirectory(path) for path in sorted(out.glob(f"{glob.escape(key)}-*"))}
    return {value: run for value, run in runs.items() if run.exists}


def _is_finished(run: RunDirectory) -> bool:
    return all(member.is_finished(config) for member, config in run.members())


def check_plot() -> None:
    """Raises ``ImportError`` where matplotlib is not installed (extra ``plot``)."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("matplotlib is not installed; install the plot extra: pip install 'dnw[plot]'")


def plot_sweep(paths: Mapping[str, Path], key: str, file: str | Path) -> None:
    """Plots test accuracy after the last epoch against the setting, with the range over seeds, as SVG, PDF or PNG.

    Values that are numbers lie on a logarithmic axis; others stand side by side.

    Raises:
        ImportError: matplotlib is not installed (extra ``plot``).
        ValueError: there is no finished run.
    """
    check_plot()
    from matplotlib.figure import Figure

    file = Path(file)
    if not paths:
        raise ValueError("there is no finished run to plot")
    accuracies = accuracies_of(paths, key)
    numbers = [_number(value) for value in paths]
    numeric = min(numbers) > 0
    at = numbers if numeric else list(range(len(numbers)))
    position = dict(zip(paths, at, strict=True))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for curve, found in accuracies.items():
        means = [statistics.mean(runs) for runs in found.values()]
        below = [mean - min(runs) for mean, runs in zip(means, found.values(), strict=True)]
        above = [max(runs) - mean for mean, runs in zip(means, found.values(), strict=True)]
        style = "-" if numeric else ""
        axes.errorbar([position[v] for v in found], means, [below, above], marker="o", linestyle=style, capsize=3, label=curve)
    if numeric:
        axes.set_xscale("log")
    axes.set_xticks(at, list(paths), minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("density (part of the weights that is kept)" if key == "density" else key)
    axes.set_ylabel("test accuracy after the last epoch, %")
    axes.grid(alpha=0.3)
    if len(accuracies) > 1:
        axes.legend()
    save_figure(figure, file)


def accuracies_of(paths: Mapping[str, Path], key: str) -> dict[str, dict[str, list[float]]]:
    """Test accuracies after the last epoch in percent, one per seed, by rule (unless it is what differs) and by value."""
    found: dict[str, dict[str, list[float]]] = {}
    for value, path in paths.items():
        for member, config in RunDirectory(path).members():
            if key != "rule" or config.rule == value:  # a baseline is no value of the setting
                curve = "" if key == "rule" else config.method
                found.setdefault(curve, {}).setdefault(value, []).append(100 * member.metrics()[-1].top1)
    return found


def _number(text: str) -> float:
    """A value as a number above 0; -1 where it is none."""
    try:
        return float(text)
    except ValueError:
        return -1.0
