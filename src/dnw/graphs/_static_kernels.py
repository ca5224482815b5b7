"""Static graphs on kernels that skip absent edges, as an operator of PyTorch with a gradient of its own.

Contract: the numbers of the PyTorch path within float32 rounding. Inside, maps have their images innermost
(``[nodes, height, width, images]``), so that every kernel runs over contiguous numbers, small maps included; what comes out is
a view of such a map, which the next graph takes without a copy. Every node's state is kept for the backward pass, and what
reached it; norm and ReLU are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnw.graphs._again import gradients_of, is_differentiated_again, normed
from dnw.graphs._dormant import factors, product_into
from dnw.graphs._innermost import images_innermost, inside, outside
from dnw.graphs._levels import Levels
from dnw.graphs._way import joined, norm_kind, statistics, update_statistics
from dnw.kernels._graph import Nodes, Norm, Rows, out_size
from dnw.kernels._room import room
from dnw.kernels._wired import DormantGradient, active_edges


@lru_cache(maxsize=256)
def _rows_of(levels: Levels) -> tuple[Tensor, Tensor]:
    """Of every inner node and output, in order: its row of the weight, and how many columns it reads."""
    starts = [0, *accumulate(levels.sizes)]
    inner = torch.arange(levels.num_inner, device="cpu") + levels.first_row
    outputs = torch.arange(levels.num_outputs, device="cpu") + (levels.shape[0] - levels.num_outputs)
    limits = [start for start, size in zip(starts[1:], levels.sizes[1:], strict=False) for _ in range(size)]
    return torch.cat([inner, outputs]), torch.tensor(limits + [levels.num_sources] * levels.num_outputs, device="cpu")


def _bounds(levels: Levels) -> list[tuple[int, int]]:
    """Of each level its first node and the one after its last."""
    return list(pairwise([0, *accumulate(levels.sizes)]))


def _compressed(weight: Tensor, levels: Levels) -> tuple[Rows, DormantGradient]:
    active, needs = active_edges(weight)
    return Rows.of(active.contiguous(), weight.detach().contiguous(), *_rows_of(levels)), needs


def _part(values: Tensor | None, first: int, last: int) -> Tensor | None:
    return None if values is None else values[first:last]


class _Graph:
    """The node functions of a graph by level."""

    def __init__(
        self,
        levels: Levels,
        filters: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        mean: Tensor,
        deviation: Tensor,
        stride: int,
        norm: Norm,
        eps: float,
    ) -> None:
        filters = filters.detach().contiguous()
        self.nodes = [
            Nodes(
                norm,
                filters[a:b],
                1 if a else stride,
                eps,
                _part(scale, a, b),
                _part(shift, a, b),
                mean[a:b],
                deviation[a:b],
            )
            for a, b in _bounds(levels)
        ]


@torch.library.custom_op("dnw::static_graph", mutates_args=())
def static_graph(
    x: Tensor,
    weight: Tensor,
    filters: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    sizes: Sequence[int],
    outputs: int,
    shared: bool,
    stride: int,
    norm: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A static graph on ``[batch, inputs, height, width]``.

    Args:
        x: what the inputs get.
        weight: ``[targets, sources]``.
        filters: of the nodes' convolutions, ``[sources, 9]``.
        scale, shift: of the nodes' norms, ``[sources]``.
        mean, variance: of the nodes' norms, ``[sources]``, where they are given.
        sizes, outputs, shared: see :class:`Levels`.
        stride: of the inputs' convolution.
        norm: a :class:`Norm`.
        eps: of the norms.

    Returns:
        ``[batch, outputs, ...]``; what reached the inner nodes, and the states of all, ``[nodes, height, width, batch]``; mean
        and reciprocal deviation of the norms.
    """
    levels, kind = Levels(tuple(sizes), outputs, shared), Norm(norm)
    images, height, width = x.shape[0], out_size(x.shape[2], stride), out_size(x.shape[3], stride)
    found, deviation = statistics(levels.num_sources, images, kind, mean, variance, eps)
    graph = _Graph(levels, filters, scale, shift, found, deviation, stride, kind, eps)
    rows, _ = _compressed(weight, levels)
    states = room(levels.num_sources, height, width, images)
    incoming = room(levels.num_inner, height, width, images)
    bounds = _bounds(levels)
    graph.nodes[0].forward(inside(x), states[: levels.num_inputs])
    for (a, b), nodes in zip(bounds[1:], graph.nodes[1:], strict=True):
        first, last = a - levels.num_inputs, b - levels.num_inputs
        rows[first:last].times(states[:a].flatten(1), incoming[first:last].flatten(1))
        nodes.forward(incoming[first:last], states[a:b])
    out = room(outputs, height, width, images)
    rows[levels.num_inner : levels.num_inner + outputs].times(states.flatten(1), out.flatten(1))
    return outside(out), incoming, states, found, deviation


@static_graph.register_fake
def _(x, weight, filters, scale, shift, mean, variance, sizes, outputs, shared, stride, norm, eps):  # type: ignore[no-untyped-def]
    images, height, width = x.shape[0], out_size(x.shape[2], stride), out_size(x.shape[3], stride)
    out = x.new_empty(outputs, height, width, images).permute(3, 0, 1, 2)
    shape = (sum(sizes), images) if norm == Norm.INSTANCE else (sum(sizes),)
    incoming, states = (x.new_empty(n, height, width, images) for n in (sum(sizes[1:]), sum(sizes)))
    return out, incoming, states, x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("dnw::static_graph_backward", mutates_args=())
def static_graph_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    filters: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    incoming: Tensor,
    states: Tensor,
    mean: Tensor,
    deviation: Tensor,
    sizes: Sequence[int],
    outputs: int,
    shared: bool,
    stride: int,
    norm: int,
    eps: float,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of inputs, weight, filters, scales and shifts of :func:`static_graph`."""
    levels = Levels(tuple(sizes), outputs, shared)
    graph = _Graph(levels, filters, scale, shift, mean, deviation, stride, Norm(norm), eps)
    rows, needs = _compressed(weight, levels)
    back = rows.transposed()
    grads = room(len(rows), *states.shape[1:])  # of what reaches inner nodes and outputs
    grads[levels.num_inner :] = grad.permute(1, 2, 3, 0)
    into_x = room(levels.num_inputs, *x.shape[2:], x.shape[0])
    parts: list[tuple[Tensor, ...]] = []
    is_exact = needs is DormantGradient.EXACT or not needs_weight
    for (a, b), nodes in reversed(list(zip(_bounds(levels), graph.nodes, strict=True))):
        sent = room(b - a, *states.shape[1:])
        first, last = a - levels.num_inputs, b - levels.num_inputs
        given, values = (grads.flatten(1), sent.flatten(1), max(0, last)), sent.new_empty(0)
        if is_exact:
            back[a:b].times(*given)
        else:
            values = back[a:b].times_and_products(given[0], states[a:b].flatten(1), *given[1:])
        before = inside(x) if a == 0 else incoming[first:last]
        parts.append((*nodes.backward(before, sent, into_x if a == 0 else grads[first:last]), values))
    of_filters, of_scale, of_shift, of_active = (torch.cat(part[::-1]) for part in zip(*parts, strict=True))
    of_weight = room(*weight.shape).zero_()
    if needs_weight:
        _edge_gradients(of_weight, levels, back, of_active, grads, states, needs)
    return outside(into_x), of_weight, of_filters, of_scale, of_shift


@static_graph_backward.register_fake
def _(grad, x, weight, filters, scale, shift, *rest):  # type: ignore[no-untyped-def]
    into_x = x.new_empty(x.shape[1], *x.shape[2:], x.shape[0]).permute(3, 0, 1, 2)
    return (
        into_x,
        weight.new_empty(weight.shape),
        filters.new_empty(filters.shape),
        *(filters.new_empty(len(filters)) for _ in range(2)),
    )


def _edge_gradients(
    into: Tensor, levels: Levels, back: Rows, of_active: Tensor, grads: Tensor, states: Tensor, needs: DormantGradient
) -> None:
    """The gradient of every edge that a rule needs: of all candidates, or of the active ones alone, which are by source."""
    order, _ = _rows_of(levels)
    if needs is not DormantGradient.NONE:
        left, right = factors(grads, states, needs)
        inner, outputs = levels.num_inner, into[-levels.num_outputs :]
        for a, b in _bounds(levels):
            later = max(0, b - levels.num_inputs)
            if levels.shared_outputs:
                targets = into[levels.first_row :]
                product_into(targets[later:inner, a:b], left[later:inner], right[a:b])
                product_into(outputs[:, a:b], left[inner:], right[a:b], adds=True)
            else:
                product_into(into[later:, a:b], left[later:], right[a:b])
    if needs is not DormantGradient.EXACT:
        if needs is not DormantGradient.NONE and levels.shared_outputs:
            back.scatter(torch.zeros_like(of_active), order, into)
        back.scatter(of_active, order, into, adds=levels.shared_outputs)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, filters, scale, shift, _, _, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, filters, scale, shift, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    x, weight, filters, scale, shift, *saved = ctx.saved_tensors
    if is_differentiated_again(grad):
        inputs = [x, weight, filters, scale, shift]
        as_layers = lambda *given: _as_layers(*given, *saved[2:], *ctx.rest)  # noqa: E731
        return *gradients_of(as_layers, inputs, ctx.needs_input_grad, grad), *(None,) * 8
    into = torch.ops.dnw.static_graph_backward(
        grad, x, weight, filters, scale, shift, *saved, *ctx.rest, ctx.needs_input_grad[1]
    )
    needed = zip(into, ctx.needs_input_grad[:5], strict=True)
    return *(value if needs else None for value, needs in needed), *(None,) * 8


def _as_layers(
    x: Tensor,
    weight: Tensor,
    filters: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    deviation: Tensor,
    sizes: Sequence[int],
    outputs: int,
    shared: bool,
    stride: int,
    norm: int,
    eps: float,
) -> Tensor:
    """What the operator computes, of operations that can be differentiated any number of times."""
    levels, incoming = Levels(tuple(sizes), outputs, shared), x
    states: list[Tensor] = []
    order, _ = _rows_of(levels)
    for a, b in _bounds(levels):
        if a:
            rows = order[a - levels.num_inputs : b - levels.num_inputs]
            incoming = F.conv2d(torch.cat(states, dim=1), weight[rows, :a, None, None])
        of_norm = _part(scale, a, b), _part(shift, a, b), mean[a:b], deviation[a:b]
        value = F.relu(normed(incoming, *of_norm, Norm(norm), eps))
        filter_ = filters[a:b].view(-1, 1, 3, 3)
        states.append(F.conv2d(value, filter_, stride=1 if a else stride, padding=1, groups=b - a))
    return F.conv2d(torch.cat(states, dim=1), weight[-outputs:, :, None, None])


torch.library.register_autograd("dnw::static_graph", _backward, setup_context=_setup)


def run_static_graph(levels: Levels, nodes: Sequence[Any], weight: Tensor, x: Tensor) -> Tensor:
    """A static graph on kernels, which know its norms; running statistics move as in PyTorch.

    Args:
        levels: of the graph.
        nodes: the :class:`Node` of each level.
        weight: ``[targets, sources]``.
        x: ``[batch, inputs, height, width]``.
    """
    norms, stride = [node.norm for node in nodes], nodes[0].conv.stride[0]
    height, width = (out_size(size, stride) for size in x.shape[2:])
    found = norm_kind(norms, height * width, x.shape[0])
    assert found is not None
    norm, eps = found
    filters = torch.cat([node.conv.weight.flatten(1) for node in nodes])
    scale, shift = (None, None) if norm is Norm.NONE else (joined(norms, "weight"), joined(norms, "bias"))
    given = (joined(norms, "running_mean"), joined(norms, "running_var")) if norm is Norm.GIVEN else (None, None)
    topology = list(levels.sizes), levels.num_outputs, levels.shared_outputs
    out, _, _, mean, deviation = torch.ops.dnw.static_graph(
        images_innermost(x), weight, filters, scale, shift, *given, *topology, stride, int(norm), eps
    )
    if norm is Norm.BATCH:
        pixels = [x.shape[2] * x.shape[3], *[height * width] * (len(norms) - 1)]
        update_statistics(norms, mean, deviation, [x.shape[0] * number for number in pixels])
    return out
