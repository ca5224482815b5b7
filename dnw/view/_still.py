"""Still pictures of one snapshot, for papers: SVG, PNG or whatever else matplotlib writes by a file's ending."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from dnw._files import write_whole
from dnw.view._record import GraphShape, Record

PLUS, MINUS = "#c76a00", "#1769aa"


def write_still(one: Record, path: Path, snapshot: int = -1) -> int:
    """Draws the graph of one snapshot; returns the number of bytes.

    Edges are orange where their weight is positive and blue where it is negative, the stronger the darker; dead nodes are
    faint.

    Args:
        one: the run.
        path: of the picture; its ending says of which kind.
        snapshot: which, from 0 on, or counted from the end.

    Raises:
        ValueError: there is no such snapshot, or matplotlib does not write such files.
        ModuleNotFoundError: matplotlib is not installed (``pip install dnw[plot]``).
        OSError: the file cannot be written.
    """
    count = len(one.steps)
    if not -count <= snapshot < count:
        raise ValueError(f"snapshot {snapshot}: the run has {count}, from 0 to {count - 1}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("still pictures need matplotlib: pip install dnw[plot]", name=error.name) from None
    kinds = FigureCanvasAgg.get_supported_filetypes()
    kind = path.suffix.removeprefix(".").lower()
    if kind not in kinds:
        raise ValueError(f"{path}: pictures are written as {', '.join(sorted(kinds))}")
    columns = sum(len(graph.levels) if graph.static else 4 for graph in one.graphs)
    figure = Figure(figsize=(max(5.0, 1.3 * columns), 5.0), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw(one, snapshot % count, axes)
    axes.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_whole(path, content.getvalue())
    return len(content.getvalue())


def _draw(one: Record, snapshot: int, axes: Any) -> None:
    from matplotlib.collections import LineCollection

    x, y, is_static = _places(one.graphs)
    strengths = one.strengths[snapshot].astype(np.float32) / 31
    order = np.argsort(np.abs(strengths))
    order = order[strengths[order] != 0]
    light = float(np.clip(14 / np.sqrt(len(order) + 1), 0.06, 0.9))
    lines = [_line(x, y, is_static, int(one.sources[e]), int(one.targets[e])) for e in order]
    alphas = np.clip(light * (0.15 + 0.85 * np.abs(strengths[order])), 0.01, 1)
    colors = [PLUS if strengths[e] > 0 else MINUS for e in order]
    axes.add_collection(LineCollection(lines, colors=colors, alpha=alphas, linewidths=0.6, rasterized=len(order) > 5_000))
    live = one.live[snapshot]
    size = float(np.clip(2_000 / len(x), 0.6, 14))
    axes.scatter(x[~live], y[~live], s=size, c="#b9bcc4", linewidths=0, zorder=3)
    axes.scatter(x[live], y[live], s=size, c="#22252b", linewidths=0, zorder=3)


def _line(x: np.ndarray, y: np.ndarray, is_static: np.ndarray, a: int, b: int) -> np.ndarray:
    """Places along an edge: straight, or in a ring bent towards its middle; a small loop where it is a node's own."""
    ends = np.array([[x[a], y[a]], [x[b], y[b]]])
    if is_static[a]:
        return ends
    ring = ~is_static
    middle = np.array([x[ring].mean(), y[ring].mean()])
    if a == b:
        turns = np.linspace(0, 2 * np.pi, 12)[:, None]
        return ends[:1] * 1.03 - middle * 0.03 + 0.02 * np.concatenate([np.cos(turns), np.sin(turns)], axis=1)
    bend = ends.mean(0) * 0.45 + middle * 0.55
    t = np.linspace(0, 1, 14)[:, None]
    curve: np.ndarray = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * bend + t**2 * ends[1]
    return curve


def _places(graphs: tuple[GraphShape, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where nodes lie, from left to right and from 0 to 1, and which stand in levels."""
    x: list[float] = []
    y: list[float] = []
    is_static: list[bool] = []
    column = 0.0
    for graph in graphs:
        nodes = sum(graph.levels)
        if graph.static:
            for size in graph.levels:
                x += [column] * size
                y += [1 - (i + 0.5) / size for i in range(size)]
                column += 1
        else:  # a ring that begins at the left, with the inputs
            turns = np.pi - 2 * np.pi * (np.arange(nodes) - graph.levels[0] / 2) / nodes
            x += list(column + 1.5 + 1.5 * np.cos(turns))
            y += list(0.5 + 0.48 * np.sin(turns))
            column += 4
        is_static += [graph.static] * nodes
        column += 0.5
    return np.array(x), np.array(y), np.array(is_static)
