"""The layout that kernels compute in: images innermost, and the ways into it and out of it.

Contract: the numbers stay as they are. ``[batch, nodes, ...]`` has its images innermost where it is a view of
``[nodes, ..., batch]`` in one piece; kernels take such a tensor without a copy, and give such tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dnw.kernels._graph import turned
from dnw.kernels._room import room


def inside(x: Tensor) -> Tensor:
    """``[batch, nodes, ...]`` as ``[nodes, ..., batch]`` in one piece: a view where its images are innermost, else a copy."""
    found = x.detach().movedim(0, -1)
    if found.is_contiguous():
        return found
    out = room(*found.shape)
    if x.is_contiguous():
        turned(x.detach().flatten(1), out.view(-1, len(x)))
        return out
    return out.copy_(found)


def outside(x: Tensor) -> Tensor:
    """The inverse, as a view."""
    return x.movedim(-1, 0)


@torch.library.custom_op("dnw::images_innermost", mutates_args=())
def _innermost(x: Tensor) -> Tensor:
    return outside(inside(x))


@_innermost.register_fake
def _(x):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[1:], len(x)).movedim(-1, 0)


@torch.library.custom_op("dnw::images_outermost", mutates_args=())
def _outermost(x: Tensor) -> Tensor:
    out = room(*x.shape)
    turned(inside(x).view(-1, len(x)), out.flatten(1))
    return out


@_outermost.register_fake
def _(x):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _keep_nothing(ctx: Any, inputs: tuple, output: Tensor) -> None:
    pass


_innermost.register_autograd(lambda ctx, grad: torch.ops.dnw.images_outermost(grad), setup_context=_keep_nothing)
_outermost.register_autograd(lambda ctx, grad: torch.ops.dnw.images_innermost(grad), setup_context=_keep_nothing)


def images_innermost(x: Tensor) -> Tensor:
    """The same maps or numbers with their images innermost; what is in one piece otherwise gets gradients in one piece."""
    return torch.ops.dnw.images_innermost(x) if x.is_contiguous() and not x.movedim(0, -1).is_contiguous() else x
