"""Kernels that train a neural graph on a CPU: node functions, and sparse edges in both directions.

Contract: float32 tensors on a CPU, each in one piece, maps with images innermost: ``[nodes, height, width, images]``. The
native code must be there (:func:`library`). Work is shared out over as many threads as PyTorch uses; no sum depends on their
number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dnw.kernels._exchange import each

_VERSION = 1
_COLUMNS = 128
"""Columns that one tile of the edges' kernel takes: threads share out whole tiles."""


class Norm(IntEnum):
    """Where the statistics of a norm come from."""

    NONE = 0
    GIVEN = 1
    BATCH = 2
    INSTANCE = 3


class _Nodes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "out_height", "out_width")),
        ("stride", ctypes.c_int32),
        ("norm", ctypes.c_int32),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("scale", "shift", "filter", "mean", "deviation")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The native code; None where it is not built, or not for this version."""
    for path in sorted(Path(__file__).parent.glob("_graph_native*.so")):
        try:
            found = ctypes.CDLL(str(path))
            if found.dnw_graph_version() == _VERSION:
                found.dnw_graph_size.restype = found.dnw_nodes_scratch.restype = found.dnw_compress.restype = ctypes.c_int64
                if found.dnw_graph_size() == ctypes.sizeof(_Nodes):
                    return found
        except (OSError, AttributeError):  # of another machine, or no library of ours
            continue
    return None


@cache
def _lanes() -> int:
    lib = library()
    assert lib is not None
    return int(lib.dnw_graph_lanes())


def _at(tensor: Tensor | None) -> ctypes.c_void_p | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "a kernel was given a tensor that is not in one piece"
    assert tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())


def _call(name: str, *arguments: object) -> None:
    """Calls a function of the library; raises ``ValueError`` where it refuses its arguments."""
    if getattr(library(), name)(*(ctypes.c_int64(x) if isinstance(x, int) else x for x in arguments)):
        raise ValueError(f"{name} refused its arguments: sizes that do not fit, or a tensor that is missing")


def _in_parts(size: int, step: int, cost: int, work: Callable[[int, int], None]) -> None:
    """Shares ``size`` out over threads, in multiples of ``step``; ``cost`` is what all of it amounts to, in entries."""
    pieces = -(-size // step)
    parts = max(1, min(torch.get_num_threads(), pieces))
    bounds = [min(size, pieces * i // parts * step) for i in range(parts + 1)]
    each([(cost // parts, partial(work, a, b)) for a, b in pairwise(bounds)])


@dataclass(frozen=True, eq=False)
class Nodes:
    """Some node functions ``conv(relu(norm(x)))`` on maps of one size.

    Attributes:
        norm: where the statistics come from. ``BATCH`` and ``INSTANCE`` make them, into ``mean`` and ``deviation``.
        filters: ``[nodes, 9]``.
        stride: of the convolution.
        eps: of the norm.
        scale, shift: ``[nodes]``, or None.
        mean, deviation: mean and reciprocal standard deviation, ``[nodes]``, or ``[nodes, images]`` of an instance norm.
    """

    norm: Norm
    filters: Tensor
    stride: int
    eps: float
    scale: Tensor | None
    shift: Tensor | None
    mean: Tensor
    deviation: Tensor

    def _structure(self, x: Tensor) -> _Nodes:
        _, height, width, images = x.shape
        out = out_size(height, self.stride), out_size(width, self.stride)
        tensors = (self.scale, self.shift, self.filters, self.mean, self.deviation)
        return _Nodes(images, height, width, *out, self.stride, self.norm, self.eps, *map(_at, tensors))

    def forward(self, x: Tensor, out: Tensor) -> None:
        """``[nodes, height, width, images]`` to ``[nodes, ceil(height / stride), ceil(width / stride), images]``."""
        structure = self._structure(x)

        def work(first: int, last: int) -> None:
            scratch = self._scratch(x)
            span = ctypes.c_int32(first), ctypes.c_int32(last)
            _call("dnw_nodes_forward", ctypes.byref(structure), _at(x), _at(out), *span, _at(scratch), ctypes.c_int32(_lanes()))

        _in_parts(len(x), 1, x.numel(), work)

    def backward(self, x: Tensor, grad: Tensor, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Writes the gradient of ``x`` into ``into``; returns those of filters, scale and shift."""
        structure = self._structure(x)
        filters = torch.empty(len(x), 9)
        scale, shift = torch.empty(len(x)), torch.empty(len(x))

        def work(first: int, last: int) -> None:
            scratch = self._scratch(x)
            tensors = map(_at, (x, grad, into, filters, scale, shift))
            span = ctypes.c_int32(first), ctypes.c_int32(last)
            _call("dnw_nodes_backward", ctypes.byref(structure), *tensors, *span, _at(scratch), ctypes.c_int32(_lanes()))

        _in_parts(len(x), 1, 2 * x.numel(), work)
        return filters, scale, shift

    def _scratch(self, x: Tensor) -> Tensor:
        lib = library()
        assert lib is not None
        return torch.empty(lib.dnw_nodes_scratch(ctypes.c_int64(x.shape[2])))


def out_size(size: int, stride: int) -> int:
    """Height or width after a 3x3 convolution with a border of 1."""
    return (size - 1) // stride + 1


@dataclass(frozen=True, eq=False)
class Rows:
    """A sparse matrix ``[rows, width]`` as compressed rows: of each row where its entries start, their columns and values."""

    starts: Tensor
    columns: Tensor
    values: Tensor
    width: int

    @classmethod
    def of(cls, active: Tensor, weight: Tensor, order: Tensor, limits: Tensor, room: int) -> Rows:
        """The active entries of a weight.

        Args:
            active: mask of the weight's shape.
            weight: ``[weight rows, width]``.
            order: which row of the weight each row is, int64.
            limits: of each row how many columns are read, from the first on, int64.
            room: how many entries there may be.
        """
        lib = library()
        assert lib is not None
        width, rows = weight.shape[1], len(order)
        starts = torch.empty(rows + 1, dtype=torch.int64)
        columns, values = torch.empty(room, dtype=torch.int32), torch.empty(room)
        tensors = _at(active), _at(weight), ctypes.c_int64(width), _at(order), _at(limits), ctypes.c_int64(rows)
        many = lib.dnw_compress(*tensors, _at(starts), _at(columns), _at(values), ctypes.c_int64(room))
        if not 0 <= many <= room:
            raise ValueError(f"{many} active entries where there is room for {room}")
        return cls(starts, columns[:many], values[:many], width)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, span: slice) -> Rows:
        """Some consecutive rows; their entries are not copied."""
        return Rows(self.starts[span.start : span.stop + 1], self.columns, self.values, self.width)

    @property
    def num_entries(self) -> int:
        return int(self.starts[-1] - self.starts[0])

    def transposed(self) -> Rows:
        """The same by columns: a matrix ``[width, rows]``."""
        many = len(self.columns)
        starts, scratch = torch.empty(self.width + 1, dtype=torch.int64), torch.empty(self.width, dtype=torch.int64)
        rows, values = torch.empty(many, dtype=torch.int32), torch.empty(many)
        made = map(_at, (starts, rows, values, scratch))
        _call("dnw_transpose", *map(_at, (self.starts, self.columns, self.values)), len(self), self.width, *made)
        return Rows(starts, rows, values, len(self))

    def times(self, x: Tensor, out: Tensor) -> None:
        """The product with ``[width, n]``, into ``[rows, n]``."""
        n = x.shape[1]

        def work(first: int, last: int) -> None:
            matrix = map(_at, (self.starts, self.columns, self.values))
            _call("dnw_edges", *matrix, len(self), _at(x), _at(out), n, first, last, ctypes.c_int32(_lanes()))

        _in_parts(n, _COLUMNS, n * max(1, self.num_entries), work)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """Of each entry the product of a row of ``[rows, n]`` with one of ``[width, n]``: the gradient of its value."""
        values, n = torch.empty_like(self.values), left.shape[1]

        def work(first: int, last: int) -> None:
            tensors = map(_at, (self.starts, self.columns, values, left, right))
            _call("dnw_edge_gradients", *tensors, n, first, last, ctypes.c_int32(_lanes()))

        _in_parts(len(self), 1, n * max(1, self.num_entries), work)
        return values

    def scatter(self, values: Tensor, order: Tensor, matrix: Tensor, *, adds: bool = False) -> None:
        """Puts a value of each entry where it came from in a matrix, or adds it."""
        tensors = _at(self.starts), _at(self.columns), _at(values), _at(order)
        _call("dnw_scatter", *tensors, len(self), self.width, _at(matrix), ctypes.c_int32(adds))


def pooled(x: Tensor, *, mean: bool) -> Tensor:
    """Sums or means over squares of 2x2 places: ``[nodes, height, width, images]`` to ``[nodes, half, half, images]``."""
    nodes, height, width, images = x.shape
    out = torch.empty(nodes, out_size(height, 2), out_size(width, 2), images)

    def work(first: int, last: int) -> None:
        _call("dnw_pooled", _at(x), _at(out), height, width, images, ctypes.c_int32(mean), first, last)

    _in_parts(nodes, 1, x.numel(), work)
    return out
