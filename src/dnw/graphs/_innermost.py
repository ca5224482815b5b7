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
    elif _is_channels_last(x):
        pixels = room(*x.shape[2:], x.shape[1], len(x))
        turned(x.detach().permute(0, 2, 3, 1).flatten(1), pixels.view(-1, len(x)))
        out.copy_(pixels.permute(2, 0, 1, 3))
    else:
        out.copy_(found)
    return out


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def outside(x: Tensor) -> Tensor:
    """The inverse, in the same memory: no view for autograd, so that it may be written in place where operators return it."""
    found = x.movedim(-1, 0)
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), found.shape, found.stride())


@torch.library.custom_op("dnw::images_innermost", mutates_args=())
def _innermost(x: Tensor) -> Tensor:
    return outside(inside(x))


@_innermost.register_fake
def _(x):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[1:], len(x)).movedim(-1, 0)


@torch.library.custom_op("dnw::images_outermost", mutates_args=())
def _outermost(x: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        out = room(*x.shape)
        turned(inside(x).view(-1, len(x)), out.flatten(1))
        return out
    batch, nodes, height, width = x.shape
    pixels, out = room(height, width, nodes, batch), room(batch, height, width, nodes)
    pixels.copy_(inside(x).permute(1, 2, 0, 3))
    turned(pixels.view(-1, batch), out.flatten(1))
    return out.permute(0, 3, 1, 2)


@_outermost.register_fake
def _(x, channels_last):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _keep_layout(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.channels_last = _is_channels_last(inputs[0])


_innermost.register_autograd(
    lambda ctx, grad: torch.ops.dnw.images_outermost(grad, ctx.channels_last), setup_context=_keep_layout
)
_outermost.register_autograd(lambda ctx, grad: (images_innermost(grad), None))


def images_innermost(x: Tensor) -> Tensor:
    """The same maps or numbers with their images innermost; gradients come back in the layout that was given."""
    given = x.is_contiguous() or _is_channels_last(x)
    return torch.ops.dnw.images_innermost(x) if given and not x.movedim(0, -1).is_contiguous() else x
