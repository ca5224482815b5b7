"""Which multiply-adds of a run lie between live channels: those that depend on an input and that an output depends on.

Contract: what is counted dead has no effect, for any values of the weights that are active edges. The run is walked forwards to
find what is reached, with one boolean per element of memory, so that views and writing in place need no rules; then backwards
to find what is wanted. A constant (a bias, a state that starts at 0) is not reached. What is called live without looking: all
positions and images of a channel where one is, so that a kernel's edge at the border counts as in the middle; all outputs
of an operation that is not known here, where anything reaches it, and all its inputs, where anything of it is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnw.count._ledger import Operation, aten, storage


class Marks:
    """One boolean per element of every storage; a storage without marks is known as such."""

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[Tensor, int]] = {}

    def read(self, tensor: Tensor) -> Tensor | None:
        """The marks of a tensor's elements, in its shape; None where its storage has none."""
        buffer, itemsize = self._buffers.get(storage(tensor), (None, 0))
        if buffer is None:
            return None
        if itemsize != tensor.itemsize:  # a view as another type, whose elements are others
            return buffer.any().expand(tensor.shape)
        return buffer.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def write(self, tensor: Tensor, marks: Tensor | None, *, add: bool = False) -> None:
        """Sets the marks of a tensor's elements, None for none of them, or adds to them."""
        key = storage(tensor)
        if key not in self._buffers:
            if marks is None or not bool(marks.any()):
                return
            size = tensor.untyped_storage().nbytes() // tensor.itemsize
            self._buffers[key] = torch.zeros(size, dtype=torch.bool), tensor.itemsize
        buffer, itemsize = self._buffers[key]
        if itemsize != tensor.itemsize:
            buffer |= marks is not None and bool(marks.any())
            return
        places = self.read(tensor)
        assert places is not None
        if _overlaps(tensor):
            if marks is not None:
                where = torch.arange(len(buffer)).as_strided(places.size(), places.stride(), places.storage_offset())
                buffer[where[marks]] = True
        elif marks is None:
            places.zero_()
        else:
            places.copy_(places | marks if add else marks)

    def drop(self, storages: Iterable[int]) -> None:
        """Forgets the marks of storages."""
        for key in storages:
            self._buffers.pop(key, None)


def shares_of_products(
    run: Sequence[Operation], masks: Mapping[Tensor, Tensor], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> tuple[dict[str, int], dict[str, int]]:
    """Multiply-adds of active edges, and those of active edges between live channels, by the owner of the products.

    Args:
        run: the operations, in order.
        masks: active edges, by the parameter as it took part in the run.
        inputs, outputs: of the run.
    """
    walk = _Walk(masks)
    for tensor in inputs:
        walk.reached.write(tensor, torch.ones(tensor.shape, dtype=torch.bool))
    last = {storage(tensor): i for i, operation in enumerate(run) for tensor in (*operation.sources, *operation.outputs)}
    steps = []
    for i, operation in enumerate(run):
        steps.append(walk.forward(operation))
        walk.reached.drop(key for t in (*operation.sources, *operation.outputs) if last[key := storage(t)] == i)
    for tensor in outputs:
        walk.wanted.write(tensor, torch.ones(tensor.shape, dtype=torch.bool))
    for step in reversed(steps):
        walk.backward(step)
    nominal: dict[str, int] = {}
    live: dict[str, int] = {}
    for operation in run:
        if operation.products:
            nominal[operation.owner] = nominal.get(operation.owner, 0) + walk.nominal(operation)
            live[operation.owner] = live.get(operation.owner, 0) + walk.live(operation)
    return nominal, live


@dataclass(frozen=True, eq=False)
class _Step:
    """An operation on the way forwards: what it depends on, how, and what of that its rule needs on the way back."""

    operation: Operation
    sources: list[Tensor]
    rule: Any
    reached: list[Tensor | None]


class _Walk:
    """The marks, and what the rules do with them."""

    def __init__(self, masks: Mapping[Tensor, Tensor]) -> None:
        self.reached, self.wanted, self.active, self.alive = Marks(), Marks(), Marks(), Marks()
        for parameter, mask in masks.items():
            self._set_active(parameter, mask)
        self._alive_products: dict[Operation, float] = {}

    def forward(self, op: Operation) -> _Step:
        sources, rule = _rule(op, self)
        reached = [self.reached.read(s) for s in sources]
        reached = [r.clone() if r is not None and bool(r.any()) else None for r in reached]
        if all(r is None for r in reached):
            self._derive(op)
            found: list[Tensor | None] = [None] * len(op.outputs)
        else:
            found = [rule.forward(reached, out) for out in op.outputs]
        for out, marks in zip(op.outputs, found, strict=True):
            self.reached.write(out, marks)
        return _Step(op, sources, rule, [None if r is None else rule.kept(r, i) for i, r in enumerate(reached)])

    def backward(self, step: _Step) -> None:
        op, reached = step.operation, step.reached
        wanted = [self.wanted.read(out) for out in op.outputs]
        wanted = [w.clone() if w is not None and bool(w.any()) else None for w in wanted]
        for out in op.outputs:  # what was there before is not what is wanted
            self.wanted.write(out, None)
        if all(w is None for w in wanted) or all(r is None for r in reached):
            return
        if op.products:
            self._live_entries(step, wanted)
        for source, marks, r in zip(step.sources, step.rule.backward(step.sources, wanted), reached, strict=True):
            if r is not None and marks is not None:
                self.wanted.write(source, marks, add=True)

    def _set_active(self, weight: Tensor, mask: Tensor) -> None:
        self.active.write(weight, torch.ones(weight.shape, dtype=torch.bool))  # a mask without edges is one, too
        self.active.write(weight, mask)

    def _derive(self, op: Operation) -> None:
        """Of a weight that is made of masked ones (by a cast, another mask, a scale): its active edges."""
        known = [mask for s in op.sources if (mask := self.active.read(s)) is not None]
        if known and op.func._overloadpacket in _KEEPING_ZEROS:
            mask = torch.ones(op.outputs[0].shape, dtype=torch.bool)
            for m in known:
                mask = mask & m
            self._set_active(op.outputs[0], mask)

    def _live_entries(self, step: _Step, wanted: list[Tensor | None]) -> None:
        op, rule = step.operation, step.rule
        if isinstance(rule, (_Matrix, _Convolution)):
            weight, marks = rule.live_entries(step.reached, wanted)
            if weight is not None:
                active = self.active.read(weight)
                self.alive.write(weight, marks if active is None else marks & active, add=True)
                return
        share = 1.0
        packet = op.func._overloadpacket
        if wanted[0] is not None and wanted[0].ndim > 2 and (packet in _MATRIX or packet in _ATTENTION):  # heads
            found = rule.forward(step.reached, op.outputs[0]) & wanted[0]
            share = float(found.flatten(0, -3).flatten(1).any(1).float().mean())
        self._alive_products[op] = share

    def nominal(self, op: Operation) -> int:
        """Multiply-adds of active edges."""
        known = [(s, mask) for s in op.operands if (mask := self.active.read(s)) is not None]
        for weight, mask in known:
            return op.products // weight.numel() * int(mask.count_nonzero())
        return op.products

    def live(self, op: Operation) -> int:
        """Multiply-adds of active edges between live channels."""
        if op.is_constant:
            return self.nominal(op)
        if op in self._alive_products:
            return round(self.nominal(op) * self._alive_products[op])
        for weight in op.operands:
            marks = self.alive.read(weight)
            if marks is not None and weight.numel():
                return op.products // weight.numel() * int(marks.count_nonzero())
        return 0


class _Joint:
    """A rule: some dimensions are joined, in the others an element depends on those at its own place."""

    def __init__(self, dims: Sequence[int] | None) -> None:
        self.dims = dims

    def kept(self, reached: Tensor, place: int) -> Tensor:
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
        found = []
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


class _Linear:
    """A rule: what an operation with weights that are not negative makes of the marks as numbers, and its gradient."""

    def __init__(self, function: Any, sources: Sequence[Tensor]) -> None:
        self.function, self.sources = function, sources

    def kept(self, reached: Tensor, place: int) -> Tensor:
        return reached.any()

    def forward(self, reached: Sequence[Tensor | None], out: Tensor) -> Tensor:
        numbers = [torch.zeros(s.shape) if r is None else r.float() for s, r in zip(self.sources, reached, strict=True)]
        return _fit(self.function(*numbers) > 0, out.shape)

    def backward(self, sources: Sequence[Tensor], wanted: Sequence[Tensor | None]) -> list[Tensor | None]:
        with torch.enable_grad():
            numbers = [torch.zeros(s.shape, requires_grad=True) for s in sources]
            made = self.function(*numbers)
            pull = torch.zeros(made.shape)
            for w in wanted:
                if w is not None:
                    pull += _fit(w, made.shape)
            found = torch.autograd.grad(made, numbers, pull)
        return [f > 0 for f in found]


class _Matrix:
    """A rule: a matrix product, ``[.., i, k]`` by ``[.., k, j]``, and what is added to it."""

    def __init__(self, op: Operation, walk: _Walk) -> None:
        self.a, self.b = op.operands
        self.added = op.sources[0] if len(op.sources) > 2 else None
        self.active = [walk.active.read(t) for t in (self.a, self.b)]

    def sources(self) -> list[Tensor]:
        return [self.a, self.b, *(() if self.added is None else (self.added,))]

    def kept(self, reached: Tensor, place: int) -> Tensor:
        return reached if reached.ndim > 2 else reached.any(place, keepdim=True) if place < 2 else reached.any()

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


class _Convolution:
    """A rule: a convolution, also transposed, channel by channel."""

    def __init__(self, op: Operation, walk: _Walk) -> None:
        self.input, self.weight = op.operands
        self.transposed, self.groups = op.argument("transposed"), op.argument("groups")
        active = walk.active.read(self.weight)
        if active is None:
            active = torch.ones(self.weight.shape[:2], dtype=torch.bool)
        # the weight's first dimension: outputs, or inputs of a transposed one; its second: the others, of one group
        self.links = active.flatten(2).any(2) if active.ndim > 2 else active

    def kept(self, reached: Tensor, place: int) -> Tensor:
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


def _packets(*names: str) -> frozenset[Any]:
    return frozenset(getattr(aten, name) for name in names if hasattr(aten, name))


_MATRIX = _packets("mm", "bmm", "addmm", "baddbmm")
_ATTENTION = _packets(
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
_FRESH = _packets(
    *(f"{name}_like" for name in ("empty", "zeros", "ones", "full", "rand", "randn")),
    *(f"new_{name}" for name in ("empty", "zeros", "ones", "full", "empty_strided")),
    "zero_",
    "uniform_",
    "normal_",
)
_KEEPING_ZEROS = _packets("_to_copy", "clone", "neg", "mul", "div", "_weight_norm_interface")
_FROM_SECOND = _packets("copy_", "fill_")
_BATCH_NORMS = _packets(
    "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"
)
_LAYER_NORMS = _packets("native_layer_norm", "_fused_rms_norm")
_ALONG = _packets("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "topk", "sort")
_REDUCTIONS = _packets("mean", "sum", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "linalg_vector_norm")
_POOLS = {
    packet: dims
    for dims in (1, 2, 3)
    for packet in _packets(
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
_MOVES = _packets(
    "cat", "stack", "roll", "flip", "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "tril", "triu"
)


def _rule(op: Operation, walk: _Walk) -> tuple[list[Tensor], Any]:
    """The tensors that an operation depends on, and how."""
    packet, sources = op.func._overloadpacket, op.sources
    alone = all(walk.reached.read(s) is None for s in sources[1:])
    if packet in _MATRIX:
        matrix = _Matrix(op, walk)
        return matrix.sources(), matrix
    if packet is aten.convolution and alone:
        return sources[:1], _Convolution(op, walk)
    if packet in _ATTENTION:
        return sources[:3], _Joint((-2, -1))
    if packet in _FRESH:
        return [], _Joint(None)
    if packet in _FROM_SECOND:
        return sources[1:], _Joint(())
    if packet in _BATCH_NORMS and alone:
        return sources[:1], _Joint([d for d in range(sources[0].ndim) if d != 1])
    if packet in _LAYER_NORMS and alone:
        return sources[:1], _Joint(range(-len(op.argument("normalized_shape")), 0))
    if packet is aten.native_group_norm and alone:
        return sources[:1], _Linear(_grouped(op.argument("group")), sources[:1])
    if packet in _ALONG and len(sources) == 1:
        return sources, _Joint((op.argument("dim", -1),))
    if packet in _POOLS:
        return sources, _Joint(range(-_POOLS[packet], 0))
    if packet in _REDUCTIONS and len(sources) == 1:
        return sources, _Linear(_summed(op.argument("dim"), bool(op.argument("keepdim", False))), sources)
    if packet is aten.constant_pad_nd:
        return sources, _Linear(lambda x: torch.constant_pad_nd(x, op.args[1]), sources)
    if packet in _MOVES:
        return sources, _Linear(lambda *numbers: op.func(*_replaced(op.args, sources, numbers), **op.kwargs), sources)
    if packet in (aten.index, aten._unsafe_index) and alone:
        indices = op.args[1]
        if all(i is None or not i.is_meta for i in indices):
            return sources[:1], _Linear(lambda x: op.func(x, indices), sources[:1])
        dims = [d for d, i in enumerate(indices) if i is not None]
        if dims == [*range(dims[0], dims[0] + len(dims))] and op.outputs[0].ndim == sources[0].ndim:
            return sources[:1], _Joint(dims)
    if packet in (aten._to_copy, aten.clone) or torch.Tag.pointwise in op.func.tags:
        return sources, _Joint(())
    return sources, _Joint(None)


def _summed(dim: Any, keepdim: bool) -> Any:
    dims = [dim] if isinstance(dim, int) else dim
    return lambda x: x.sum(dims, keepdim=keepdim) if dims else x.sum()


def _grouped(groups: int) -> Any:
    def grouped(x: Tensor) -> Tensor:
        members = x.flatten(1).unflatten(1, (groups, -1))
        return members.sum(2, keepdim=True).expand(members.shape).reshape(x.shape)

    return grouped


def _replaced(value: Any, sources: Sequence[Tensor], numbers: Sequence[Tensor]) -> Any:
    places = {id(s): n for s, n in zip(sources, numbers, strict=True)}

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor):
            return places[id(value)]
        return type(value)(map(replaced, value)) if type(value) in (list, tuple) else value

    return replaced(value)


def _overlaps(tensor: Tensor) -> bool:
    """Whether several elements may lie at one place, as in an expanded tensor."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


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
