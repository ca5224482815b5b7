"""Second derivatives of graphs on kernels: first ones are made of operations of PyTorch where they are differentiated again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dnw.kernels._graph import Norm


def is_differentiated_again(grad: Tensor) -> bool:
    """Whether a backward pass is to be differentiated itself (``create_graph=True``); not so while a compiler traces it."""
    return torch.is_grad_enabled() and type(grad) is Tensor


def gradients_of(
    out: Tensor, inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs that need one, which can be differentiated again."""
    wanted = [x for x, needs in zip(inputs, needed, strict=False) if needs and x is not None]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if needs and x is not None else None for x, needs in zip(inputs, needed, strict=False))


def normed(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    deviation: Tensor,
    norm: Norm,
    eps: float,
) -> Tensor:
    """What a norm makes of ``[batch, nodes, height, width]``; mean and reciprocal deviation are those of given statistics."""
    if norm is Norm.NONE:
        return x
    if norm is Norm.INSTANCE:
        return F.instance_norm(x, None, None, scale, shift, True, eps=eps)
    if norm is Norm.BATCH:
        return F.batch_norm(x, None, None, scale, shift, True, eps=eps)
    return F.batch_norm(x, mean, 1 / deviation.square() - eps, scale, shift, False, eps=eps)
