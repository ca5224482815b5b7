"""What each wired parameter keeps, and what of it travels in ``optimizer.state_dict()``.

Contract: the format has a version. What comes in is checked whole before anything takes it over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dnw._rules.fixed import Frozen
from dnw._rules.pool import Pool
from dnw._rules.rule import Rule
from dnw._selection.schedules import DensitySchedule
from dnw._selection.shards import Shard
from dnw._wiring.wired_layer import WiredLayer

FORMAT = 1
"""Version of what travels in ``optimizer.state_dict()``; see ``STATE_KEYS``."""

STATE_KEYS = ("latent", "active", "wiring")
"""What each wired parameter adds to its entry in ``optimizer.state_dict()["state"]``.

latent: the dense weights, of the parameter's shape and device, sharded as it is. active: mask of the active edges.
wiring: five numbers, int64: format version, completed steps of the wiring, the step at which this parameter was last
projected, seed, number of active edges of its pool. Random draws are a function of seed, step and name, so nothing else is
needed to continue bit for bit.
"""


def entry_of(layer: WiredLayer, step: int, k: int) -> dict[str, Tensor]:
    """What travels of a layer.

    Args:
        layer: whose entry it is.
        step: completed steps of the wiring.
        k: number of active edges of the layer's pool.
    """
    assert layer.active is not None
    numbers = torch.tensor((FORMAT, step, layer.step, layer.seed, k), dtype=torch.int64, device="cpu")
    return {"latent": layer.whole(layer.latent), "active": layer.whole(layer.active), "wiring": numbers}


def check_entry(layer: WiredLayer, entry: dict[str, Any], pool: Pool, rule: Rule, schedule: DensitySchedule | None) -> None:
    """Raises ``ValueError`` unless an incoming entry is whole, plain and made for this layer and its budget."""
    what = f"the loaded optimizer state, {layer.name!r}"
    numbers = entry.get("wiring")
    if not isinstance(numbers, Tensor) or numbers.numel() < 1 or numbers.dtype != torch.int64:
        raise ValueError(f"{what}: 'wiring' is missing or not a tensor of whole numbers")
    version = int(numbers.flatten()[0])
    if version != FORMAT:
        raise ValueError(
            f"{what}: the wiring has format {version}, this version of dnw reads {FORMAT}; load it with the version of dnw "
            "that wrote it"
        )
    if numbers.shape != (5,):
        raise ValueError(f"{what}: 'wiring' has shape {tuple(numbers.shape)}, format {FORMAT} has (5,)")
    for key, dtype in (("latent", layer.latent.dtype), ("active", torch.bool)):
        value = entry.get(key)
        if not isinstance(value, Tensor) or value.dtype != dtype or tuple(value.shape) != layer.shape:
            given = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "none"
            raise ValueError(f"{what}: expected {key!r} as {dtype} of shape {layer.shape}, got {given}")
    check_finite(f"{layer.name} (loaded)", layer.part(entry["latent"]), layer.shard)
    active = layer.part(entry["active"]).to(layer.latent.device)
    saved = int(numbers[4]) if len(pool.layers) > 1 else layer.total(active)
    least = most = pool.budget
    if schedule is not None:
        most = pool.num_edges_at(0, schedule)
    if saved != int(numbers[4]) or not least <= saved <= most:
        raise ValueError(
            f"{what}: it has {saved:,} active edges, this wiring keeps {least:,}; wire with the budget of the saved "
            "run, or assign its latent weights by name to start from them"
        )
    if layer.candidates is not None and layer.total(active & ~layer.candidates):
        raise ValueError(f"{what}: some of its active edges are no candidate edges of this model")
    if isinstance(rule, Frozen) and layer.total(active != layer.cut(rule.edges[layer.name]).to(active.device)):
        raise ValueError(f"{what}: its edges are not those that Frozen was given")


def check_finite(name: str, value: Tensor, shard: Shard | None = None) -> None:
    """Raises ``ValueError`` unless every weight is finite; on all processes that hold a part of it, or on none."""
    bad = (~torch.isfinite(value)).count_nonzero()
    if int(bad if shard is None else shard.sum(bad)):
        raise ValueError(f"{name!r} has weights that are not finite; magnitudes cannot be ranked with NaN or infinity")
