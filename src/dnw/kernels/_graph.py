"""Kernels that train a neural graph on a CPU: node functions, and sparse edges in both directions.

Contract: float32 tensors on a CPU, each in one piece, maps with images innermost: ``[nodes, height, width, images]``. The
native code must be there (:func:`library`). Work is shared out over as many threads as PyTorch uses; no sum depends on their
number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dnw.kernels import _team
from dnw.kernels._library import INT32, INT64, POINTER, address, load
from dnw.kernels._room import room

_VERSION = 3
_COLUMNS = 128
"""COLUMNS of graph.c, which are taken at a time: threads share out whole tiles."""
_PARTS = 8
"""Sums over columns are made of so many, whatever the number of threads."""
_FAR = 512
"""From so many rows on, what is read over and over is brought together first."""


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


_SIZES = (INT64, INT64)
_KERNELS = {
    "nodes_forward": (POINTER, POINTER, POINTER, *_SIZES, POINTER, INT64, INT32),
    "nodes_backward": (POINTER, *[POINTER] * 6, *_SIZES, POINTER, INT64, INT32),
    "edges": (*[POINTER] * 3, INT64, *_SIZES, POINTER, POINTER, INT64, *_SIZES, POINTER, INT64, INT32),
    "edges_back": (*[POINTER] * 3, INT64, *_SIZES, *[POINTER] * 4, INT64, *_SIZES, POINTER, INT64, INT32),
    "turned": (POINTER, POINTER, INT64, INT64, *_SIZES),
    "pooled": (POINTER, POINTER, INT64, INT64, INT64, INT32, INT32, *_SIZES, INT32),
    "count": (POINTER, INT64, POINTER, POINTER, *_SIZES, POINTER),
    "compress": (POINTER, POINTER, INT64, *[POINTER] * 3, *_SIZES, POINTER, POINTER),
}
"""The kernels of graph.c that threads share, in its order."""
_FUNCTIONS = _KERNELS | {
    "lanes": (),
    "size_of_nodes": (),
    "run_calls": (POINTER, INT32, INT32, POINTER, INT64, INT64),
    "transpose": (POINTER, POINTER, POINTER, INT64, INT64, *[POINTER] * 4),
    "scatter": (*[POINTER] * 4, *_SIZES, INT64, POINTER, INT32),
}
"""The functions of graph.c."""


@cache
def library() -> ctypes.CDLL | None:
    """The native code; None where it is not built, or not for this version."""
    found = load(Path(__file__).parent, "_graph_native", _VERSION, _FUNCTIONS)
    return found if found is not None and found.dnw_size_of_nodes() == ctypes.sizeof(_Nodes) else None


@cache
def lanes() -> int:
    """Floats of a vector on this machine."""
    return int(_code().dnw_lanes())


def _code() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found


def _at(tensor: Tensor | None) -> int | None:
    if tensor is not None:
        assert tensor.is_contiguous() and tensor.device.type == "cpu", "a kernel takes tensors in one piece"  # noqa: PT018
        assert not tensor.is_floating_point() or tensor.dtype in (torch.float32, torch.bfloat16), "a kernel takes float32"
    return address(tensor)


_Argument = Tensor | int | None


def _in_parts(kernel: str, size: int, step: int, cost: int, arguments: Callable[[int, int], tuple[_Argument, ...]]) -> None:
    """Shares calls of a kernel out over threads.

    Args:
        kernel: its name.
        size: what is shared out, in multiples of ``step``.
        step: see ``size``.
        cost: what all of it amounts to, in entries.
        arguments: of the call from a first to before a last of ``size``.
    """
    pieces = -(-size // step)
    parts = max(1, min(torch.get_num_threads(), pieces))
    bounds = [min(size, pieces * i // parts * step) for i in range(parts + 1)]
    _run(kernel, cost, [arguments(a, b) for a, b in pairwise(bounds)])


def _run(kernel: str, cost: int, calls: Sequence[tuple[_Argument, ...]]) -> None:
    """Runs some calls of a kernel at once; ``cost`` is what all of them amount to, in entries."""
    code, threads, openmp = _code(), min(torch.get_num_threads(), len(calls)), _team.openmp()
    given = [tuple(_at(x) if isinstance(x, Tensor) else x for x in call) for call in calls]
    function = getattr(code, f"dnw_{kernel}")
    if threads < 2 or cost < _team.SMALL or openmp is None:
        _team.each([(cost // len(given), partial(function, *call)) for call in given])
        return
    numbers = [number or 0 for call in given for number in call]
    packed = (ctypes.c_int64 * len(numbers))(*numbers)
    number = list(_KERNELS).index(kernel)
    if code.dnw_run_calls(openmp, threads, number, ctypes.addressof(packed), len(given[0]), len(given)):
        for call in given:  # the one that is refused says why
            function(*call)


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

    def _record(self, x: Tensor) -> _Nodes:
        _, height, width, images = x.shape
        out = out_size(height, self.stride), out_size(width, self.stride)
        tensors = (self.scale, self.shift, self.filters, self.mean, self.deviation)
        return _Nodes(images, height, width, *out, self.stride, self.norm, self.eps, *map(_at, tensors))

    def forward(self, x: Tensor, out: Tensor) -> None:
        """``[nodes, height, width, images]`` to ``[nodes, ceil(height / stride), ceil(width / stride), images]``."""
        record = self._record(x)

        def arguments(first: int, last: int) -> tuple[_Argument, ...]:
            scratch = _scratch(x)
            return ctypes.addressof(record), x, out, first, last, scratch, scratch.numel(), lanes()

        _in_parts("nodes_forward", len(x), 1, x.numel(), arguments)

    def backward(self, x: Tensor, grad: Tensor, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Writes the gradient of ``x`` into ``into``; returns those of filters, scale and shift."""
        record = self._record(x)
        filters, scale, shift = room(len(x), 9), room(len(x)), room(len(x))

        def arguments(first: int, last: int) -> tuple[_Argument, ...]:
            scratch = _scratch(x)
            tensors = ctypes.addressof(record), x, grad, into, filters, scale, shift
            return *tensors, first, last, scratch, scratch.numel(), lanes()

        _in_parts("nodes_backward", len(x), 1, 2 * x.numel(), arguments)
        return filters, scale, shift


def _scratch(x: Tensor) -> Tensor:
    """Room for four rows of a map, with a zero on either side, as vectors."""
    return room(4 * (x.shape[2] + 2) * lanes())


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
    def of(cls, active: Tensor, weight: Tensor, order: Tensor, limits: Tensor) -> Rows:
        """The active entries of a weight.

        Args:
            active: mask of the weight's shape.
            weight: ``[weight rows, width]``.
            order: which row of the weight each row is, int64.
            limits: of each row how many columns are read, from the first on, int64.
        """
        width, starts = weight.shape[1], room(len(order) + 1, dtype=torch.int64).zero_()
        cost = len(order) * width
        counts = starts[1:]
        _in_parts("count", len(order), 1, cost // 8, lambda a, b: (active, width, order, limits, a, b, counts))
        starts.cumsum_(0)
        many = int(starts[-1])
        columns, values = room(many, dtype=torch.int32), room(many)
        of = active, weight, width, order, limits, starts
        _in_parts("compress", len(order), 1, cost // 2, lambda a, b: (*of, a, b, columns, values))
        return cls(starts, columns, values, width)

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
        starts, scratch = room(self.width + 1, dtype=torch.int64), room(self.width, dtype=torch.int64)
        rows, values = room(many, dtype=torch.int32), room(many)
        made = map(_at, (starts, rows, values, scratch))
        _code().dnw_transpose(*map(_at, (self.starts, self.columns, self.values)), len(self), self.width, *made)
        return Rows(starts, rows, values, len(self))

    def times(self, x: Tensor, out: Tensor, least: int = 0) -> None:
        """The product with ``[width, n]``, into ``[rows, n]``.

        Args:
            x: of which rows beyond all entries may be left out.
            out: written.
            least: the first row of ``x`` that entries have to do with.
        """
        n = x.shape[1]
        given = self.starts, self.columns, self.values, len(self), least, len(x), x, out, n

        def arguments(first: int, last: int) -> tuple[_Argument, ...]:
            near = _near(x)
            return *given, first, last, near, _size(near), lanes()

        _in_parts("edges", n, _COLUMNS, n * max(1, self.num_entries), arguments)

    def times_and_products(self, x: Tensor, states: Tensor, out: Tensor, least: int = 0) -> Tensor:
        """The same, and of each entry the product of its row of ``x`` with that of ``states``, ``[rows, n]``.

        These are the gradients of the values where ``x`` holds those of what the transposed matrix makes of the states.
        """
        n, pieces = x.shape[1], -(-x.shape[1] // _COLUMNS)
        parts = min(_PARTS, pieces)
        bounds = [min(n, pieces * i // parts * _COLUMNS) for i in range(parts + 1)]
        sums = room(parts, self.num_entries).zero_()
        given = self.starts, self.columns, self.values, len(self), least, len(x), x, states, out
        nears = [_near(x) for _ in range(parts)]
        spans = zip(sums, pairwise(bounds), nears, strict=True)
        calls = [(*given, into, n, *span, near, _size(near), lanes()) for into, span, near in spans]
        _run("edges_back", 2 * n * max(1, self.num_entries), calls)
        return sums.sum(0)

    def scatter(self, values: Tensor, order: Tensor, matrix: Tensor, *, adds: bool = False) -> None:
        """Puts a value of each entry into a matrix ``[targets, at least rows]``, or adds it.

        Args:
            values: of the entries.
            order: to which row of the matrix each column belongs, int64.
            matrix: written.
            adds: whether several columns belong to one row.
        """
        given = *map(_at, (self.starts, self.columns, values, order)), 0, len(self), matrix.shape[1]
        _code().dnw_scatter(*given, _at(matrix), adds)


def _near(x: Tensor) -> Tensor | None:
    """Room for the columns of a matrix that are taken at a time, where its rows lie far apart."""
    return room(len(x) * _COLUMNS) if len(x) >= _FAR and x.shape[1] > _COLUMNS else None


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def turned(x: Tensor, out: Tensor) -> None:
    """A matrix, ``[rows, columns]``, with rows and columns changed for each other, into ``[columns, rows]``."""
    rows, columns = x.shape
    _in_parts("turned", columns, 64, x.numel(), lambda first, last: (x, out, rows, columns, first, last))


def pooled(x: Tensor, *, mean: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sums or means over squares of 2x2 pixels: ``[nodes, height, width, images]`` to ``[nodes, half, half, images]``.

    Args:
        x: maps.
        mean: whether to make means; otherwise sums.
        dtype: of the result, float32 or bfloat16.
    """
    nodes, height, width, images = x.shape
    out = room(nodes, out_size(height, 2), out_size(width, 2), images, dtype=dtype)

    given = x, out, height, width, images, int(mean), int(dtype == torch.bfloat16)
    _in_parts("pooled", nodes, 1, x.numel(), lambda first, last: (*given, first, last, lanes()))
    return out
