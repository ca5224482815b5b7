"""Which side of a weight its targets are on, so that all else can read it one way round.

Contract: pure functions of tensors that have a parameter's shape. ``by_target`` gives ``[targets, sources of a target,
*kernel]``, and ``from_targets`` is its inverse; ``by_source`` and ``from_sources`` do the same of sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a parameter's dimensions are to be read. By default they are ``[targets, sources, *kernel]``.

    Attributes:
        transposed: whether sources stand before targets, as in transposed convolutions: ``[sources, targets, *kernel]``.
        groups: number of groups of targets, each with sources of its own. The second dimension, sources or targets, is then
            that of one group.
        stacked: whether the groups have a dimension of their own, the first, as experts in one tensor have.
    """

    transposed: bool = False
    groups: int = 1
    stacked: bool = False

    @property
    def target_dims(self) -> tuple[int, ...]:
        """The dimensions that tell which target an entry belongs to."""
        if self.stacked:
            return (0, 2 if self.transposed else 1)
        if self.transposed:
            return (0, 1) if self.groups > 1 else (1,)
        return (0,)

    def by_target(self, tensor: Tensor) -> Tensor:
        """``[targets, sources of a target, *kernel]`` from a tensor of the parameter's shape."""
        if not (self.transposed or self.stacked):
            return tensor
        parts = tensor if self.stacked else tensor.unflatten(0, (self.groups, -1))
        return (parts.transpose(1, 2) if self.transposed else parts).flatten(0, 1)

    def by_source(self, tensor: Tensor) -> Tensor:
        """``[sources of all groups, targets of a source, *kernel]`` from a tensor of the parameter's shape."""
        return self.by_target(tensor).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def from_sources(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape from ``[sources of all groups, targets of a source, *kernel]``."""
        return self.from_targets(tensor.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1))

    def from_targets(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape from ``[targets, sources of a target, *kernel]``."""
        if not (self.transposed or self.stacked):
            return tensor
        parts = tensor.unflatten(0, (self.groups, -1))
        parts = parts.transpose(1, 2) if self.transposed else parts
        return (parts if self.stacked else parts.flatten(0, 1)).contiguous()

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(targets, sources of a target, *kernel)`` from the parameter's shape."""
        return shape if self == TARGETS_FIRST else tuple(self.by_target(torch.empty(shape, device="meta")).shape)

    def partial_sums(self, values: Tensor) -> Tensor:
        """Sums over the dimensions that do not tell targets apart, which stay as 1; of a part of a parameter, too."""
        dims = [dim for dim in range(values.ndim) if dim not in self.target_dims]
        return values.sum(dims, keepdim=True) if dims else values

    def join(self, sums: Tensor) -> Tensor:
        """Sums over the edges of each target, from the ``partial_sums`` of a whole parameter and in the same shape."""
        if self.stacked or not self.transposed or self.groups == 1:
            return sums
        parts = sums.unflatten(0, (self.groups, -1))
        return parts.sum(1, keepdim=True).expand_as(parts).flatten(0, 1)


TARGETS_FIRST = Layout()
"""Of linear layers and ordinary convolutions."""
