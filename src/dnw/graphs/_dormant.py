"""The gradient of all edges between some targets and sources, dormant ones included: one dense product.

Contract: made as the rule of the wiring needs it, :class:`dnw.kernels._wired.DormantGradient`. Active edges get theirs
elsewhere unless it is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dnw.kernels._graph import pooled
from dnw.kernels._wired import DormantGradient

_POOLED = (DormantGradient.POOLED, DormantGradient.POOLED_BFLOAT16)
_BFLOAT16 = (DormantGradient.BFLOAT16, DormantGradient.POOLED_BFLOAT16)


def factors(grads: Tensor, states: Tensor, needs: DormantGradient) -> tuple[Tensor, Tensor]:
    """What the product is of: matrices ``[targets, n]`` and ``[sources, n]``.

    Args:
        grads: of what reaches the targets, ``[targets, ..., images]``.
        states: of the sources, ``[sources, ..., images]``.
        needs: how it is made; plain numbers are not pooled.
    """
    dtype = torch.bfloat16 if needs in _BFLOAT16 else torch.float32
    if needs in _POOLED and grads.ndim == 4:
        grads, states = pooled(grads, mean=False, dtype=dtype), pooled(states, mean=True, dtype=dtype)
    return grads.to(dtype).flatten(1), states.to(dtype).flatten(1)


def product_into(out: Tensor, left: Tensor, right: Tensor, *, adds: bool = False) -> None:
    """``left right^T`` into a float32 matrix, which may be a part of another one; or added to it."""
    if left.dtype == out.dtype:
        out.addmm_(left, right.T, beta=int(adds))
    else:
        out.copy_(left @ right.T + (out if adds else 0))
