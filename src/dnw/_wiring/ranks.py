"""Whether the processes of a group hold the same wiring.

Contract: one small message per process, once. Parameters are compared by name, and shards only with their replicas.
Processes that hold other layers under the same names (pipeline stages) or none at all are told to turn the check off.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from dnw._checks import listing
from dnw._wiring.wired_layer import WiredLayer


def check_ranks(layers: Iterable[WiredLayer], budgets: dict[str, int]) -> None:
    """Raises ``RuntimeError``, on every process, unless all processes hold the same latent weights and edges.

    Does nothing outside a process group.
    """
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = {}
    for layer in layers:
        assert layer.active is not None
        key = f"{layer.name} {layer.shard.key}" if layer.shard is not None else layer.name
        mine[key] = (layer.name, _digest(layer.latent), _digest(layer.active), layer.seed, layer.step, budgets[layer.name])
    everywhere: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, mine)
    entries = [(key, entry) for found in everywhere for key, entry in found.items()]
    first = dict(reversed(entries))
    differing = sorted({entry[0] for key, entry in entries if entry != first[key]})
    if differing:
        raise RuntimeError(
            f"the processes hold different latent weights or edges for {listing(differing)}; they would drift apart for ever. "
            "Wire after the model is wrapped, which makes its weights equal (DistributedDataParallel, fabric.setup, "
            "accelerator.prepare), with the same arguments on every process, or call wiring.synchronize() once it is; where "
            "each process trains a network of its own, wire with check_ranks=False"
        )


def local_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that keeps the state on this process: another one inside ZeroRedundancyOptimizer, else itself.

    Raises:
        ValueError: it steps inside the backward pass, where no hook of its own runs.
    """
    if not any(c.__name__ == "ZeroRedundancyOptimizer" for c in type(optimizer).__mro__):
        return optimizer
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError("ZeroRedundancyOptimizer(overlap_with_ddp=True) steps without step(); make it without the overlap")
    return optimizer.optim  # type: ignore[attr-defined]


def gathered(entries: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The loaded entries of all processes together: each has been given those of its own parameters."""
    everywhere: list[dict] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everywhere, entries)
    return {name: entry for part in everywhere for name, entry in part.items()}


def _digest(values: Tensor) -> int:
    """A checksum of the bits of a tensor that depends on their order."""
    flat = values.contiguous().reshape(-1)
    flat = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = 0
    for start, part in enumerate(flat.split(1 << 22)):
        weights = torch.arange(1, 2 * part.numel(), 2, dtype=torch.int64, device=part.device) * 0x5851F42D4C957F2D
        total += (start + 1) * int(((part.to(torch.int64) + 1) * weights).sum())
    return total & 0xFFFF_FFFF_FFFF_FFFF
