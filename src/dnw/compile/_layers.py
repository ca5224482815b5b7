"""Instructions of networks that branch and join: activations, sums, products, pools, concatenations, norms of whole vectors.

Contract: as in _program.py. Sizes begin with the channels; what follows are places: rows and columns of maps, tokens, or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dnw.compile._program import Facts, Instruction, Size, _require, every

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "clamp": lambda x, low, high: x.clamp(low, high),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "elu": lambda x, alpha: F.elu(x, alpha),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""By name: what an activation computes, from the values and its own numbers."""
NUMBERS = {"clamp": 2, "leaky_relu": 1, "elu": 1}
"""How many numbers of its own an activation has, where it has any."""


@dataclass(frozen=True, eq=False)
class Activation(Instruction):
    """A function of each value by itself.

    Attributes:
        kind: one of ``ACTIVATIONS``.
        first, second: its own numbers, where it has any: the ends of a clamp, a slope.
    """

    kind: str
    first: float = 0.0
    second: float = 0.0

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.first, self.second)[: NUMBERS.get(self.kind, 0)]

    def __call__(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.kind](x, *self.numbers)

    def check(self, size: Size) -> Size:
        _require(self.kind in ACTIVATIONS, f"an activation {self.kind!r:.40}")
        _require(not any(math.isnan(x) for x in self.numbers), f"{self.kind} of {self.numbers}")
        return size


def _spread(x: Tensor, ndim: int) -> Tensor:
    """Numbers of channels beside maps of them."""
    return x.reshape(*x.shape, *[1] * (ndim - x.ndim))


def _joined(one: Size, other: Size, what: str) -> Size:
    """The size of a sum or product; either may be without places."""
    _require(one[:1] == other[:1] and bool(one), f"{what} of {one} and {other}")
    _require(one == other or len(one) == 1 or len(other) == 1, f"{what} of {one} and {other}")
    return max(one, other, key=len)


@dataclass(frozen=True, eq=False)
class Sum(Instruction):
    """Of two values, channel by channel; one of them may be a number per channel."""

    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        ndim = max(one.ndim, other.ndim)
        return _spread(one, ndim) + _spread(other, ndim)

    def check(self, one: Size, other: Size) -> Size:
        return _joined(one, other, "a sum")


@dataclass(frozen=True, eq=False)
class Product(Instruction):
    """Of two values, channel by channel; one of them may be a number per channel (squeeze and excitation)."""

    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        ndim = max(one.ndim, other.ndim)
        return _spread(one, ndim) * _spread(other, ndim)

    def check(self, one: Size, other: Size) -> Size:
        return _joined(one, other, "a product")

    def varying(self, *facts: Facts) -> Tensor:
        one, other = facts
        silent = [
            ~known.varies & ~known.value.reshape(len(known.varies), -1).any(1) if known.value is not None else ~known.varies
            for known in facts
        ]
        return (one.varies & ~silent[1]) | (other.varies & ~silent[0])


@dataclass(frozen=True, eq=False)
class Shift(Instruction):
    """A constant added to each value: position embeddings, say. ``[channels, *places]``."""

    constant: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.constant

    def check(self, size: Size) -> Size:
        _require(tuple(self.constant.shape) == size, f"constants of {tuple(self.constant.shape)}, given {size}")
        return size

    def shrunk(self, taken: Sequence[Tensor], sent: Tensor, facts: Sequence[Facts]) -> Shift:
        return Shift(self.constant[sent])


@dataclass(frozen=True, eq=False)
class Pool(Instruction):
    """The largest value or the mean of windows of maps.

    Attributes:
        largest: whether it is the largest; the mean otherwise.
        kernel, stride, padding, dilation: of windows; a mean has no dilation.
        ceil: whether windows that reach beyond the padding on the right and below count.
        padded: whether a mean divides by the pixels of padding too.
    """

    largest: bool
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    ceil: bool = False
    padded: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        if self.largest:
            return F.max_pool2d(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil)
        return F.avg_pool2d(x, self.kernel, self.stride, self.padding, self.ceil, self.padded)

    def check(self, size: Size) -> Size:
        _require(len(size) == 3, f"a pool of maps, given {size}")
        numbers = (*self.kernel, *self.stride, *self.padding, *self.dilation)
        _require(min(*self.kernel, *self.stride, *self.dilation) > 0 <= min(self.padding), f"a pool of {numbers}")
        _require(max(numbers) < 1 << 15 and (self.largest or self.dilation == (1, 1)), f"a pool of {numbers}")
        _require(all(2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True)), f"a pool of {numbers}")
        sides = []
        for side, k, s, p, d in zip(size[1:], self.kernel, self.stride, self.padding, self.dilation, strict=True):
            room = side + 2 * p - d * (k - 1) - 1
            _require(room >= 0, f"a pool of {numbers} for maps {size}")
            count = (room + (s - 1 if self.ceil else 0)) // s + 1
            sides.append(count - (self.ceil and (count - 1) * s >= side + p))
        return (size[0], *sides)


@dataclass(frozen=True, eq=False)
class AdaptiveMean(Instruction):
    """Means of as many windows as there shall be rows and columns."""

    height: int
    width: int

    def __call__(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, (self.height, self.width))

    def check(self, size: Size) -> Size:
        _require(len(size) == 3 and min(self.height, self.width) > 0, f"means to {self.height}x{self.width} of {size}")
        return size[0], self.height, self.width


@dataclass(frozen=True, eq=False)
class PlaceMean(Instruction):
    """The mean over all places: one number per channel."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)

    def check(self, size: Size) -> Size:
        _require(len(size) > 1, f"a mean over places of {size}")
        return size[:1]


@dataclass(frozen=True, eq=False)
class Concat(Instruction):
    """Values one after the other: channels, or tokens.

    Attributes:
        axis: of the size along which they lie: 0 for channels.
    """

    axis: int = 0

    def __call__(self, *values: Tensor) -> Tensor:
        return torch.cat(values, 1 + self.axis)

    def check(self, *sizes: Size) -> Size:
        first, axis = sizes[0], self.axis
        _require(0 <= axis < len(first), f"values along {axis} of {first}")
        for size in sizes:
            same = len(size) == len(first) and all(
                i == axis or a == b for i, (a, b) in enumerate(zip(size, first, strict=True))
            )
            _require(same, f"values of {first} and {size} one after the other along {axis}")
        return (*first[:axis], sum(size[axis] for size in sizes), *first[axis + 1 :])

    def varying(self, *facts: Facts) -> Tensor:
        return torch.cat([known.varies for known in facts]) if self.axis == 0 else super().varying(*facts)

    def settled(self, taken: list[Tensor], sent: Tensor, facts: Sequence[Facts]) -> tuple[list[Tensor], Tensor]:
        if self.axis:
            return super().settled(taken, sent, facts)
        union = torch.cat(taken) | sent
        return list(union.split([len(mask) for mask in taken])), union


@dataclass(frozen=True, eq=False)
class Crop(Instruction):
    """Some of the places along one axis: ``start`` to ``stop``, every ``step``-th."""

    axis: int
    start: int
    stop: int
    step: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        index = [slice(None)] * (1 + self.axis) + [slice(self.start, self.stop, self.step)]
        return x[tuple(index)]

    def check(self, size: Size) -> Size:
        _require(0 < self.axis < len(size), f"a part along {self.axis} of {size}")
        _require(0 <= self.start < self.stop <= size[self.axis] and self.step > 0, f"{self.start} to {self.stop} of {size}")
        return (*size[: self.axis], -(-(self.stop - self.start) // self.step), *size[self.axis + 1 :])


@dataclass(frozen=True, eq=False)
class Pad(Instruction):
    """Rows and columns of zeros around maps: above, below, to the left and to the right."""

    top: int
    bottom: int
    left: int
    right: int

    stride = (1, 1)
    """Of what reads them as a convolution would."""

    @property
    def padding(self) -> tuple[int, int]:
        return self.top, self.left

    def __call__(self, x: Tensor) -> Tensor:
        return F.pad(x, (self.left, self.right, self.top, self.bottom))

    def check(self, size: Size) -> Size:
        sides = (self.top, self.bottom, self.left, self.right)
        _require(len(size) == 3 and min(sides) >= 0 and max(sides) < 1 << 15, f"{sides} of zeros around {size}")
        return size[0], size[1] + self.top + self.bottom, size[2] + self.left + self.right


@dataclass(frozen=True, eq=False)
class Rearrange(Instruction):
    """The same numbers in another order: as ``split``, its axes in an ``order``, as ``size``."""

    split: tuple[int, ...]
    order: tuple[int, ...]
    size: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        order = (0, *(1 + axis for axis in self.order))
        return x.reshape(x.shape[0], *self.split).permute(order).reshape(x.shape[0], *self.size)

    def check(self, size: Size) -> Size:
        _require(min((*self.split, *self.size), default=0) > 0, f"numbers of {size} as {self.size}")
        _require(math.prod(self.split) == math.prod(self.size) == math.prod(size), f"numbers of {size} as {self.size}")
        _require(sorted(self.order) == list(range(len(self.split))), f"axes of {self.split} in order {self.order}")
        return self.size

    @property
    def flattens(self) -> bool:
        """Whether it puts the places of each channel after those of the one before it."""
        return self.order == tuple(range(len(self.order))) and len(self.size) == 1

    @property
    def keeps(self) -> bool:
        """Whether channels stay what they are, and only how places are divided into axes changes."""
        return self.order == tuple(range(len(self.order))) and self.split[0] == self.size[0]

    def varying(self, *facts: Facts) -> Tensor:
        if self.keeps:
            return facts[0].varies
        places = math.prod(self.size) // len(facts[0].varies)
        spread = self(facts[0].varies[None, :, None].expand(1, -1, places))[0]
        return spread.reshape(len(spread), -1).any(1)

    def settled(self, taken: list[Tensor], sent: Tensor, facts: Sequence[Facts]) -> tuple[list[Tensor], Tensor]:
        if self.keeps:
            return super().settled(taken, sent, facts)
        if not self.flattens:
            return every(*taken), every(sent)[0]
        places = self.size[0] // len(taken[0])
        union = taken[0] | sent.view(-1, places).any(1)
        return [union], union.repeat_interleave(places)

    def shrunk(self, taken: Sequence[Tensor], sent: Tensor, facts: Sequence[Facts]) -> Rearrange:
        kept = int(taken[0].count_nonzero())
        if self.keeps:
            return Rearrange((kept, *self.split[1:]), self.order, (kept, *self.size[1:]))
        if self.flattens:
            places = self.size[0] // len(taken[0])
            return Rearrange((kept, places), (0, 1), (kept * places,))
        return self


@dataclass(frozen=True, eq=False)
class LayerNorm(Instruction):
    """Normalisation over the channels, in each of some groups of them, at each place or over all places; scale and shift."""

    scale: Tensor
    shift: Tensor
    eps: float
    groups: int = 1
    over_places: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        if self.over_places:
            return F.group_norm(x, self.groups, self.scale, self.shift, self.eps)
        apart = x.unflatten(1, (self.groups, -1))
        spread = apart.var(dim=2, keepdim=True, unbiased=False)
        x = ((apart - apart.mean(dim=2, keepdim=True)) / (spread + self.eps).sqrt()).flatten(1, 2)
        return x * self.scale.view(shape) + self.shift.view(shape)

    def check(self, size: Size) -> Size:
        _require(tuple(self.scale.shape) == tuple(self.shift.shape) == size[:1], f"a norm of {len(self.scale)}, given {size}")
        _require(self.groups > 0 and size[0] % self.groups == 0 and self.eps > 0, f"{self.groups} groups, eps={self.eps}")
        return size

    def varying(self, *facts: Facts) -> Tensor:
        apart = facts[0].varies.view(self.groups, -1).any(1, keepdim=True).expand(-1, len(self.scale) // self.groups)
        return apart.flatten() & (self.scale != 0)

    def settled(self, taken: list[Tensor], sent: Tensor, facts: Sequence[Facts]) -> tuple[list[Tensor], Tensor]:
        return every(*taken), every(sent)[0]


@dataclass(frozen=True, eq=False)
class Attention(Instruction):
    """Softmax attention of queries, keys and values ``[channels, tokens]``, in heads of neighbouring channels.

    Attributes:
        heads: how many.
        scale: what products of queries and keys are multiplied by.
        mask: what is added to them, ``[queries, keys]``, minus infinity where a query does not see a key.
    """

    heads: int
    scale: float
    mask: Tensor | None = None

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (self.heads, -1)).transpose(2, 3) for x in (queries, keys, values))
        mask = None if self.mask is None else self.mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale).transpose(2, 3).flatten(1, 2)

    def check(self, queries: Size, keys: Size, values: Size) -> Size:
        two = len(queries) == len(keys) == len(values) == 2
        _require(two and queries[0] == keys[0] and keys[1] == values[1], f"attention of {queries}, {keys} and {values}")
        _require(self.heads > 0 and not queries[0] % self.heads and not values[0] % self.heads, f"{self.heads} heads")
        fits = self.mask is None or tuple(self.mask.shape) == (queries[1], keys[1])
        _require(fits, f"a mask that is not of {queries[1]} queries and {keys[1]} keys")
        return values[0], queries[1]

    def multiply_adds(self, queries: Size, keys: Size, values: Size, *, zeros: bool = False) -> int:
        return queries[1] * keys[1] * (queries[0] + values[0])

    def varying(self, *facts: Facts) -> Tensor:
        any_head = torch.stack([known.varies.view(self.heads, -1).any(1) for known in facts]).any(0)
        return any_head.repeat_interleave(len(facts[2].varies) // self.heads)

    def settled(self, taken: list[Tensor], sent: Tensor, facts: Sequence[Facts]) -> tuple[list[Tensor], Tensor]:
        return every(*taken), every(sent)[0]
