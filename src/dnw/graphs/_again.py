"""Second derivatives of graphs on kernels: first ones are made of operations of PyTorch where they are differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dnw.kernels._graph import Norm


def is_differentiated_again(grad: Tensor) -> bool:
    """Whether a backward pass is to be differentiated itself (``create_graph=True``); not so while a compiler traces it."""
    return torch.is_grad_enabled() and type(grad) is Tensor


def gradients_of(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs that need one, which can be differentiated again.

    Args:
        function: of the inputs.
        inputs: where one came from another, as a state from a weight, the gradient does not go back there.
        needed: which inputs need a gradient; the rest of it is not looked at.
        grad: of what the function gives.
    """
    places = [i for i, x in enumerate(inputs) if x is not None and needed[i]]
    aliases = [x.view_as(x) if i in places and x is not None else x for i, x in enumerate(inputs)]
    wanted = [alias for i, alias in enumerate(aliases) if i in places and alias is not None]
    found = iter(torch.autograd.grad(function(*aliases), wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if i in places else None for i in range(len(inputs)))


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
    return F.batch_norm(x, mean.detach(), 1 / deviation.detach().square() - eps, scale, shift, False, eps=eps)
