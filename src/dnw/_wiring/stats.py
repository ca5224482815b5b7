"""What a wiring did since it was last asked: plain numbers, for a log.

Contract: one pass over the masks of active edges; keeps the edges of the last few times that it was asked, an entry to a bit.
Until it is first asked nothing is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dnw._checks import listing
from dnw._wiring.wired_layer import WiredLayer
from dnw.kernels._exchange import dead, packed, tally
from dnw.kernels._team import each

_KEPT = 8
"""Times asked that are remembered."""


class Statistics:
    """The edges of some layers over time, as far as they were asked for."""

    def __init__(self) -> None:
        self._ever: dict[str, Tensor] = {}
        self._before: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def see(self, layers: Iterable[WiredLayer]) -> None:
        """Notes the edges of layers that may have changed, where anybody has asked before."""
        masks = {x.name: x.active for x in layers if x.name in self._ever and x.has_changed and x.active is not None}
        for name, words in zip(masks, each([(m.numel(), partial(packed, m)) for m in masks.values()]), strict=True):
            self._ever[name] = self._ever[name].to(words.device) | words

    def ask(self, layers: Sequence[WiredLayer], step: int, since: int | None) -> dict[str, Any]:
        """Numbers per layer and in all; see :meth:`Wiring.stats`."""
        if since is not None and since not in self._before:
            known = listing(map(str, self._before)) if self._before else "none yet"
            raise ValueError(f"since={since}: edges are known of the steps at which they were asked for, {known}")
        last = next(reversed(self._before), None) if since is None else since
        before = {} if last is None else self._before[last]
        found = each([(x.latent.numel(), partial(self._of_layer, x, before)) for x in layers])
        rows = {}
        for layer, (counts, of_nodes, _) in zip(layers, found, strict=True):
            if layer.shard is not None:
                counts = layer.shard.sum(torch.tensor(counts, device=layer.latent.device)).tolist()
            active, ever, entered, left = counts
            number = layer.num_candidates
            rows[layer.name] = {"candidates": number, "active": active, "density": active / number}
            rows[layer.name] |= {"entered": entered, "left": left, "ever_active": ever / number, **of_nodes}
        self._before[step] = {layer.name: words for layer, (_, _, words) in zip(layers, found, strict=True)}
        self._before.move_to_end(step)
        while len(self._before) > _KEPT:
            self._before.popitem(last=False)
        return {"step": step, "layers": rows, "total": totals(list(rows.values()))}

    def _of_layer(self, layer: WiredLayer, before: dict[str, Tensor]) -> tuple[list[int], dict[str, int], Tensor]:
        """What the part of a layer here counts, what of its targets and sources, and its edges."""
        assert layer.active is not None
        words = packed(layer.active)
        ever = self._ever[layer.name].to(words.device) if layer.name in self._ever else words.clone()
        counts = tally(words, before.get(layer.name, words).to(words.device), ever)
        self._ever[layer.name] = ever
        return counts, {} if layer.shard is not None else dead_nodes(layer, counts[0]), words


def dead_nodes(layer: WiredLayer, active: int) -> dict[str, int]:
    """Rows and columns of a layer that have candidates and no active edge; it has so many active edges in all."""
    assert layer.active is not None
    by_target = layer.layout.by_target(layer.active)
    if by_target.ndim < 2:  # a vector has targets alone
        return {"dead_targets": layer.num_candidates - active, "dead_sources": 0}
    found = dead(by_target.contiguous(), layer.layout.groups)
    never = (0, 0)
    if layer.candidates is not None:
        never = dead(layer.layout.by_target(layer.candidates).contiguous(), layer.layout.groups)
    return {"dead_targets": found[0] - never[0], "dead_sources": found[1] - never[1]}


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of all layers together, of those that have a sum."""
    sums = ("candidates", "active", "entered", "left", "dead_targets", "dead_sources")
    total = {key: sum(row.get(key, 0) for row in rows) for key in sums}
    number = max(1, total["candidates"])
    ever = sum(row["ever_active"] * row["candidates"] for row in rows)
    return {**total, "density": total["active"] / number, "ever_active": ever / number}
