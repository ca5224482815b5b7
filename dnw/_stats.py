"""What a wiring did since it was last asked: plain numbers, for a log.

Contract: counts masks, which is one pass over a byte for each entry; keeps the edges of the last few times that it was asked,
an entry to a bit. Until it is first asked nothing is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dnw._checks import listing
from dnw._layer import WiredLayer

_KEPT = 8
"""Times asked that are remembered."""


class Statistics:
    """The edges of some layers over time, as far as they were asked for."""

    def __init__(self) -> None:
        self._ever: dict[str, Tensor] = {}
        self._before: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def see(self, layers: Iterable[WiredLayer]) -> None:
        """Notes the edges of layers that may have changed, where anybody has asked before."""
        for layer in layers:
            ever = self._ever.get(layer.name)
            if ever is not None and layer.has_changed:
                assert layer.active is not None
                ever.logical_or_(layer.active)

    def ask(self, layers: Iterable[WiredLayer], step: int, since: int | None) -> dict[str, Any]:
        """Numbers per layer and in all; see :meth:`Wiring.stats`."""
        if since is not None and since not in self._before:
            known = listing(map(str, self._before)) if self._before else "none yet"
            raise ValueError(f"since={since}: edges are known of the steps at which they were asked for, {known}")
        last = next(reversed(self._before), None) if since is None else since
        before = {} if last is None else self._before[last]
        rows, present = {}, {}
        for layer in layers:
            assert layer.active is not None
            active = layer.active
            ever = self._ever.setdefault(layer.name, active.clone()).logical_or_(active)
            then = _unpacked(before[layer.name], active) if layer.name in before else active
            counts = torch.stack([mask.count_nonzero() for mask in (active, ever, active & ~then, then & ~active)])
            counts = counts if layer.shard is None else layer.shard.sum(counts)
            num_active, num_ever, entered, left = counts.tolist()
            rows[layer.name] = {
                "candidates": layer.num_candidates,
                "active": num_active,
                "density": num_active / layer.num_candidates,
                "entered": entered,
                "left": left,
                "ever_active": num_ever / layer.num_candidates,
            }
            if layer.shard is None:
                rows[layer.name] |= _dead(layer.layout.by_target(active), layer.layout.groups)
            present[layer.name] = _packed(active)
        self._before[step] = present
        self._before.move_to_end(step)
        while len(self._before) > _KEPT:
            self._before.popitem(last=False)
        return {"step": step, "layers": rows, "total": _totals(list(rows.values()))}


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    sums = ("candidates", "active", "entered", "left", "dead_targets", "dead_sources")
    total = {key: sum(row.get(key, 0) for row in rows) for key in sums}
    number = max(1, total["candidates"])
    ever = sum(row["ever_active"] * row["candidates"] for row in rows)
    return {**total, "density": total["active"] / number, "ever_active": ever / number}


def _dead(by_target: Tensor, groups: int) -> dict[str, int]:
    """Targets, and sources of a group of targets, all of whose edges are dormant; a vector has targets alone."""
    if by_target.ndim < 2:
        return {"dead_targets": int((~by_target).count_nonzero()), "dead_sources": 0}
    edges = by_target.flatten(2).any(2) if by_target.ndim > 2 else by_target
    sources = edges.unflatten(0, (groups, -1)).any(1)
    return {"dead_targets": int((~edges.any(1)).count_nonzero()), "dead_sources": int((~sources).count_nonzero())}


def _packed(mask: Tensor) -> Tensor:
    """A mask, an entry to a bit."""
    flat = mask.reshape(-1)
    rest = -flat.numel() % 8
    flat = torch.cat([flat, flat.new_zeros(rest)]) if rest else flat
    return (flat.view(-1, 8).to(torch.uint8) * _bits(flat.device)).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, like: Tensor) -> Tensor:
    bits = (packed.to(like.device).unsqueeze(1) & _bits(like.device)) != 0
    return bits.view(-1)[: like.numel()].view(like.shape)


def _bits(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
