"""Operators of PyTorch that look at tensors in another way, choose parts of them, or put them side by side.

Contract: as in _traced.py. Most move no number: they become nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from dnw.compile._layers import Concat
from dnw.compile._program import Pick, Restore
from dnw.compile._traced import PRIME, Handlers, NotCompiled, Traced, need
from dnw.compile._views import BATCH, View

SHAPES = handles = Handlers()


@handles(
    "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "_assert_tensor_metadata", becomes="nothing", of_shapes=True
)
def _same(traced: Traced, node: fx.Node, x: Any, *_: Any, **__: Any) -> Any:
    return x


@handles("dropout", "feature_dropout", "alpha_dropout", becomes="nothing")
def _dropout(traced: Traced, node: fx.Node, x: Any, p: float, train: bool) -> Any:
    need(not train)
    return x


@handles("to", "_to_copy", "type_as", becomes="nothing")
def _to(traced: Traced, node: fx.Node, x: View, *_: Any, **__: Any) -> View:
    need(node.meta["val"].dtype.is_floating_point)  # whole numbers are floating-point numbers here already
    return x


@handles(
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "_unsafe_view",
    becomes="nothing, or `Rearrange` where numbers move",
    of_shapes=True,
)
def _view(traced: Traced, node: fx.Node, x: View, *_: Any, **__: Any) -> View:
    shape = traced.shape(node)
    found = x.reshaped(shape, PRIME)
    if found is None:
        found = traced.rearranged(x, [i for i, d in enumerate(x.dims) if d != (BATCH,)]).reshaped(shape, PRIME)
    need(found is not None)
    return found  # type: ignore[return-value]


@handles("permute", becomes="nothing", of_shapes=True)
def _permute(traced: Traced, node: fx.Node, x: View, order: Sequence[int]) -> View:
    return x.permuted([i % len(x.dims) for i in order])


@handles("transpose", "swapaxes", becomes="nothing", of_shapes=True)
def _transpose(traced: Traced, node: fx.Node, x: View, one: int, other: int) -> View:
    order = list(range(len(x.dims)))
    order[one], order[other] = order[other], order[one]
    return x.permuted(order)


@handles("t", "numpy_T", becomes="nothing", of_shapes=True)
def _t(traced: Traced, node: fx.Node, x: View) -> View:
    return x.permuted(range(len(x.dims))[::-1])


def _shuffled(traced: Traced, x: View, split: Sequence[int], order: Sequence[int], shape: Sequence[int]) -> View:
    """Dimensions split, in another order, and merged again."""
    for again in (False, True):
        if again:  # as it lies, dimension by dimension
            x = traced.rearranged(x, [i for i, d in enumerate(x.dims) if d != (BATCH,)])
        if (found := x.reshaped(split, PRIME)) is not None:
            found = found.permuted(order)
            whole = found.reshaped(shape, PRIME)
            if whole is None:
                found = traced.rearranged(found, [i for i, d in enumerate(found.dims) if d != (BATCH,)])
                whole = found.reshaped(shape, PRIME)
            need(whole is not None)
            return whole  # type: ignore[return-value]
    raise NotCompiled


@handles("channel_shuffle", becomes="nothing")
def _channel_shuffle(traced: Traced, node: fx.Node, x: View, groups: int) -> View:
    batch, channels, *sides = traced.shape(node)
    split = (batch, groups, channels // groups, *sides)
    order = (0, 2, 1, *range(3, len(split)))
    return _shuffled(traced, x, split, order, (batch, channels, *sides))


@handles("pixel_shuffle", becomes="`Rearrange`")
def _pixel_shuffle(traced: Traced, node: fx.Node, x: View, factor: int) -> View:
    batch, channels, height, width = traced.shape(node)
    split = (batch, channels, factor, factor, height // factor, width // factor)
    return _shuffled(traced, x, split, (0, 1, 4, 2, 5, 3), (batch, channels, height, width))


@handles("index", becomes="`Pick` of channels, by a constant list")
def _index(traced: Traced, node: fx.Node, x: View, indices: Sequence[Any]) -> View:
    at = [i for i, index in enumerate(indices) if index is not None]
    need(len(at) == 1 and x.dims[at[0]] != (BATCH,))
    index = indices[at[0]]
    need(isinstance(index, Tensor) and index.ndim == 1 and not index.is_floating_point() and index.dtype != torch.bool)
    x = traced.channelled(x, at[0])
    size = traced.sizes[x.value]
    made = traced.emit(Pick(torch.arange(size[0])[index.long()]), x.value)
    places = {i: n for n, i in enumerate(x.places, 1)}
    dims = tuple((0,) if n == at[0] else tuple(BATCH if i == BATCH else places[i] for i in d) for n, d in enumerate(x.dims))
    return View(made, ((0, len(index)), *(x.atoms[i] for i in x.places)), dims)._short()


@handles("expand", becomes="nothing", of_shapes=True)
def _expand(traced: Traced, node: fx.Node, x: View, *_: Any, **__: Any) -> View:
    shape = tuple(1 if n == PRIME else n for n in traced.shape(node))
    need(shape == x.shape)
    return x


@handles("select", becomes="`Pick` of channels, `Crop` of places", of_shapes=True)
def _select(traced: Traced, node: fx.Node, x: View, dim: int, index: int) -> View:
    dim %= len(x.dims)
    index %= x.length(x.dims[dim])
    return traced.part(x, dim, index, index + 1, drop=True)


@handles("slice", becomes="`Pick` of channels, `Crop` of places", of_shapes=True)
def _slice(traced: Traced, node: fx.Node, x: View, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> View:
    dim %= len(x.dims)
    length = PRIME if x.dims[dim] == (BATCH,) else x.length(x.dims[dim])
    need(all(n is None or isinstance(n, int) for n in (start, stop)))
    return traced.part(x, dim, *slice(start, stop, step).indices(length))


def _parts(traced: Traced, node: fx.Node, x: View, dim: int) -> Iterator[View]:
    start = 0
    dim %= len(x.dims)
    for made in node.meta["val"]:
        length = traced.number(made.shape[dim])
        yield traced.part(x, dim, start, start + length)
        start += length


@handles("chunk", "split", "split_with_sizes", "tensor_split", becomes="`Pick` of channels, `Crop` of places", of_shapes=True)
def _split(traced: Traced, node: fx.Node, x: View, _: Any, dim: int = 0) -> list[View]:
    return list(_parts(traced, node, x, dim))


@handles("unbind", becomes="`Pick` of channels, `Crop` of places", of_shapes=True)
def _unbind(traced: Traced, node: fx.Node, x: View, dim: int = 0) -> list[View]:
    dim %= len(x.dims)
    return [traced.part(x, dim, i, i + 1, drop=True) for i in range(x.length(x.dims[dim]))]


@handles("cat", "concat", "concatenate", becomes="`Concat`")
def _cat(traced: Traced, node: fx.Node, tensors: Sequence[Any], dim: int = 0) -> View:
    first = next(x for x in tensors if isinstance(x, View))
    dim %= len(first.dims)
    need(first.dims[0] == (BATCH,) and dim > 0)
    at = first.channels_at() or (len(first.dims) - 1 if len(first.dims) < 4 else 1)
    views = []
    for x in tensors:
        if isinstance(x, Tensor):
            order = [at, *(i for i in range(1, x.ndim) if i != at)]
            made = traced.emit(Restore(torch.empty(0, dtype=torch.int64), x[0].permute([i - 1 for i in order]).double()), 0)
            x = View.of(made, traced.sizes[made]).permuted([0, *(1 + order.index(i) for i in range(1, x.ndim))])
        x = traced.channelled(x, at)
        order = [at, *(i for i in range(1, len(x.dims)) if i != at)]
        size = tuple(x.length(x.dims[i]) for i in order)
        value = x.value
        views.append(traced.resized(value, size))
    order = [at, *(i for i in range(1, len(first.dims)) if i != at)]
    made = traced.emit(Concat(order.index(dim)), *views)
    return View.of(made, traced.sizes[made]).permuted([0, *(1 + order.index(i) for i in range(1, len(order) + 1))])


@handles("slice_scatter", becomes="`Concat`", of_shapes=True)
def _slice_scatter(
    traced: Traced, node: fx.Node, x: Any, part: Any, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> View:
    shape = traced.shape(node)
    dim %= len(shape)
    need(all(n is None or isinstance(n, int) for n in (start, stop)))
    first, last, step = slice(start, stop, step).indices(shape[dim])
    if (first, last, step) == (0, shape[dim], 1):
        need(isinstance(part, View))
        return part
    need(step == 1 and first < last and shape[dim] != PRIME)

    def piece(start: int, stop: int) -> Any:
        return x.narrow(dim, start, stop - start) if isinstance(x, Tensor) else traced.part(x, dim, start, stop)

    before, after = [piece(0, first)] if first else [], [piece(last, shape[dim])] if last < shape[dim] else []
    return _cat(traced, node, [*before, part, *after], dim)


@handles("select_scatter", becomes="`Concat`")
def _select_scatter(traced: Traced, node: fx.Node, x: Any, part: Any, dim: int, index: int) -> View:
    dim %= len(traced.shape(node))
    index %= traced.shape(node)[dim]
    part = part.unsqueeze(dim) if isinstance(part, Tensor) else replace(part, dims=(*part.dims[:dim], (), *part.dims[dim:]))
    return _slice_scatter(traced, node, x, part, dim, index, index + 1)


@handles("copy", becomes="nothing", of_shapes=True)
def _copy(traced: Traced, node: fx.Node, x: Any, other: Any, *_: Any) -> View:
    need(isinstance(other, View) and other.shape == tuple(1 if n == PRIME else n for n in traced.shape(node)))
    source: Any = node.args[1]
    into, given = node.meta["val"].dtype, source.meta["val"].dtype
    need(into == given or (into.is_floating_point and given.is_floating_point))
    return other


@handles("stack", becomes="`Concat`")
def _stack(traced: Traced, node: fx.Node, tensors: Sequence[Any], dim: int = 0) -> View:
    dim %= len(traced.shape(node))
    views = [
        x.unsqueeze(dim) if isinstance(x, Tensor) else replace(x, dims=(*x.dims[:dim], (), *x.dims[dim:])) for x in tensors
    ]
    return _cat(traced, node, views, dim)
