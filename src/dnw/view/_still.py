"""Still pictures of one snapshot, for papers: SVG, PNG or whatever else matplotlib writes by a file's ending."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from dnw._files import write_whole
from dnw.view._record import LEVELS_OF_STRENGTH, GraphShape, Record

PLUS, MINUS = "#c76a00", "#1769aa"
_LINES = 3_000
"""Up to so many edges are lines; more are a density on a raster of so many dots."""
_RASTER = (1_000, 1_600)


def write_still(one: Record, path: Path, snapshot: int = -1) -> int:
    """Draws the graph of one snapshot; returns the number of bytes.

    Edges are orange where their weight is positive and blue where it is negative, the stronger the darker; dead nodes are
    faint. Above 3,000 edges lines become densities, as in the page.

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
        import matplotlib
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
    with matplotlib.rc_context({"svg.hashsalt": "dnw"}):  # the same picture, the same file
        figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_whole(path, content.getvalue())
    return len(content.getvalue())


def _draw(one: Record, snapshot: int, axes: Any) -> None:
    from matplotlib.collections import LineCollection

    x, y, middles = _places(one.graphs)
    strengths = one.strengths[snapshot].astype(np.float32) / LEVELS_OF_STRENGTH
    order = np.argsort(np.abs(strengths), kind="stable")
    order = order[strengths[order] != 0]
    light = float(np.clip(14 / np.sqrt(len(order) + 1), 0.1, 0.9))
    amounts = light * (0.15 + 0.85 * np.abs(strengths[order]))
    left, right = x.min() - 0.3, x.max() + 0.3
    axes.set_xlim(left, right)
    axes.set_ylim(-0.04, 1.04)
    if len(order) <= _LINES:
        lines = [_line(x, y, middles, int(one.sources[e]), int(one.targets[e])) for e in order]
        colors = [PLUS if strengths[e] > 0 else MINUS for e in order]
        axes.add_collection(LineCollection(lines, colors=colors, alpha=np.clip(amounts, 0.01, 1), linewidths=0.6))
    elif len(order):
        lit = np.stack(
            [
                _light(
                    [_line(x, y, middles, int(one.sources[e]), int(one.targets[e])) for e in order[own]],
                    amounts[own],
                    left,
                    right,
                )
                for own in (strengths[order] > 0, strengths[order] < 0)
            ]
        )
        axes.imshow(_colours(lit), extent=(left, right, -0.04, 1.04), aspect="auto", interpolation="none")
    live = one.live[snapshot]
    size = float(np.clip(2_000 / len(x), 0.6, 14))
    axes.scatter(x[~live], y[~live], s=size, c="#b9bcc4", linewidths=0, zorder=3)
    axes.scatter(x[live], y[live], s=size, c="#22252b", linewidths=0, zorder=3)


def _light(lines: list[np.ndarray], amounts: np.ndarray, left: float, right: float) -> np.ndarray:
    """How much light lines leave on each dot of a raster, whose first row is the top: ``[height, width]``."""
    height, width = _RASTER
    sums = np.zeros(height * width)
    for first in range(0, len(lines), 4_000):
        dots, shares = [], []
        for amount, line in zip(amounts[first : first + 4_000], lines[first : first + 4_000], strict=True):
            places = (line - (left, -0.04)) / (right - left, 1.08) * (width - 1, height - 1)
            ends = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(places, axis=0)).max(1))])
            steps = np.arange(int(ends[-1]) + 1)
            columns = np.interp(steps, ends, places[:, 0]).round().astype(np.int64)
            rows = np.clip(height - 1 - np.interp(steps, ends, places[:, 1]), 0, height - 1.001)
            whole = rows.astype(np.int64)
            dots += [whole * width + columns, (whole + 1) * width + columns]
            shares += [amount * (1 - rows + whole), amount * (rows - whole)]
        if dots:
            sums += np.bincount(np.concatenate(dots), np.concatenate(shares), height * width)
    return sums.reshape(height, width)


def _colours(lit: np.ndarray) -> np.ndarray:
    """Of the light of positive and of negative edges ``[2, height, width]``, exposed so that most lit dots stay readable."""
    total = lit.sum(0)
    exposure = min(1.6, 1.4 / np.quantile(total[total > 0], 0.9))
    cover = 1 - np.exp(-exposure * total)
    prevails = lit**3 / np.maximum((lit**3).sum(0), 1e-30)
    inks = np.array([[int(ink[i : i + 2], 16) / 255 for i in (1, 3, 5)] for ink in (PLUS, MINUS)])
    colours: np.ndarray = 1 - cover[..., None] * (1 - np.einsum("khw,kc->hwc", prevails, inks))
    return colours


def _line(x: np.ndarray, y: np.ndarray, middles: np.ndarray, a: int, b: int) -> np.ndarray:
    """Places along an edge: straight, or in a ring bent towards its middle; a small loop where it is a node's own."""
    ends = np.array([[x[a], y[a]], [x[b], y[b]]])
    if np.isnan(middles[a, 0]):
        return ends
    if a == b:
        turns = np.linspace(0, 2 * np.pi, 12)[:, None]
        outwards = (ends[0] - middles[a]) / np.linalg.norm(ends[0] - middles[a])
        return ends[:1] + 0.02 * (outwards + np.concatenate([np.cos(turns), np.sin(turns)], axis=1))
    bend = ends.mean(0) * 0.45 + middles[a] * 0.55
    t = np.linspace(0, 1, 14)[:, None]
    curve: np.ndarray = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * bend + t**2 * ends[1]
    return curve


def _places(graphs: tuple[GraphShape, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where nodes lie, from left to right and from 0 to 1, and ``[nodes, 2]`` the middles of their rings (NaN: no ring)."""
    x: list[float] = []
    y: list[float] = []
    middles: list[tuple[float, float]] = []
    column = 0.0
    for graph in graphs:
        nodes = sum(graph.levels)
        if graph.static:
            for size in graph.levels:
                x += [column] * size
                y += [1 - (i + 0.5) / size for i in range(size)]
                column += 1
            middles += [(np.nan, np.nan)] * nodes
        else:  # a ring that begins at the left, with the inputs
            turns = np.pi - 2 * np.pi * (np.arange(nodes) - graph.levels[0] / 2) / nodes
            x += list(column + 1.5 + 1.5 * np.cos(turns))
            y += list(0.5 + 0.48 * np.sin(turns))
            middles += [(column + 1.5, 0.5)] * nodes
            column += 4
        column += 0.5
    return np.array(x), np.array(y), np.array(middles)
