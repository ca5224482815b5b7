"""Where the nodes of graphs lie in a picture, whether it is the page or a still one.

Contract: positions from 0 to 1, from left to right and from top to bottom. Graphs stand beside each other; in each the
inputs are at the left and the outputs at the right, the first node of a level on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dnw.view._record import GraphShape

RADII = (1.8, 0.46)
"""Of a ring: in columns across, and as a part of the height."""
BEND = 0.55
"""How far the edges of a ring bend towards its middle, from 0, not at all, to 1."""
_RING, _GAP = 4, 0.6
"""How many columns a ring takes, and how many lie between two graphs; a level takes one."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where nodes lie.

    Attributes:
        x, y: of each node, float32 ``[nodes]``.
        middles: x of each graph's middle; the middle of a ring is there, at y 0.5.
        columns: how many the width of 1 is divided into.
    """

    x: np.ndarray
    y: np.ndarray
    middles: tuple[float, ...]
    columns: float


def layout_of(graphs: Sequence[GraphShape]) -> Layout:
    """The layout of a picture's graphs: levels as columns of nodes, dynamic graphs as rings."""
    widths = [len(graph.levels) if graph.static else _RING for graph in graphs]
    columns = sum(widths) + _GAP * (len(graphs) - 1)
    x, y, middles, start = [], [], [], 0.0
    for graph, width in zip(graphs, widths, strict=True):
        middle = start + width / 2
        if graph.static:
            x.append(np.repeat(start + 0.5 + np.arange(width), graph.levels))
            y += [_spread(0, 1, size) for size in graph.levels]
        else:
            angles = _angles(*graph.levels)
            x.append(middle + RADII[0] * np.cos(angles))
            y.append(0.5 + RADII[1] * np.sin(angles))
        middles.append(middle / columns)
        start += width + _GAP
    return Layout(
        (np.concatenate(x) / columns).astype(np.float32), np.concatenate(y).astype(np.float32), tuple(middles), columns
    )


def _angles(inputs: int, inner: int, outputs: int) -> np.ndarray:
    """Of the nodes of a ring, clockwise from the right: inputs at the left, outputs at the right, the others above and below.

    The part of the ring that inputs take grows with their number, from 9 % to 36 %; as for outputs.
    """
    ends = np.clip(np.array([inputs, outputs]) / (inputs + inner + outputs), 0.2, 0.8) * np.pi / 2.2
    left, right = ends.tolist()  # from the middle of the inputs to the last of them, and of the outputs
    above = (inner + 1) // 2
    return np.concatenate(
        [
            _spread(np.pi + left, np.pi - left, inputs),
            _spread(np.pi + left, 2 * np.pi - right, above),
            _spread(np.pi - left, right, inner - above),
            _spread(-right, right, outputs),
        ]
    )


def _spread(first: float, last: float, count: int) -> np.ndarray:
    """So many numbers between two others, evenly, with half of their distance at both ends."""
    return first + (last - first) * (np.arange(count) + 0.5) / count
