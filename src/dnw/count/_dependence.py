"""How what an operation makes depends on what it is given: dependences, which carry marks forwards and backwards through it.

Contract: ``forward`` of a dependence takes the marks of the sources that are reached, None for the others, and returns those of
one output; ``backward`` takes the marks of the outputs that are wanted and returns those of every source. ``kept`` is what of
the marks of a reached source the way back needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dnw.count._ledger import Operation, aten
from dnw.count._marks import Marks


class Joint:
    """Some dimensions are joined, in the others an element depends on those at its own position."""

    def __init__(self, dims: Sequence[int] | None) -> None:
        self.dims = dims

    def kept(self, reached: Tensor, index: int) -> Tensor:
        return self._joined(reached) if self.dims else reached.any()

    def forward(self, reached: Sequence[Tensor | None], out: Tensor) -> Tensor:
        found: Tensor | None = None
        for r in reached:
            if r is not None:
                r = self._joined(r)
                found = r if found is None else found | r if _fits(found.shape, r.shape) else found.any() | r.any()
        assert found is not None
        return _fit(found, out.shape)

    def backward(self, sources: Sequence[Tensor], wanted: Sequence[Tensor | None]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for source in sources:
            marks = torch.zeros(source.shape, dtype=torch.bool)
            for w in wanted:
                if w is not None:
                    same = self.dims is not None and (not self.dims or w.ndim == source.ndim)
                    marks |= _narrow(self._joined(w) if same else w.any(), source.shape)
            found.append(marks)
        return found

    def _joined(self, marks: Tensor) -> Tensor:
        if self.dims is None:
            return marks.any()
        return marks.any(dim=tuple(self.dims), keepdim=True) if self.dims else marks


class Linear:
    """What an operation with weights that are not negative makes of the marks as numbers, and its gradient."""

    def __init__(self, function: Any, sources: Sequence[Tensor]) -> None:
        self.function, self.sources = function, sources

    def kept(self, reached: Tensor, index: int) -> Tensor:
        return reached.any()

    def forward(self, reached: Sequence[Tensor | None], out: Tensor) -> Tensor:
        pairs = zip(self.sources, reached, strict=True)
        numbers = [torch.zeros(s.shape, dtype=torch.float32) if r is None else r.float() for s, r in pairs]
        return _fit(self.function(*numbers) > 0, out.shape)

    def backward(self, sources: Sequence[Tensor], wanted: Sequence[Tensor | None]) -> list[Tensor | None]:
        with torch.enable_grad():
            numbers = [torch.zeros(s.shape, dtype=torch.float32, requires_grad=True) for s in sources]
            made = self.function(*numbers)
            pull = torch.zeros_like(made)
            for w in wanted:
                if w is not None:
                    pull += _fit(w, made.shape)
            found = torch.autograd.grad(made, numbers, pull, allow_unused=True)  # a source that stands there twice counts once
        return [None if f is None else f > 0 for f in found]


class Matrix:
    """A matrix product, ``[.., i, k]`` by ``[.., k, j]``, and what is added to it."""

    def __init__(self, op: Operation, active: Marks) -> None:
        self.a, self.b = op.operands
        self.added = op.sources[0] if len(op.sources) > 2 else None
        self.active = [active.read(t) for t in (self.a, self.b)]

    def sources(self) -> list[Tensor]:
        return [self.a, self.b, *(() if self.added is None else (self.added,))]

    def kept(self, reached: Tensor, index: int) -> Tensor:
        return reached if reached.ndim > 2 else reached.any(index, keepdim=True) if index < 2 else reached.any()

    def forward(self, reached: Sequence[Tensor | None], out: Tensor) -> Tensor:
        (a, b, *added), (of_a, of_b) = reached, self.active
        found = torch.zeros(out.shape, dtype=torch.bool)
        if a is not None:
            found |= a.any(-1, keepdim=True) if of_b is None else _product(a.any(-2, keepdim=True), of_b)
        if b is not None:
            found |= b.any(-2, keepdim=True) if of_a is None else _product(of_a, b.any(-1, keepdim=True))
        return found if not added or added[0] is None else found | added[0]

    def backward(self, sources: Sequence[Tensor], wanted: Sequence[Tensor | None]) -> list[Tensor | None]:
        w, (of_a, of_b) = wanted[0], self.active
        assert w is not None
        to_a = w.any(-1, keepdim=True) if of_b is None else _product(w.any(-2, keepdim=True), of_b.mT)
        to_b = w.any(-2, keepdim=True) if of_a is None else _product(of_a.mT, w.any(-1, keepdim=True))
        found: list[Tensor | None] = [to_a.expand(self.a.shape), to_b.expand(self.b.shape)]
        return found if self.added is None else [*found, _narrow(w, self.added.shape)]

    def live_entries(self, reached: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> tuple[Tensor | None, Any]:
        a, b, w = reached[0], reached[1], wanted[0]
        assert w is not None
        if a is not None and b is None:
            return self.b, a.any(-2)[..., :, None] & w.any(-2)[..., None, :]
        if b is not None and a is None:
            return self.a, w.any(-1)[..., :, None] & b.any(-1)[..., None, :]
        return None, None


class Convolution:
    """A convolution, also transposed, channel by channel."""

    def __init__(self, op: Operation, active: Marks) -> None:
        self.input, self.weight = op.operands
        self.transposed, self.groups = op.argument("transposed"), op.argument("groups")
        mask = active.read(self.weight)
        if mask is None:
            mask = torch.ones(self.weight.shape[:2], dtype=torch.bool)
        # the weight's first dimension: outputs, or inputs of a transposed one; its second: the others, of one group
        self.links = mask.flatten(2).any(2) if mask.ndim > 2 else mask

    def kept(self, reached: Tensor, index: int) -> Tensor:
        return _channels(reached)

    def forward(self, reached: Sequence[Tensor | None], out: Tensor) -> Tensor:
        assert reached[0] is not None
        r = _channels(reached[0])
        return _spread(self._seconds(r) if self.transposed else self._firsts(r), out.shape)

    def backward(self, sources: Sequence[Tensor], wanted: Sequence[Tensor | None]) -> list[Tensor | None]:
        assert wanted[0] is not None
        w = _channels(wanted[0])
        return [_spread(self._firsts(w) if self.transposed else self._seconds(w), self.input.shape)]

    def live_entries(self, reached: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        assert reached[0] is not None
        assert wanted[0] is not None
        first, second = reached[0], _channels(wanted[0])
        if not self.transposed:
            first, second = second, first
        marks = first[:, None] & self._by_group(second)
        return self.weight, marks[(..., *[None] * (self.weight.ndim - 2))].expand(self.weight.shape)

    def _by_group(self, second: Tensor) -> Tensor:
        return second.view(self.groups, -1).repeat_interleave(len(self.links) // self.groups, 0)

    def _firsts(self, second: Tensor) -> Tensor:
        return (self.links & self._by_group(second)).any(1)

    def _seconds(self, first: Tensor) -> Tensor:
        marked = self.links & first[:, None]
        return marked.view(self.groups, -1, marked.shape[1]).any(1).flatten()


def packets(*names: str) -> frozenset[Any]:
    return frozenset(getattr(aten, name) for name in names if hasattr(aten, name))


MATRIX = packets("mm", "bmm", "addmm", "baddbmm")
ATTENTION = packets(
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
_FRESH = packets(
    *(f"{name}_like" for name in ("empty", "zeros", "ones", "full", "rand", "randn")),
    *(f"new_{name}" for name in ("empty", "zeros", "ones", "full", "empty_strided")),
    "zero_",
    "uniform_",
    "normal_",
)
_FROM_SECOND = packets("copy_", "fill_")
_BATCH_NORMS = packets(
    "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"
)
_LAYER_NORMS = packets("native_layer_norm", "_fused_rms_norm")
_ALONG = packets("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "topk", "sort")
_REDUCTIONS = packets("mean", "sum", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "linalg_vector_norm")
_POOLS = {
    packet: dims
    for dims in (1, 2, 3)
    for packet in packets(
        f"max_pool{dims}d_with_indices",
        f"adaptive_max_pool{dims}d",
        f"avg_pool{dims}d",
        f"_adaptive_avg_pool{dims}d",
        f"upsample_nearest{dims}d",
        f"_upsample_nearest_exact{dims}d",
        f"upsample_{('', 'linear', 'bilinear', 'trilinear')[dims]}{dims}d",
        f"reflection_pad{dims}d",
        f"replication_pad{dims}d",
    )
}
_MOVES = packets(
    "cat", "stack", "roll", "flip", "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "tril", "triu"
)


def dependence_of(op: Operation, reached: Marks, active: Marks) -> tuple[list[Tensor], Any]:
    """The tensors that an operation depends on, and how."""
    packet, sources = op.func._overloadpacket, op.sources
    alone = all(reached.read(s) is None for s in sources[1:])
    if packet in MATRIX:
        matrix = Matrix(op, active)
        return matrix.sources(), matrix
    if packet is aten.convolution and alone:
        return sources[:1], Convolution(op, active)
    if packet in ATTENTION:
        return sources[:3], Joint((-2, -1))
    if packet in _FRESH:
        return [], Joint(None)
    if packet in _FROM_SECOND:
        return sources[1:], Joint(())
    if packet in _BATCH_NORMS and alone:
        return sources[:1], Joint([d for d in range(sources[0].ndim) if d != 1])
    if packet in _LAYER_NORMS and alone:
        return sources[:1], Joint(range(-len(op.argument("normalized_shape")), 0))
    if packet is aten.native_group_norm and alone:
        return sources[:1], Linear(_grouped(op.argument("group")), sources[:1])
    if packet in _ALONG and len(sources) == 1:
        return sources, Joint((op.argument("dim", -1),))
    if packet in _POOLS:
        return sources, Joint(range(-_POOLS[packet], 0))
    if packet in _REDUCTIONS and len(sources) == 1:
        return sources, Linear(_summed(op.argument("dim"), bool(op.argument("keepdim", False))), sources)
    if packet is aten.constant_pad_nd:
        return sources, Linear(lambda x: torch.constant_pad_nd(x, op.args[1]), sources)
    if packet in _MOVES:
        return sources, Linear(lambda *numbers: op.func(*_replaced(op.args, sources, numbers), **op.kwargs), sources)
    if packet in (aten.index, aten._unsafe_index) and alone:
        indices = op.args[1]
        if all(i is None or not i.is_meta for i in indices):
            return sources[:1], Linear(lambda x: op.func(x, indices), sources[:1])
        dims = [d for d, i in enumerate(indices) if i is not None]
        if dims == [*range(dims[0], dims[0] + len(dims))] and op.outputs[0].ndim == sources[0].ndim:
            return sources[:1], Joint(dims)
    if packet in (aten._to_copy, aten.clone) or torch.Tag.pointwise in op.func.tags:
        return sources, Joint(())
    return sources, Joint(None)


def _summed(dim: Any, keepdim: bool) -> Any:
    dims = [dim] if isinstance(dim, int) else dim
    return lambda x: x.sum(dims, keepdim=keepdim) if dims else x.sum()


def _grouped(groups: int) -> Any:
    def grouped(x: Tensor) -> Tensor:
        members = x.flatten(1).unflatten(1, (groups, -1))
        return members.sum(2, keepdim=True).expand(members.shape).reshape(x.shape)

    return grouped


def _replaced(value: Any, sources: Sequence[Tensor], numbers: Sequence[Tensor]) -> Any:
    numbers_of = {id(s): n for s, n in zip(sources, numbers, strict=True)}

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor):
            return numbers_of[id(value)]
        return type(value)(map(replaced, value)) if type(value) in (list, tuple) else value

    return replaced(value)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float() > 0


def _channels(marks: Tensor) -> Tensor:
    """Marks ``[batch, channels, ...]`` by channel."""
    return marks.transpose(0, 1).flatten(1).any(1) if marks.ndim > 1 else marks


def _spread(channels: Tensor, shape: torch.Size) -> Tensor:
    return channels.view(-1, *[1] * (len(shape) - 2)).expand(shape)


def _fits(a: torch.Size, b: torch.Size) -> bool:
    return all(x == y or 1 in (x, y) for x, y in zip(reversed(a), reversed(b), strict=False))


def _fit(marks: Tensor, shape: torch.Size) -> Tensor:
    """Marks expanded to a shape; where they do not expand to it, all of them if any is set."""
    fits = marks.ndim <= len(shape) and all(x in (1, y) for x, y in zip(reversed(marks.shape), reversed(shape), strict=False))
    return (marks if fits else marks.any()).expand(shape)


def _narrow(marks: Tensor, shape: torch.Size) -> Tensor:
    """Marks of what a tensor of a shape was expanded to, as marks of the tensor."""
    if marks.ndim > len(shape):
        marks = marks.flatten(0, marks.ndim - len(shape) - 1).any(0)
    wide = tuple(i for i, n in enumerate(reversed(shape), 1) if n == 1 and i <= marks.ndim and marks.shape[-i] != 1)
    if wide:
        marks = marks.any(dim=tuple(-i for i in wide), keepdim=True)
    return _fit(marks, shape)
