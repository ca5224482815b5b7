"""What a wiring did while it trained, as curves: edges exchanged, their ages, how many ever lived, and dead nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dnw.view._figure import save_figure
from dnw.view._recorder import read_records


def write_history(files: Mapping[str, str | Path], path: str | Path) -> int:
    """Draws the records of one or several wirings; returns the number of bytes.

    Four pictures over the steps of training, a colour each run: edges that came in, per step and active edge, between two
    records; the median age of active edges, as a share of the training so far, with the quarter on either side of it (of
    several layers, the mean of their quartiles); the share of candidates that were ever active; targets and sources without an
    active edge (rows and columns of the weights).

    Args:
        files: of a :class:`Recorder` (``wiring.jsonl`` of a run), by the names that stand in the legend.
        path: of the picture; its ending says of which kind.

    Raises:
        ValueError: a file holds something else, or fewer than two records; or matplotlib does not write such files.
        ModuleNotFoundError: matplotlib is not installed (``pip install dnw[plot]``).
        OSError: a file cannot be read or written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("curves need matplotlib: pip install dnw[plot]", name=error.name) from None
    found = {name: _by_step(read_records(file)) for name, file in files.items()}
    for name, records in found.items():
        if len(records) < 2:
            raise ValueError(f"{files[name]}: {len(records)} records; curves need two or more, of different steps")
    figure = Figure(figsize=(9, 6), layout="constrained")
    churn, age, ever, dead = figure.subplots(2, 2, sharex=True).flat
    for number, (name, records) in enumerate(found.items()):
        colour = f"C{number}"
        steps = np.array([r["step"] for r in records])
        entered = np.array([r["total"]["entered"] for r in records][1:])
        active = np.array([r["total"]["active"] for r in records][1:])
        churn.plot(steps[1:], entered / active / np.diff(steps), color=colour, label=name)
        low, median, high = (np.array([_age(r, q) / max(1, r["step"]) for r in records][1:]) for q in (1, 2, 3))
        age.plot(steps[1:], median, color=colour)
        age.fill_between(steps[1:], low, high, color=colour, alpha=0.15, linewidth=0)
        ever.plot(steps, [r["total"]["ever_active"] for r in records], color=colour)
        for side, style in (("dead_targets", "-"), ("dead_sources", "--")):
            if all(side in r["total"] for r in records):
                label = side.removeprefix("dead_") if not number else None
                dead.plot(steps, [r["total"][side] for r in records], style, color=colour, label=label)
    churn.set_yscale("log")
    for axes, title in (
        (churn, "edges come in, per step and active edge"),
        (age, "age of active edges, share of training"),
        (ever, "candidates ever active, share"),
        (dead, "targets and sources without an edge"),
    ):
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in (ever, dead):
        axes.set_xlabel("step")
    churn.legend(fontsize="small")
    if dead.lines:
        dead.legend(fontsize="small")
    return save_figure(figure, Path(path))


def _by_step(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a step: where there are several the last, with all edges that came in since the step before."""
    found: list[dict[str, Any]] = []
    for record in records:
        if found and found[-1]["step"] == record["step"]:
            record["total"]["entered"] += found.pop()["total"]["entered"]
        found.append(record)
    return found


def _age(record: Mapping[str, Any], quartile: int) -> float:
    """A quartile of the ages of active edges, the mean over layers by their number of edges."""
    layers = [layer for layer in record["layers"].values() if layer["active"]]
    return float(np.average([x["age"][quartile] for x in layers], weights=[x["active"] for x in layers]))
