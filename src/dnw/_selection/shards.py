"""Sharded parameters: which entries of a DTensor this process holds, and sums over those that hold the others.

Contract: the rest of the core works on plain local tensors. A shard gives the place of its entries in the whole tensor,
whatever the placements (FSDP2, tensor parallel, both at once), and never gathers the weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Shard:
    """The part of a parameter that this process holds.

    Attributes:
        shape: of the whole parameter.
        indices: for each dimension, where the local entries stand in the whole one, int64.
        groups: the process groups over which the parameter is spread; a sum over the whole parameter is a sum over each
            of them in turn. Replicas are not counted.
        key: equal on two processes exactly if they hold the same entries.
    """

    shape: tuple[int, ...]
    indices: tuple[Tensor, ...]
    groups: tuple[Any, ...]
    key: str
    _mesh: Any
    _placements: tuple[Any, ...]

    def splits(self, dims: Collection[int]) -> bool:
        """Whether entries that differ in none of these dimensions may lie on several processes."""
        sizes = zip(self.shape, self.indices, strict=True)
        return any(len(indices) != size for dim, (size, indices) in enumerate(sizes) if dim not in dims)

    def cut(self, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor of the parameter's shape."""
        for dim, indices in enumerate(self.indices):
            whole = whole.index_select(dim, indices.to(whole.device))
        return whole

    def wrap(self, local: Tensor) -> Tensor:
        """The DTensor of which this is the local part."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self._mesh, self._placements, run_check=False, shape=torch.Size(self.shape), stride=stride
        )

    def sum(self, counts: Tensor) -> Tensor:
        """Adds a tensor up over all processes that hold a part, in place."""
        for group in self.groups:
            torch.distributed.all_reduce(counts, group=group)
        return counts

    def max(self, values: Tensor) -> Tensor:
        """The largest of a tensor over all processes that hold a part, entry by entry, in place."""
        for group in self.groups:
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX, group=group)
        return values

    def flat_index(self, local: Tensor) -> Tensor:
        """The flat indices in the whole parameter of local flat indices, int64."""
        index = torch.zeros_like(local)
        stride, inner = 1, 1
        for size, indices in zip(reversed(self.shape), reversed(self.indices), strict=True):
            index += indices[(local // inner) % max(1, len(indices))] * stride
            stride, inner = stride * size, inner * len(indices)
        return index


def local(tensor: Tensor) -> Tensor:
    """The local part of a DTensor; any other tensor itself."""
    with torch.no_grad():
        return tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_of(parameter: Tensor) -> Shard | None:
    """Which part of a parameter this process holds; None where it is no DTensor."""
    if not _is_sharded(parameter):
        return None
    from torch.distributed.tensor import Partial

    mesh, placements = parameter.device_mesh, tuple(parameter.placements)  # type: ignore[attr-defined]
    if any(isinstance(p, Partial) for p in placements):
        raise ValueError(f"a parameter with placements {placements} holds partial sums; its magnitudes cannot be ranked")
    spread = [i for i, p in enumerate(placements) if not p.is_replicate()]
    coordinate = mesh.get_coordinate()
    return Shard(
        tuple(parameter.shape),
        tuple(_places(parameter, dim).to(local(parameter).device) for dim in range(parameter.ndim)),
        tuple(mesh.get_group(i) for i in spread if mesh.size(i) > 1),
        ",".join(f"{i}:{coordinate[i]}/{mesh.size(i)}" for i in spread),
        mesh,
        placements,
    )


def _is_sharded(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor and hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def _places(parameter: Any, dim: int) -> Tensor:
    """Where the local entries stand along one dimension, by cutting up the numbers 0, 1, ... as the parameter was."""
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as ShardPlacement

    placements: list[Any] = []
    for placement in parameter.placements:
        if placement.is_replicate() or placement.dim != dim:
            placements.append(Replicate())
        else:
            factor = getattr(placement, "split_factor", None)  # of a strided shard: one mesh dimension within another
            placements.append(ShardPlacement(0) if factor is None else type(placement)(0, split_factor=factor))
    numbers = torch.arange(parameter.shape[dim], device=parameter.device_mesh.device_type)
    return distribute_tensor(numbers, parameter.device_mesh, placements, src_data_rank=None).to_local()
