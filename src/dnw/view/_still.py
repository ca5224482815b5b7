"""Still pictures of one snapshot, for papers: SVG, PNG or whatever else matplotlib writes by a file's ending."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dnw.view._figure import save_figure
from dnw.view._layout import BEND, RADII, Layout, layout_of
from dnw.view._record import LEVELS_OF_STRENGTH, Record

PLUS, MINUS = "#c76a00", "#1769aa"
"""Colours of edges, as in the page by day (page.css)."""
_LINES = 3_000
"""Up to so many edges are lines; more are a density on a raster of so many dots."""
_RASTER = (1_000, 1_600)
_TOP, _BOTTOM = -0.04, 1.04


def write_still(one: Record, path: Path, snapshot: int = -1) -> int:
    """Draws the graph of one snapshot; returns the number of bytes.

    Nodes lie as in the page: inputs at the left, outputs at the right, dynamic graphs as rings. Edges are orange where their
    weight is positive and blue where it is negative, the stronger the darker; dead nodes are faint. Above 3,000 edges lines
    become densities, as in the page.

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
    layout = layout_of(one.graphs)
    figure = Figure(figsize=(max(5.0, 1.3 * layout.columns), 5.0), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw(one, layout, snapshot % count, axes)
    axes.set_axis_off()
    return save_figure(figure, path)


def _draw(one: Record, layout: Layout, snapshot: int, axes: Any) -> None:
    """Draws on axes that are measured in columns across and, down, in heights of the picture."""
    from matplotlib.collections import LineCollection

    nodes = np.stack([layout.x * layout.columns, layout.y], axis=1)
    rings = [np.nan if graph.static else x * layout.columns for graph, x in zip(one.graphs, layout.middles, strict=True)]
    middles = np.repeat(rings, [sum(graph.levels) for graph in one.graphs])
    strengths = one.strengths[snapshot].astype(np.float32) / LEVELS_OF_STRENGTH
    order = np.argsort(np.abs(strengths), kind="stable")
    order = order[strengths[order] != 0]
    light = float(np.clip(14 / np.sqrt(len(order) + 1), 0.1, 0.9))
    amounts = light * (0.15 + 0.85 * np.abs(strengths[order]))
    positive = strengths[order] > 0
    left, right = nodes[:, 0].min() - 0.3, nodes[:, 0].max() + 0.3
    axes.set_xlim(left, right)
    axes.set_ylim(_BOTTOM, _TOP)

    def lines(edges: np.ndarray) -> list[np.ndarray]:
        return [_line(nodes[a], nodes[b], middles[a]) for a, b in zip(one.sources[edges], one.targets[edges], strict=True)]

    if len(order) > _LINES:
        lit = np.stack([_light(lines(order[own]), amounts[own], left, right) for own in (positive, ~positive)])
        axes.imshow(_exposed(lit), extent=(left, right, _BOTTOM, _TOP), aspect="auto", interpolation="none")
    elif len(order):  # an empty collection cannot have an alpha for each line
        colours = np.where(positive, PLUS, MINUS)
        axes.add_collection(LineCollection(lines(order), colors=colours, alpha=np.clip(amounts, 0.01, 1), linewidths=0.6))
    live = one.live[snapshot]
    size = float(np.clip(2_000 / len(nodes), 0.6, 14))
    axes.scatter(*nodes[~live].T, s=size, c="#b9bcc4", linewidths=0, zorder=3)
    axes.scatter(*nodes[live].T, s=size, c="#22252b", linewidths=0, zorder=3)


def _light(lines: list[np.ndarray], amounts: np.ndarray, left: float, right: float) -> np.ndarray:
    """How much light lines leave on each dot of a raster, whose first row is the top: ``[height, width]``."""
    height, width = _RASTER
    sums = np.zeros(height * width)
    for first in range(0, len(lines), 4_000):
        dots, parts = [], []
        for amount, line in zip(amounts[first : first + 4_000], lines[first : first + 4_000], strict=True):
            points = (line - (left, _TOP)) / (right - left, _BOTTOM - _TOP) * (width - 1, height - 1)
            ends = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(points, axis=0)).max(1))])
            along = np.arange(int(ends[-1]) + 1)
            columns = np.interp(along, ends, points[:, 0]).round().astype(np.int64)
            rows = np.clip(np.interp(along, ends, points[:, 1]), 0, height - 1.001)
            whole = rows.astype(np.int64)
            dots += [whole * width + columns, (whole + 1) * width + columns]
            parts += [amount * (1 - rows + whole), amount * (rows - whole)]
        if dots:
            sums += np.bincount(np.concatenate(dots), np.concatenate(parts), height * width)
    return sums.reshape(height, width)


def _exposed(lit: np.ndarray) -> np.ndarray:
    """The colours ``[height, width, 3]`` of light of positive and of negative edges ``[2, height, width]``.

    It is exposed so that nine in ten of the lit dots stay below three quarters of full colour, as in the page.
    """
    total = lit.sum(0)
    exposure = min(1.6, 1.4 / np.quantile(total[total > 0], 0.9))
    cover = 1 - np.exp(-exposure * total)
    prevails = lit**3 / np.maximum((lit**3).sum(0), 1e-30)
    inks = np.array([[int(ink[i : i + 2], 16) / 255 for i in (1, 3, 5)] for ink in (PLUS, MINUS)])
    colours: np.ndarray = 1 - cover[..., None] * (1 - np.einsum("khw,kc->hwc", prevails, inks))
    return colours


def _line(start: np.ndarray, end: np.ndarray, middle: float) -> np.ndarray:
    """Points along an edge ``[points, 2]``: straight, or in a ring, which has a middle (else NaN), a curve or a small loop."""
    if np.isnan(middle):
        return np.stack([start, end])
    centre = np.array([middle, 0.5])
    if (start == end).all():
        angles = np.linspace(0, 2 * np.pi, 24)[:, None]
        circle: np.ndarray = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return start + 0.025 * (start - centre + RADII * circle)
    bend = (start + end) / 2 * (1 - BEND) + centre * BEND
    t = np.linspace(0, 1, 14)[:, None]
    curve: np.ndarray = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
    return curve
