"""Dynamic graphs on kernels that skip absent edges: node functions and edges as two operators of PyTorch, with gradients.

Contract: as :mod:`dnw.graphs._static_kernels`; what comes out of either is a view of a tensor with its images innermost, which
the other takes without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnw.graphs._again import gradients_of, is_differentiated_again, normed
from dnw.graphs._dormant import factors, product_into
from dnw.graphs._innermost import images_innermost, inside, outside
from dnw.graphs._way import joined, norm_kind, statistics, update_statistics
from dnw.kernels._graph import Nodes, Norm, Rows
from dnw.kernels._room import room
from dnw.kernels._wired import DormantGradient, active_edges

# --- node functions ---


@torch.library.custom_op("dnw::nodes", mutates_args=())
def nodes(
    x: Tensor,
    filters: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    norm: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``conv(relu(norm(x)))`` of nodes ``[batch, nodes, height, width]``; and mean and reciprocal deviation of the norm."""
    kind, state = Norm(norm), inside(x)
    found, deviation = statistics(len(state), x.shape[0], kind, mean, variance, eps)
    out = room(*state.shape)
    Nodes(kind, filters.contiguous(), 1, eps, scale, shift, found, deviation).forward(state, out)
    return outside(out), found, deviation


@nodes.register_fake
def _(x, filters, scale, shift, mean, variance, norm, eps):  # type: ignore[no-untyped-def]
    shape = (x.shape[1], x.shape[0]) if norm == Norm.INSTANCE else (x.shape[1],)
    return x.new_empty(*x.shape[1:], x.shape[0]).movedim(-1, 0), x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("dnw::nodes_backward", mutates_args=())
def nodes_backward(
    grad: Tensor,
    x: Tensor,
    filters: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    deviation: Tensor,
    norm: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of inputs, filters, scales and shifts of :func:`nodes`."""
    state = inside(x)
    into = room(*state.shape)
    functions = Nodes(Norm(norm), filters.contiguous(), 1, eps, scale, shift, mean, deviation)
    return outside(into), *functions.backward(state, inside(grad), into)


@nodes_backward.register_fake
def _(grad, x, filters, *rest):  # type: ignore[no-untyped-def]
    into = x.new_empty(*x.shape[1:], x.shape[0]).movedim(-1, 0)
    return into, filters.new_empty(filters.shape), *(filters.new_empty(len(filters)) for _ in range(2))


def _keep_nodes(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, filters, scale, shift, _, _, *ctx.rest = inputs
    ctx.save_for_backward(x, filters, scale, shift, *output[1:])
    ctx.set_materialize_grads(False)


def _nodes_backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    if is_differentiated_again(grad):
        *inputs, mean, deviation = ctx.saved_tensors
        norm, eps = Norm(ctx.rest[0]), ctx.rest[1]

        def as_layers(x: Tensor, filters: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
            value = F.relu(normed(x, scale, shift, mean, deviation, norm, eps))
            return F.conv2d(value, filters.view(-1, 1, 3, 3), padding=1, groups=len(filters))

        return *gradients_of(as_layers, inputs, ctx.needs_input_grad, grad), *(None,) * 4
    into = torch.ops.dnw.nodes_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *(value if needs else None for value, needs in zip(into, ctx.needs_input_grad[:4], strict=True)), *(None,) * 4


torch.library.register_autograd("dnw::nodes", _nodes_backward, setup_context=_keep_nodes)


def run_nodes(filters: Tensor, x: Tensor, norm: nn.Module | None = None) -> Tensor:
    """``conv(relu(norm(x)))`` on kernels, which know the norm; running statistics move as in PyTorch.

    Args:
        filters: ``[nodes, 9]``.
        x: ``[batch, nodes, height, width]``.
        norm: of the nodes; none by default.
    """
    pixels, images = x.shape[2] * x.shape[3], x.shape[0]
    found = (Norm.NONE, 0.0) if norm is None else norm_kind([norm], pixels, images)
    assert found is not None
    kind, eps = found
    norms = [] if norm is None or kind is Norm.NONE else [norm]
    affine = (joined(norms, "weight"), joined(norms, "bias")) if norms else (None, None)
    given = (joined(norms, "running_mean"), joined(norms, "running_var")) if kind is Norm.GIVEN else (None, None)
    out, mean, deviation = torch.ops.dnw.nodes(images_innermost(x), filters, *affine, *given, int(kind), eps)
    if kind is Norm.BATCH:
        update_statistics(norms, mean, deviation, [pixels * images])
    return out


def is_relu(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation is the one that kernels do themselves."""
    return activation is F.relu or activation is torch.relu or type(activation) is nn.ReLU


# --- edges ---


def _compressed(weight: Tensor, columns: int) -> tuple[Rows, DormantGradient]:
    """The entries of the first columns."""
    active, needs = active_edges(weight)
    order = torch.arange(len(weight), device="cpu")
    limits = torch.full_like(order, columns)
    return Rows.of(active.contiguous(), weight.contiguous(), order, limits), needs


@torch.library.custom_op("dnw::edges", mutates_args=())
def edges(x: Tensor, weight: Tensor) -> Tensor:
    """What reaches the targets: ``[batch, sources, ...]`` to ``[batch, targets, ...]``.

    Args:
        x: what the first sources send; all others send nothing.
        weight: ``[targets, sources]``.
    """
    sent = inside(x)
    rows, _ = _compressed(weight, len(sent))
    out = room(len(weight), *sent.shape[1:])
    rows.times(sent.flatten(1), out.flatten(1))
    return outside(out)


@edges.register_fake
def _(x, weight):  # type: ignore[no-untyped-def]
    return x.new_empty(len(weight), *x.shape[2:], x.shape[0]).movedim(-1, 0)


@torch.library.custom_op("dnw::edges_backward", mutates_args=())
def edges_backward(grad: Tensor, x: Tensor, weight: Tensor, needs_weight: bool) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`edges`."""
    sent, above = inside(x), inside(grad)
    rows, needs = _compressed(weight, len(sent))
    back = rows.transposed()[0 : len(sent)]
    into, of_weight = room(*sent.shape), room(*weight.shape).zero_()
    if needs is DormantGradient.EXACT or not needs_weight:
        back.times(above.flatten(1), into.flatten(1))
    else:
        of_active = back.times_and_products(above.flatten(1), sent.flatten(1), into.flatten(1))
    if needs_weight and needs is not DormantGradient.NONE:
        product_into(of_weight[:, : len(sent)], *factors(above, sent, needs))
    if needs_weight and needs is not DormantGradient.EXACT:
        back.scatter(of_active, torch.arange(len(weight), device="cpu"), of_weight)
    return outside(into), of_weight


@edges_backward.register_fake
def _(grad, x, weight, needs_weight):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[1:], x.shape[0]).movedim(-1, 0), weight.new_empty(weight.shape)


def _as_product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("ts,bs...->bt...", weight[:, : x.shape[1]], x)


def _keep_edges(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _edges_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if is_differentiated_again(grad):
        of_x, of_weight = gradients_of(_as_product, ctx.saved_tensors, ctx.needs_input_grad, grad)
        return of_x, of_weight
    of_x, of_weight = torch.ops.dnw.edges_backward(grad, *ctx.saved_tensors, ctx.needs_input_grad[1])
    return of_x if ctx.needs_input_grad[0] else None, of_weight if ctx.needs_input_grad[1] else None


torch.library.register_autograd("dnw::edges", _edges_backward, setup_context=_keep_edges)
