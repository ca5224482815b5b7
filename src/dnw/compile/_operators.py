"""Operators of PyTorch that compute something: sums, norms, activations, pools, attention.

Contract: as in _traced.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from dnw.compile._layers import (
    Activation,
    AdaptiveMean,
    Attention,
    LayerNorm,
    Pad,
    PlaceMean,
    Pool,
    Product,
    Rearrange,
    Shift,
    Sum,
)
from dnw.compile._program import Affine, Constant, Convolution, InstanceNorm, Instruction, Linear, Pick, Restore
from dnw.compile._traced import PRIME, Handlers, OverImages, Traced, need
from dnw.compile._views import BATCH, View

OPERATORS = handles = Handlers()


@handles("conv2d", becomes="`Convolution`, `Linear` of single pixels")
def _conv2d(
    traced: Traced,
    node: fx.Node,
    x: View,
    weight: Any,
    bias: Any = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
) -> View:
    need(isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor)))
    padding = _padding(padding, weight, _pair(dilation))
    if x.shape[2:] == weight.shape[2:] == (1, 1) and groups == 1 and _pair(padding) == (0, 0):
        return _linear_at(traced, x, 1, weight[:, :, 0, 0], bias)
    x = traced.maps(x)
    instruction = Convolution(weight, None, _pair(stride), _pair(padding), groups, _pair(dilation))
    size = instruction.check(traced.sizes[x.value])
    if bias is not None:
        sides = [torch.zeros(n, dtype=torch.int64) for n in size[1:]]
        instruction = replace(
            instruction, constant=Constant(bias, torch.empty(0, dtype=torch.int64), bias.new_zeros(0, 1, 1), *sides)
        )
    return View.of(traced.emit(instruction, x.value), size)


@handles("convolution", becomes="`Convolution`, `Linear` of single pixels")
def _convolution(
    traced: Traced,
    node: fx.Node,
    x: View,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> View:
    need(isinstance(weight, Tensor) and weight.ndim in (3, 4) and not transposed)
    return (_conv1d if weight.ndim == 3 else _conv2d)(traced, node, x, weight, bias, stride, padding, dilation, groups)


def _padding(padding: Any, weight: Tensor, dilation: tuple[int, int]) -> Any:
    """How many zeros are beside maps, where they are as many on both sides."""
    if not isinstance(padding, str):
        return padding
    both = [d * (k - 1) if padding == "same" else 0 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    need(not any(n % 2 for n in both))
    return tuple(n // 2 for n in both)


@handles("conv1d", becomes="`Convolution` of one row")
def _conv1d(
    traced: Traced,
    node: fx.Node,
    x: View,
    weight: Any,
    bias: Any = None,
    stride: Any = (1,),
    padding: Any = (0,),
    dilation: Any = (1,),
    groups: int = 1,
) -> View:
    need(isinstance(weight, Tensor))
    weight, x = weight[:, :, None], replace(x, dims=(*x.dims[:2], (), *x.dims[2:]))
    padding = _padding(padding, weight, (1, _pair(dilation)[1]))
    sides = (1, _pair(stride)[1]), (0, _pair(padding)[1]), (1, _pair(dilation)[1])
    found = _conv2d(traced, node, x, weight, bias, *sides, groups)
    return replace(found, dims=(*found.dims[:2], *found.dims[3:]))


def _linear_at(traced: Traced, x: View, dim: int, weight: Tensor, bias: Tensor | None) -> View:
    """A matrix along a dimension."""
    x = traced.channelled(x, dim)
    value = traced.emit(Linear(weight, weight.new_zeros(len(weight)) if bias is None else bias), x.value)
    at = {i: n for n, i in enumerate(x.places, 1)}
    dims = tuple((0,) if n == dim else tuple(BATCH if i == BATCH else at[i] for i in d) for n, d in enumerate(x.dims))
    return View(value, ((0, len(weight)), *(x.atoms[i] for i in x.places)), dims)._short()


@handles("linear", becomes="`Linear`")
def _linear(traced: Traced, node: fx.Node, x: View, weight: Any, bias: Any = None) -> View:
    need(isinstance(x, View) and isinstance(weight, Tensor) and len(x.dims) > 1)
    return _linear_at(traced, x, len(x.dims) - 1, weight, bias)


@handles("addmm", becomes="`Linear`")
def _addmm(traced: Traced, node: fx.Node, bias: Any, x: Any, weight: Any, **scales: Any) -> View:
    need(not scales)
    need(isinstance(bias, Tensor) and bias.ndim == 1 and isinstance(x, View) and isinstance(weight, Tensor))
    return _linear_at(traced, x, len(x.dims) - 1, weight.t(), bias)


@handles("matmul", "mm", becomes="`Linear`")
def _matmul(traced: Traced, node: fx.Node, x: Any, weight: Any) -> View:
    need(isinstance(x, View) and isinstance(weight, Tensor) and weight.ndim == 2 and len(x.dims) > 1)
    return _linear_at(traced, x, len(x.dims) - 1, weight.t(), None)


@handles("batch_norm", becomes="`Affine`, part of the sums before it")
def _batch_norm(
    traced: Traced, node: fx.Node, x: View, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any
) -> View:
    if training:
        raise _over_images(traced)
    need(isinstance(mean, Tensor) and isinstance(var, Tensor) and len(x.dims) > 1)
    scale = (1.0 if weight is None else weight) / (var + rest[1]).sqrt()
    shift = (0.0 if bias is None else bias) - mean * scale
    x = traced.channelled(x, 1)
    return traced.like(x, traced.emit(Affine(scale, shift), x.value))


@handles("_native_batch_norm_legit_no_training", becomes="`Affine`, part of the sums before it")
def _batch_norm_alone(
    traced: Traced, node: fx.Node, x: View, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any
) -> list[View | None]:
    _need_first(node)
    return [_batch_norm(traced, node, x, weight, bias, mean, var, False, *rest), None, None]


def _need_first(node: fx.Node) -> None:
    """Gives up where more than the first of several results is read: the others are for training."""
    need(all(item.args[1] == 0 or not item.users for item in node.users))


@handles("_native_batch_norm_legit", "_native_batch_norm_legit_functional", becomes="an error: it mixes the images of a batch")
def _batch_norm_over_images(traced: Traced, node: fx.Node, *_: Any) -> View:
    raise _over_images(traced)


def _over_images(traced: Traced) -> OverImages:
    return OverImages(
        f"{traced.where or 'the model'}: a norm over the images of a batch; compiled are norms with running statistics, of "
        "models that were exported in eval mode"
    )


@handles("instance_norm", becomes="`InstanceNorm`, or as a batch norm")
def _instance_norm(
    traced: Traced, node: fx.Node, x: View, weight: Any, bias: Any, mean: Any, var: Any, own: bool, *rest: Any
) -> View:
    if not own:
        return _batch_norm(traced, node, x, weight, bias, mean, var, False, *rest)
    x = traced.maps(x)
    channels = traced.sizes[x.value][0]
    scale = torch.ones(channels, dtype=torch.float64) if weight is None else weight
    shift = torch.zeros(channels, dtype=torch.float64) if bias is None else bias
    return traced.like(x, traced.emit(InstanceNorm(scale, shift, rest[1]), x.value))


@handles("layer_norm", becomes="`LayerNorm`, over the last dimension")
def _layer_norm(
    traced: Traced,
    node: fx.Node,
    x: View,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> View:
    need(len(shape) == 1 and len(x.dims) > 1)
    x = traced.channelled(x, len(x.dims) - 1)
    return _normed(traced, x, weight, bias, eps, 1, False)


@handles("native_layer_norm", becomes="`LayerNorm`, over the last dimension")
def _native_layer_norm(
    traced: Traced, node: fx.Node, x: View, shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> list[View | None]:
    _need_first(node)
    return [_layer_norm(traced, node, x, shape, weight, bias, eps), None, None]


@handles("group_norm", becomes="`LayerNorm`, over places")
def _group_norm(
    traced: Traced, node: fx.Node, x: View, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> View:
    return _normed(traced, traced.channelled(x, 1), weight, bias, eps, groups, True)


@handles("native_group_norm", becomes="`LayerNorm`, over places", of_shapes=True)
def _native_group_norm(
    traced: Traced,
    node: fx.Node,
    x: View,
    weight: Any,
    bias: Any,
    images: Any,
    channels: int,
    places: int,
    groups: int,
    eps: float,
) -> list[View | None]:
    _need_first(node)
    return [_group_norm(traced, node, x, groups, weight, bias, eps), None, None]


def _normed(traced: Traced, x: View, weight: Any, bias: Any, eps: float, groups: int, over_places: bool) -> View:
    channels = traced.sizes[x.value][0]
    scale = torch.ones(channels, dtype=torch.float64) if weight is None else weight
    shift = torch.zeros(channels, dtype=torch.float64) if bias is None else bias
    return traced.like(x, traced.emit(LayerNorm(scale, shift, eps, groups, over_places), x.value))


@handles("scaled_dot_product_attention", becomes="`Attention`, with a mask that is a constant")
def _attention(
    traced: Traced,
    node: fx.Node,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> View:
    need(all(isinstance(x, View) and len(x.dims) == 4 for x in (q, k, v)) and not dropout and not enable_gqa)
    need(all(x.dims[0] == (BATCH,) for x in (q, k, v)))
    heads, width = q.shape[1], q.shape[3]
    values = []
    for x in (q, k, v):
        if (
            x.dims[0] != (BATCH,)
            or (*x.dims[1], *x.dims[3]) != x.whole(0)
            or x.dims[2] != x.places
            or len(traced.sizes[x.value]) != 2
        ):
            x = traced.rearranged(x, [1, 3, 2])
            joined = (x.shape[1] * x.shape[3], x.shape[2])
            values.append(traced.emit(Rearrange(traced.sizes[x.value], (0, 1, 2), joined), x.value))
        else:
            values.append(x.value)
    added = _mask(mask, is_causal, q.shape[2], k.shape[2])
    made = traced.emit(Attention(heads, width**-0.5 if scale is None else float(scale), added), *values)
    channels, tokens = traced.sizes[made]
    return View(made, ((0, heads), (0, channels // heads), (1, tokens)), ((BATCH,), (0,), (2,), (1,)))._short()


def _mask(mask: Any, is_causal: bool, queries: int, keys: int) -> Tensor | None:
    """What is added to the scores of attention, where that is the same for all images and heads."""
    if is_causal:
        need(mask is None)
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    if mask is None:
        return None
    need(isinstance(mask, Tensor) and all(n == 1 for n in mask.shape[:-2]))
    mask = mask.reshape(mask.shape[-2:]).expand(queries, keys)
    if mask.dtype == torch.bool:
        mask = torch.zeros(queries, keys, dtype=torch.float64).masked_fill(~mask, -float("inf"))
    return mask.double().clone() if bool(mask.any()) else None


# --- elementwise ---


def _activates(name: str, kind: str, *defaults: float) -> None:
    def handler(traced: Traced, node: fx.Node, x: View, *given: Any, **_: Any) -> View:
        numbers = [default if n is None else float(n) for n, default in zip([*given, *[None] * 2], defaults, strict=False)]
        return traced.like(x, traced.emit(Activation(kind, *numbers), x.value))

    handles(name, becomes="`Activation`")(handler)


for _name, _kind, _defaults in (
    ("relu", "relu", ()),
    ("hardtanh", "clamp", (-1.0, 1.0)),
    ("leaky_relu", "leaky_relu", (0.01,)),
    ("sigmoid", "sigmoid", ()),
    ("tanh", "tanh", ()),
    ("silu", "silu", ()),
    ("hardswish", "hardswish", ()),
    ("hardsigmoid", "hardsigmoid", ()),
):
    _activates(_name, _kind, *_defaults)


@handles("relu6", becomes="`Activation`")
def _relu6(traced: Traced, node: fx.Node, x: View) -> View:
    return traced.like(x, traced.emit(Activation("clamp", 0.0, 6.0), x.value))


@handles("clamp", "clamp_min", "clamp_max", becomes="`Activation`")
def _clamp(traced: Traced, node: fx.Node, x: View, low: Any = None, high: Any = None) -> View:
    if "clamp_max" in str(node.target):
        low, high = None, low
    need(all(n is None or isinstance(n, (int, float)) for n in (low, high)))
    ends = (-float("inf") if low is None else float(low), float("inf") if high is None else float(high))
    return traced.like(x, traced.emit(Activation("clamp", *ends), x.value))


@handles("elu", becomes="`Activation`")
def _elu(traced: Traced, node: fx.Node, x: View, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> View:
    need(scale == 1 and input_scale == 1)
    return traced.like(x, traced.emit(Activation("elu", float(alpha)), x.value))


@handles("prelu", becomes="`Activation`, `Affine`, `Sum`")
def _prelu(traced: Traced, node: fx.Node, x: View, slope: Any) -> View:
    need(isinstance(slope, Tensor) and len(x.dims) > 1)
    if slope.numel() == 1:
        return traced.like(x, traced.emit(Activation("leaky_relu", float(slope)), x.value))
    x = traced.channelled(x, 1)
    above = traced.emit(Activation("relu"), x.value)
    below = _affine(traced, traced.like(x, traced.emit(Activation("relu"), _affine(traced, x, -1.0, 0.0).value)), -slope, 0.0)
    return traced.like(x, traced.emit(Sum(), above, below.value))


@handles("gelu", becomes="`Activation`")
def _gelu(traced: Traced, node: fx.Node, x: View, approximate: str = "none") -> View:
    return traced.like(x, traced.emit(Activation("gelu" if approximate == "none" else "gelu_tanh"), x.value))


def _affine(traced: Traced, x: View, scale: Tensor | float, shift: Tensor | float) -> View:
    """Numbers per channel, as values lie."""
    channels = traced.sizes[x.value][0]
    scale, shift = (torch.as_tensor(t, dtype=torch.float64).reshape(-1).expand(channels).clone() for t in (scale, shift))
    return traced.like(x, traced.emit(Affine(scale, shift), x.value))


def _paired(traced: Traced, x: View, y: View) -> tuple[View, View]:
    """Two tensors of one shape, or one of them with numbers per channel, as values that lie in the same way."""
    if x.pattern() == y.pattern():
        size, other = traced.sizes[x.value], traced.sizes[y.value]
        return x, (y if size == other else replace(y, value=traced.resized(y.value, size)))
    need(len(x.dims) == len(y.dims) and x.dims[0] == y.dims[0] == (BATCH,))
    if x.shape != y.shape:
        large, small = (x, y) if len(x.atoms) >= len(y.atoms) else (y, x)
        at = [i for i in range(1, len(x.dims)) if small.shape[i] != large.shape[i]]
        if len(at) == 1 and small.shape[at[0]] == 1 and any(small.dims[1:]):  # the same for all channels
            large, small = traced.channelled(large, at[0]), traced.channelled(small, at[0])
            size = traced.sizes[large.value]
            value = traced.resized(small.value, (1, *size[1:]))
            small = traced.like(large, traced.emit(Pick(torch.zeros(size[0], dtype=torch.int64)), value))
            return (large, small) if large.shape == x.shape else (small, large)
        at = [i for i in range(1, len(x.dims)) if small.shape[i] != 1]
        need(len(at) == 1 and small.shape[at[0]] == large.shape[at[0]])
        large, small = traced.channelled(large, at[0]), traced.channelled(small, at[0])
        if len(traced.sizes[small.value]) > 1:
            size = traced.sizes[small.value]
            small = replace(small, value=traced.resized(small.value, size[:1]))
        return (large, small) if large.shape == x.shape else (small, large)
    where = next((i for i in (x.channels_at(), y.channels_at()) if i is not None), 1)
    order = [where, *(i for i in range(1, len(x.dims)) if i != where)]
    x, y = traced.channelled(x, where), traced.channelled(y, where)
    if x.pattern() != y.pattern() or traced.sizes[x.value] != traced.sizes[y.value]:
        x, y = traced.rearranged(x, order), traced.rearranged(y, order)
    return x, y


def _joined(traced: Traced, instruction: Instruction, x: View, y: View) -> View:
    x, y = _paired(traced, x, y)
    made = traced.emit(instruction, x.value, y.value)
    return traced.like(x if len(traced.sizes[x.value]) >= len(traced.sizes[y.value]) else y, made)


@handles("add", becomes="`Sum`; of constants `Affine`, `Shift`")
def _add(traced: Traced, node: fx.Node, x: Any, y: Any, alpha: float = 1.0) -> View:
    if isinstance(x, View) and isinstance(y, View):
        return _joined(traced, Sum(), x, y if alpha == 1 else _affine(traced, y, alpha, 0.0))
    if not isinstance(x, View):
        need(alpha == 1 or not isinstance(x, Tensor))
        x, y = (y if alpha == 1 else _affine(traced, y, alpha, 0.0)), x
        alpha = 1.0
    return _shifted(traced, node, x, _precise(y) * alpha)


def _precise(number: Any) -> Any:
    """A constant in double precision: whole numbers may be too short for what is computed with them."""
    return number.double() if isinstance(number, Tensor) else number


def _keeps_shape(traced: Traced, node: fx.Node, x: View, constant: Any) -> None:
    """Gives up where a constant is broadcast to more than the tensor that it meets."""
    shape = traced.shape(node)
    need(
        not isinstance(constant, Tensor)
        or (tuple(1 if n == PRIME else n for n in shape) == x.shape and shape.count(PRIME) <= 1)
    )


def _shifted(traced: Traced, node: fx.Node, x: View, constant: Any) -> View:
    _keeps_shape(traced, node, x, constant)
    if not isinstance(constant, Tensor) or constant.numel() == 1:
        return _affine(traced, x, 1.0, float(constant))
    laid = traced.laid(constant, x)
    if laid.numel() == len(laid):
        return _affine(traced, x, 1.0, laid)
    return traced.like(x, traced.emit(Shift(laid.expand(traced.sizes[x.value]).clone()), x.value))


@handles("sub", becomes="`Sum`; of constants `Affine`, `Shift`")
def _sub(traced: Traced, node: fx.Node, x: Any, y: Any, alpha: float = 1.0) -> View:
    if isinstance(y, View):
        return _add(traced, node, _affine(traced, y, -float(alpha), 0.0), x)
    return _shifted(traced, node, x, -_precise(y) * alpha)


@handles("rsub", becomes="`Sum`; of constants `Affine`, `Shift`")
def _rsub(traced: Traced, node: fx.Node, x: View, y: Any, alpha: float = 1.0) -> View:
    return _add(traced, node, _affine(traced, x, -float(alpha), 0.0), y)


@handles("neg", becomes="`Affine`")
def _neg(traced: Traced, node: fx.Node, x: View) -> View:
    return _affine(traced, x, -1.0, 0.0)


@handles("mul", becomes="`Product`; of constants `Affine`")
def _mul(traced: Traced, node: fx.Node, x: Any, y: Any) -> View:
    if isinstance(x, View) and isinstance(y, View):
        return _joined(traced, Product(), x, y)
    x, y = (x, y) if isinstance(x, View) else (y, x)
    _keeps_shape(traced, node, x, y)
    if not isinstance(y, Tensor) or y.numel() == 1:
        return _affine(traced, x, float(y), 0.0)
    laid = traced.laid(y, x)
    if laid.numel() == len(laid):
        return _affine(traced, x, laid, 0.0)
    whole = laid.expand(traced.sizes[x.value]).clone()  # another number at each place
    made = traced.emit(Restore(torch.empty(0, dtype=torch.int64), whole), x.value)
    return traced.like(x, traced.emit(Product(), x.value, made))


@handles("pow", "square", becomes="`Product`, of the powers 2 and 3")
def _pow(traced: Traced, node: fx.Node, x: Any, power: Any = 2) -> View:
    need(isinstance(x, View) and not isinstance(power, Tensor) and power in (2, 3))
    made = traced.emit(Product(), x.value, x.value)
    return traced.like(x, made if power == 2 else traced.emit(Product(), made, x.value))


@handles("div", becomes="`Affine`")
def _div(traced: Traced, node: fx.Node, x: Any, y: Any, **settings: Any) -> View:
    need(isinstance(x, View) and not isinstance(y, View) and not settings)
    scale = 1 / _precise(y)
    need(not isinstance(scale, Tensor) or scale.isfinite().all())
    return _mul(traced, node, x, scale)


# --- windows ---


@handles("pad", becomes="`Pad`, with zeros")
def _pad(
    traced: Traced, node: fx.Node, x: View, pads: Sequence[int], mode: str = "constant", value: float | None = None
) -> View:
    need(mode == "constant" and not value)
    return _constant_pad(traced, node, x, pads)


@handles("constant_pad_nd", becomes="`Pad`, with zeros")
def _constant_pad(traced: Traced, node: fx.Node, x: View, pads: Sequence[int], value: float = 0.0) -> View:
    need(not value)
    left, right, top, bottom = (*pads, *[0] * (4 - len(pads)))[:4]
    need(min(left, right, top, bottom) >= 0 and not any(pads[4:]))
    x = traced.maps(x)
    return traced.view(traced.emit(Pad(top, bottom, left, right), x.value))


@handles("max_pool2d", becomes="`Pool`")
def _max_pool(
    traced: Traced,
    node: fx.Node,
    x: View,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil: bool = False,
) -> View:
    x = traced.maps(x)
    made = traced.emit(Pool(True, _pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation), ceil), x.value)
    return traced.view(made)


@handles("max_pool2d_with_indices", becomes="`Pool`", of_shapes=True)
def _max_pool_with_indices(traced: Traced, node: fx.Node, x: View, *settings: Any) -> list[View | None]:
    _need_first(node)
    return [_max_pool(traced, node, x, *settings), None]


@handles("avg_pool2d", becomes="`Pool`")
def _avg_pool(
    traced: Traced,
    node: fx.Node,
    x: View,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil: bool = False,
    padded: bool = True,
    divisor: Any = None,
) -> View:
    need(divisor is None)
    x = traced.maps(x)
    made = traced.emit(Pool(False, _pair(kernel), _pair(stride or kernel), _pair(padding), (1, 1), ceil, padded), x.value)
    return traced.view(made)


@handles("adaptive_avg_pool2d", becomes="`PlaceMean`, `AdaptiveMean`")
def _adaptive(traced: Traced, node: fx.Node, x: View, size: Sequence[int]) -> View:
    need(len(x.dims) == 4)
    if tuple(size) == x.shape[2:]:
        return x
    if tuple(size) == (1, 1):
        return _mean_over(traced, x, (2, 3), True)
    x = traced.maps(x)
    return traced.view(traced.emit(AdaptiveMean(*_pair(size)), x.value))


@handles("upsample_nearest2d", becomes="`AdaptiveMean`, by whole factors", of_shapes=True)
def _upsample(traced: Traced, node: fx.Node, x: View, size: Any, *factors: Any) -> View:
    sides = traced.shape(node)[2:]
    given = [n for one in factors for n in (one if isinstance(one, (list, tuple)) else [one]) if n is not None]
    whole = [n / before for n, before in zip(sides, x.shape[2:], strict=True)]
    need(all(n.is_integer() for n in whole) and (not given or given == whole))  # PyTorch goes by the factor, not by the size
    x = traced.maps(x)
    return traced.view(traced.emit(AdaptiveMean(*_pair(sides)), x.value))  # the mean of one pixel


def _mean_over(traced: Traced, x: View, dims: Sequence[int], keep: bool) -> View:
    left = [i for i in range(len(x.dims)) if i not in dims]
    need(x.dims[0] == (BATCH,) and 0 in left)
    wide = [i for i in left[1:] if x.dims[i]]
    need(len(wide) <= 1)
    at = wide[0] if wide else left[-1]
    need(at > 0)
    x = traced.channelled(x, at)
    value = traced.emit(PlaceMean(), x.value) if len(traced.sizes[x.value]) > 1 else x.value
    found = View(
        value,
        ((0, traced.sizes[value][0]),),
        tuple((BATCH,) if i == 0 else (0,) if i == at else () for i in range(len(x.dims))),
    )
    if not keep:
        found = replace(found, dims=tuple(found.dims[i] for i in left))
    return found._short()


@handles("mean", becomes="`PlaceMean`, over all places")
def _mean(traced: Traced, node: fx.Node, x: View, dims: Any = None, keepdim: bool = False, **_: Any) -> View:
    need(dims is not None)
    dims = [dims] if isinstance(dims, int) else dims
    return _mean_over(traced, x, [d % len(x.dims) for d in dims], keepdim)


def _pair(value: Any) -> tuple[int, int]:
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    return (int(numbers[0]), int(numbers[-1]))
