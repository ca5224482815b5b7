"""What a picture shows of the layers of any network: which edges their matrices had when, and how strong they were.

Contract: plain arrays, made from snapshots one after the other. A cell of a matrix is a target and a source, with all entries
of a kernel between them, or a block of such; rows are targets.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnw._wiring.parameters import Wirable, find_parameters, unwrap_model
from dnw.view._flow import Block, flow_of
from dnw.view._record import NothingToShowError, thinned
from dnw.view._snapshots import Snapshot

_CELLS = 1 << 20
"""Of one matrix, at most; those of larger ones are blocks."""
_ALL = 6_000_000
"""Cells of all matrices in all snapshots, about. Where there are more, weights are kept of the last snapshot alone, and shares
of active entries in blocks of all others."""
_SNAPSHOTS = 24
"""Of a picture in which not all cells have room."""
_FEWEST = 1 << 10
"""Cells of one matrix in which it is still to be recognised."""


@dataclass(frozen=True)
class Grid:
    """A matrix divided into square blocks.

    Attributes:
        rows, columns: targets and sources.
        side: of a block; those at the right and at the bottom may be smaller.
    """

    rows: int
    columns: int
    side: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Cells down and across."""
        return -(-self.rows // self.side), -(-self.columns // self.side)

    def within(self, cells: int) -> Grid:
        """The same with at most so many cells."""
        side = max(1, math.isqrt(self.rows * self.columns // cells))
        while math.prod(replace(self, side=side).shape) > cells:
            side += 1
        return replace(self, side=side)

    def sums(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        """Sums of values at entries, or how many entries there are, of each cell."""
        height, width = self.shape
        cells = rows // self.side * width + columns // self.side
        return np.bincount(cells, values, height * width).reshape(height, width)

    def sizes(self) -> np.ndarray:
        """How many pairs of a target and a source each cell has."""
        height, width = self.shape
        down = np.minimum(self.side, self.rows - np.arange(height) * self.side)
        across = np.minimum(self.side, self.columns - np.arange(width) * self.side)
        return down[:, None] * across


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """One layer in a picture; arrays and tuples have an entry a snapshot.

    Attributes:
        name: of its parameter.
        targets, sources: how many; of groups, sources of one group. A layer with one source for each target has its kernel's
            entries for sources.
        kernel: entries of a kernel between a target and a source.
        num_groups: groups of targets, each with sources of its own.
        candidates: entries that may be edges.
        active, came, went: edges, and how many came and went since the snapshot before; where snapshots between the two are
            left out, at each of them.
        positive: edges whose weight is positive.
        into, out: edges of each target and of each source, int32 ``[snapshots, targets]`` and ``[snapshots, sources]``.
        shares: in which blocks of its matrix which part of the entries is active, uint8 ``[snapshots, *share_grid.shape]``: 0
            where none is, 255 where all are.
        weights: by snapshot how strong the edges of each cell are, int8 of ``weight_grid.shape``: the root of the sum of
            magnitudes against the largest such sum, 127, with the sign of the sum.
        largest: that sum, by snapshot.
    """

    name: str
    targets: int
    sources: int
    kernel: int
    num_groups: int
    candidates: int
    active: tuple[int, ...]
    came: tuple[int, ...]
    went: tuple[int, ...]
    positive: tuple[int, ...]
    into: np.ndarray
    out: np.ndarray
    share_grid: Grid
    shares: np.ndarray
    weight_grid: Grid
    weights: dict[int, np.ndarray]
    largest: dict[int, float]


@dataclass(frozen=True, eq=False)
class LayersRecord:
    """A run as a picture of its layers shows it.

    Attributes:
        name, about, steps, epochs, omitted, metrics: as of :class:`dnw.view.Record`.
        blocks: the network, each block after those that it reads.
        layers: those that are wired, in order of their names in the model.
    """

    name: str
    about: str
    blocks: tuple[Block, ...]
    layers: tuple[LayerRecord, ...]
    steps: tuple[int, ...]
    epochs: tuple[float, ...]
    omitted: int
    metrics: tuple[Mapping[str, Any], ...]


def record_layers(
    model: nn.Module,
    snapshots: Iterable[Snapshot],
    *,
    example: Sequence[Tensor] | Tensor | None = None,
    name: str = "wiring",
    about: str = "",
    metrics: Sequence[Mapping[str, Any]] = (),
) -> LayersRecord:
    """Makes the record of the layers of any network.

    Args:
        model: the network; its weights do not matter.
        snapshots: in order; they are read one after the other.
        example: its inputs, of any batch. With them the picture shows what feeds what, and heads of attention; without them, or
            where ``torch.export`` cannot capture the model, layers stand in a row.
        name, about, metrics: see :class:`LayersRecord`.

    Raises:
        NothingToShowError: there are no snapshots.
        ValueError: snapshots of another network.
    """
    model = unwrap_model(model)
    times: list[Snapshot] = []
    sheets: list[_Sheet] = []
    cells = 1
    for snapshot in snapshots:
        if not sheets:
            sheets = _sheets(model, snapshot)
            cells = sum(math.prod(sheet.weight_grid.shape) for sheet in sheets)
        if snapshot.edges.keys() != {sheet.name for sheet in sheets}:
            raise ValueError(f"the snapshot of step {snapshot.step} is of other layers than those before it")
        for sheet in sheets:
            sheet.add(snapshot, keep=cells * min(len(times) + 1, _SNAPSHOTS) <= _ALL)
        times.append(Snapshot(snapshot.step, snapshot.epoch, {}, {}))
    if not times:
        raise NothingToShowError("there are no snapshots to show; a run writes them while it trains")
    kept = thinned(times, max(_SNAPSHOTS, _ALL // cells))
    chosen = [i for i, one in enumerate(times) if any(one is other for other in kept)]
    shapes = {sheet.name: (sheet.targets, sheet.sources) for sheet in sheets}
    inputs = (example,) if isinstance(example, Tensor) else example
    return LayersRecord(
        name=name,
        about=about,
        blocks=flow_of(model, shapes, inputs),
        layers=tuple(sheet.finished(chosen, all_weights=cells * len(chosen) <= _ALL) for sheet in sheets),
        steps=tuple(one.step for one in kept),
        epochs=tuple(one.epoch for one in kept),
        omitted=len(times) - len(kept),
        metrics=tuple(metrics),
    )


class _Sheet:
    """The matrix of one layer while snapshots are read.

    Args:
        layer: whose matrix it is.
        share_cells: of its blocks, at most.
    """

    def __init__(self, layer: Wirable, share_cells: int) -> None:
        self.name, shape = layer.name, tuple(layer.parameter.shape)
        by_target = layer.layout.shape(shape)
        self.targets, self.sources, self.kernel = by_target[0], math.prod(by_target[1:2]), math.prod(by_target[2:])
        if self.sources == 1:  # of depthwise convolutions the entries of kernels are sources
            self.sources, self.kernel = self.kernel, 1
        self._size, self._num_groups = math.prod(shape), layer.layout.groups
        self._candidates = self._size if layer.candidates is None else int(layer.candidates.count_nonzero())
        whole = Grid(self.targets, self.sources)
        self.weight_grid, self._share_grid = whole.within(_CELLS), whole.within(share_cells)
        self._room = self._share_grid.sizes() * self.kernel
        self._order: np.ndarray | None = None
        if layer.layout.transposed or layer.layout.stacked:
            entries = layer.layout.by_target(torch.arange(self._size).view(shape)).flatten().numpy()
            self._order = np.empty_like(entries)
            self._order[entries] = np.arange(self._size)
        self._before = np.zeros(self._size, bool)
        self._counts: list[tuple[int, int, int, int]] = []
        self._into: list[np.ndarray] = []
        self._out: list[np.ndarray] = []
        self._shares: list[np.ndarray] = []
        self._edges: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, snapshot: Snapshot, *, keep: bool) -> None:
        """Takes in what a snapshot says of the layer; whether to keep the weights of those before it."""
        flat, weights = snapshot.edges[self.name], snapshot.weights[self.name].astype(np.float32)
        if len(flat) and flat[-1] >= self._size:
            raise ValueError(
                f"the snapshot of step {snapshot.step} has an edge of {self.name!r} beyond its {self._size:,} entries"
            )
        now = np.zeros(self._size, bool)
        now[flat] = True
        first = not self._counts
        came, went = (0, 0) if first else (int((now & ~self._before).sum()), int((self._before & ~now).sum()))
        self._before = now
        self._counts.append((len(flat), came, went, int((weights > 0).sum())))
        entries = flat if self._order is None else self._order[flat]
        targets = entries // (self.sources * self.kernel)
        sources = entries // self.kernel % self.sources
        self._into.append(np.bincount(targets, minlength=self.targets).astype(np.int32))
        self._out.append(np.bincount(sources, minlength=self.sources).astype(np.int32))
        shares = self._share_grid.sums(targets, sources) / self._room
        self._shares.append(np.ceil(255 * shares).astype(np.uint8))
        if not keep:
            self._edges.clear()
        self._edges.append((targets.astype(np.int32), sources.astype(np.int32), weights))

    def _weights(self, targets: np.ndarray, sources: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
        """How strong the edges of each cell are, and the largest sum of magnitudes."""
        sums, sizes = (self.weight_grid.sums(targets, sources, values) for values in (weights, np.abs(weights)))
        largest = float(sizes.max(initial=0.0)) or 1.0
        strengths = np.ceil(127 * np.sqrt(sizes / largest))
        strengths = np.maximum(strengths, self.weight_grid.sums(targets, sources) > 0)  # of an edge whose weight is 0 as well
        return (strengths * np.where(sums < 0, -1, 1)).astype(np.int8), largest

    def finished(self, chosen: Sequence[int], *, all_weights: bool) -> LayerRecord:
        """The layer in some of the snapshots that were read."""
        active, came, went, positive = zip(*self._counts, strict=True)
        first = len(self._counts) - len(self._edges)
        last = len(self._counts) - 1
        kept = [i for i in chosen if i >= first and (all_weights or i == last)]
        weights = {chosen.index(i): self._weights(*self._edges[i - first]) for i in kept}
        between = list(zip([-1, *chosen], chosen, strict=False))
        return LayerRecord(
            name=self.name,
            targets=self.targets,
            sources=self.sources,
            kernel=self.kernel,
            num_groups=self._num_groups,
            candidates=self._candidates,
            active=tuple(active[i] for i in chosen),
            came=tuple(sum(came[a + 1 : b + 1]) for a, b in between),
            went=tuple(sum(went[a + 1 : b + 1]) for a, b in between),
            positive=tuple(positive[i] for i in chosen),
            into=np.stack([self._into[i] for i in chosen]),
            out=np.stack([self._out[i] for i in chosen]),
            share_grid=self._share_grid,
            shares=np.stack([self._shares[i] for i in chosen]),
            weight_grid=self.weight_grid,
            weights={i: strengths for i, (strengths, _) in weights.items()},
            largest={i: largest for i, (_, largest) in weights.items()},
        )


def _sheets(model: nn.Module, snapshot: Snapshot) -> list[_Sheet]:
    """The matrices of the layers that a snapshot has, in the order of the model."""
    known = dict(model.named_parameters(remove_duplicate=False))
    if missing := [name for name in snapshot.edges if name not in known]:
        raise ValueError(f"{type(model).__name__} has no parameter {missing[0]!r}, of which the snapshots are")
    wirable, _ = find_parameters(model, [glob.escape(name) for name in snapshot.edges], [])
    if {x.name for x in wirable} != snapshot.edges.keys():
        raise ValueError(f"{type(model).__name__} has other layers than the snapshots")
    share_cells = max(_FEWEST, _ALL // 2 // (len(wirable) * _SNAPSHOTS))
    return [_Sheet(x, share_cells) for x in wirable]
