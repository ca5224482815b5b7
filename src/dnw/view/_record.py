"""What a picture shows of a run: its graphs, and which edges they had when, how strong and of which sign.

Contract: plain arrays, made from snapshots by a model that has the run's graphs. Nodes and edges of all graphs have one
numbering: graph after graph, in each the inputs first and the outputs last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from dnw._wiring.parameters import unwrap_model
from dnw.count import graphs_of, live_by_graph, parameter_of
from dnw.graphs._protocol import edge_entries, levels_of
from dnw.view._snapshots import Snapshot

LEVELS_OF_STRENGTH = 31
_EDGES = 1_000_000
"""In one snapshot, at most."""


class NothingToShowError(ValueError):
    """There is no wiring between nodes that could be drawn; nothing is wrong with the run."""


@dataclass(frozen=True)
class GraphShape:
    """One graph in a picture.

    Attributes:
        name: of the graph in its model.
        static: whether its nodes stand in levels; else in a ring, as in a graph in discrete or continuous time.
        levels: how many nodes each level has, the outputs last; of a dynamic graph: inputs, inner nodes, outputs.
    """

    name: str
    static: bool
    levels: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Record:
    """A run as a picture shows it.

    Attributes:
        name: of the run.
        about: in a few words, such as its rule and seed.
        graphs: in order.
        steps, epochs: of each snapshot.
        omitted: how many snapshots of the run are left out.
        sources, targets: nodes of every edge that some snapshot has, int32 ``[edges]``.
        strengths: of each edge in each snapshot, int8 ``[snapshots, edges]``: 0 where it is not active, else its sign
            and, from 1 to 31, where its magnitude lies between the least and the largest on a logarithmic scale.
        least, largest: those magnitudes.
        active, came, went: edges in each snapshot, and how many came and went since the one before. A weight that serves two
            edges (:class:`dnw.graphs.Levels`, shared outputs) counts once.
        live: live nodes, boolean ``[snapshots, nodes]``.
        metrics: a mapping per epoch, with ``epoch`` among its keys and, where they are known, ``train_loss``, ``test_loss`` and
            ``top1``.
        filters: of each node in each snapshot, int8 ``[snapshots, nodes, 9]``, its largest number 127; empty where none are
            stored.
        images: those whose maps are stored, uint8 ``[images, channels, height, width]``; None where there are none.
        maps: by snapshot, for each graph, what its nodes send then: uint8 ``[images, nodes, h, w]``, 128 for 0.
    """

    name: str
    about: str
    graphs: tuple[GraphShape, ...]
    steps: tuple[int, ...]
    epochs: tuple[float, ...]
    omitted: int
    sources: np.ndarray
    targets: np.ndarray
    strengths: np.ndarray
    least: float
    largest: float
    active: tuple[int, ...]
    came: tuple[int, ...]
    went: tuple[int, ...]
    live: np.ndarray
    metrics: tuple[Mapping[str, Any], ...]
    filters: np.ndarray
    images: np.ndarray | None
    maps: dict[int, tuple[np.ndarray, ...]]


def record(
    model: nn.Module,
    snapshots: Iterable[Snapshot],
    *,
    name: str,
    about: str = "",
    metrics: Sequence[Mapping[str, Any]] = (),
    most: int = 24_000_000,
) -> Record:
    """Makes the record of a run.

    Args:
        model: a network with the graphs of the run; its weights do not matter.
        snapshots: in order.
        name, about, metrics: see :class:`Record`.
        most: how many strengths it may hold; where there are more, snapshots are left out evenly, after the first epoch first.
            Snapshots of more than a million edges, as a falling density begins with, are left out in any case.

    Raises:
        NothingToShowError: no snapshots, none of a graph, or only such of more than a million edges.
        ValueError: a snapshot, or what lies beside it, is not of this network.
    """
    model = unwrap_model(model)
    graphs = graphs_of(model)
    every = list(snapshots)
    if not graphs:
        raise NothingToShowError("its network has no graphs whose nodes could be drawn; a page shows its layers")
    if not every:
        raise NothingToShowError("there are no snapshots to show; a run writes them while it trains")
    parameters = {n: parameter_of(n, graph) for n, graph in graphs.items()}
    wired = {n: parameter for n, parameter in parameters.items() if all(parameter in s.edges for s in every)}
    if not wired:
        raise NothingToShowError("none of the wired weights belongs to a graph; there is no wiring between nodes to show")
    for parameter in wired.values():
        shape = model.get_parameter(parameter).shape
        if any(len(s.edges[parameter]) and s.edges[parameter][-1] >= shape.numel() for s in every):
            raise ValueError(f"{parameter} is {tuple(shape)} here, and the snapshots are of a larger one")
    chosen = [s for s in every if sum(len(s.edges[parameter]) for parameter in wired.values()) <= _EDGES]
    if not chosen:
        raise NothingToShowError(f"every snapshot has more than {_EDGES:,} edges, too many to show")
    ever = {n: _ever_active(chosen, parameter) for n, parameter in wired.items()}
    chosen = thinned(chosen, max(2, most // max(1, sum(map(len, ever.values())))))
    for one in chosen:
        _check_beside(one, {n: graphs[n].num_nodes for n in wired})
    magnitudes = [np.abs(s.weights[parameter].astype(np.float32)) for s in chosen for parameter in wired.values()]
    above = [m[m > 0] for m in magnitudes]
    least = float(min((np.quantile(m, 0.01) for m in above if len(m)), default=1e-3))
    largest = float(max((m.max() for m in above if len(m)), default=1.0))
    sources, targets, strengths, first = [], [], [], 0
    for n, parameter in wired.items():
        graph, flat = graphs[n], ever[n]
        entries = edge_entries(graph, model.get_parameter(parameter).shape)
        to, of = entries.nonzero(as_tuple=True)
        indices = entries[to, of].numpy() - 1
        found = np.searchsorted(flat, indices)
        found[found == len(flat)] = 0
        kept = flat[found] == indices if len(flat) else np.zeros(len(indices), bool)
        sources.append(of.numpy()[kept] + first)
        targets.append(to.numpy()[kept] + first)
        of_flat = np.stack([_strengths(s, parameter, flat, least, largest) for s in chosen])
        strengths.append(of_flat[:, found[kept]])
        first += graph.num_nodes
    return Record(
        name=name,
        about=about,
        graphs=tuple(_shape(n, graphs[n]) for n in wired),
        steps=tuple(s.step for s in chosen),
        epochs=tuple(s.epoch for s in chosen),
        omitted=len(every) - len(chosen),
        sources=np.concatenate(sources).astype(np.int32),
        targets=np.concatenate(targets).astype(np.int32),
        strengths=np.concatenate(strengths, axis=1),
        least=least,
        largest=max(largest, least),
        active=tuple(sum(len(s.edges[parameter]) for parameter in wired.values()) for s in chosen),
        came=(0, *(_new(a, b, wired.values()) for a, b in pairwise(chosen))),
        went=(0, *(_new(b, a, wired.values()) for a, b in pairwise(chosen))),
        live=np.stack([_live(model, s, wired) for s in chosen]),
        metrics=tuple(metrics),
        filters=_filters(chosen, list(wired), first),
        images=next((s.beside["images"] for s in chosen if "images" in s.beside), None),
        maps={
            i: tuple(s.beside[f"maps/{n}"] for n in wired)
            for i, s in enumerate(chosen)
            if all(f"maps/{n}" in s.beside for n in wired)
        },
    )


def _check_beside(snapshot: Snapshot, nodes: Mapping[str, int]) -> None:
    """Raises ``ValueError`` where pictures of nodes are not those of graphs with so many nodes, by name."""
    beside = snapshot.beside
    images = beside.get("images", np.zeros((0, 0, 0, 0), np.uint8))
    fits = {"images": images.ndim == 4 and images.dtype == np.uint8}
    for name, count in nodes.items():
        filters, maps = beside.get(f"filters/{name}"), beside.get(f"maps/{name}")
        fits[f"filters/{name}"] = filters is None or filters.shape == (count, 9)
        fits[f"maps/{name}"] = maps is None or (
            maps.ndim == 4 and maps.dtype == np.uint8 and maps.shape[:2] == (len(images), count)
        )
    for key, right in fits.items():
        if not right:
            array = beside[key]
            raise ValueError(
                f"the snapshot of step {snapshot.step}: {key!r}, {array.dtype} {array.shape}, is not of this network"
            )


def _filters(snapshots: Sequence[Snapshot], wired: Sequence[str], nodes: int) -> np.ndarray:
    if not all(f"filters/{n}" in s.beside for s in snapshots for n in wired):
        return np.zeros((0, nodes, 9), np.int8)
    rows = np.stack([np.concatenate([s.beside[f"filters/{n}"] for n in wired]) for s in snapshots]).astype(np.float32)
    largest = np.maximum(np.abs(rows).max(axis=2, keepdims=True), 1e-12)
    scaled: np.ndarray = np.round(127 * rows / largest).astype(np.int8)
    return scaled


def _new(before: Snapshot, after: Snapshot, parameters: Iterable[str]) -> int:
    """How many edges of a snapshot an earlier one does not have."""
    return sum(len(np.setdiff1d(after.edges[name], before.edges[name], assume_unique=True)) for name in parameters)


def _shape(name: str, graph: Any) -> GraphShape:
    levels = levels_of(graph)
    if levels is not None:
        return GraphShape(name, True, levels)
    inner = graph.num_nodes - graph.num_inputs - graph.num_outputs
    return GraphShape(name, False, (graph.num_inputs, inner, graph.num_outputs))


def _ever_active(snapshots: Sequence[Snapshot], parameter: str) -> np.ndarray:
    """Sorted flat indices of the edges that some snapshot has."""
    return np.unique(np.concatenate([s.edges[parameter] for s in snapshots]))


def thinned(snapshots: list[Snapshot], most: int) -> list[Snapshot]:
    """At most so many: the first and the last, and others evenly between, those of the first epoch last to go."""
    if len(snapshots) <= most:
        return snapshots
    early = [s for s in snapshots if s.epoch <= 1]
    later = [s for s in snapshots if s.epoch > 1]
    kept = _evenly(later, max(1, most - len(early)))
    if not kept:
        return _evenly(early, most)
    return [*(_evenly(early, most - len(kept)) if len(kept) < most - 1 else early[:1]), *kept]


def _evenly(snapshots: list[Snapshot], most: int) -> list[Snapshot]:
    """At most so many, the last among them, and the first where there is room for two."""
    if len(snapshots) <= most:
        return snapshots
    last = len(snapshots) - 1
    return [snapshots[round(i * last / (most - 1))] for i in range(most)] if most > 1 else snapshots[-1:]


def _strengths(snapshot: Snapshot, parameter: str, flat: np.ndarray, least: float, largest: float) -> np.ndarray:
    weights = snapshot.weights[parameter].astype(np.float32)
    scale = np.log(max(largest / least, 1 + 1e-6)) / (LEVELS_OF_STRENGTH - 1)
    levels = np.log(np.maximum(np.abs(weights), least) / least) / scale
    values = np.clip(np.round(levels), 0, LEVELS_OF_STRENGTH - 1).astype(np.int8) + 1
    whole = np.zeros(len(flat), np.int8)
    whole[np.searchsorted(flat, snapshot.edges[parameter])] = np.where(weights < 0, -values, values)
    return whole


def _live(model: nn.Module, snapshot: Snapshot, wired: Mapping[str, str]) -> np.ndarray:
    """Live nodes of graphs, whose parameters are given by their names."""
    active = {}
    for n, parameter in wired.items():
        active[n] = torch.zeros(model.get_parameter(parameter).shape, dtype=torch.bool)
        active[n].view(-1)[torch.from_numpy(snapshot.edges[parameter])] = True
    live = live_by_graph(model, active)
    return np.concatenate([live[n].numpy() for n in wired])
