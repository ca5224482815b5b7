"""Memory that kernels use again and again: the system takes longer to hand out fresh pages than kernels to fill them.

Contract: what is handed out is not initialised, and comes back by itself when no tensor holds it any more. Free memory and
memory in use are together at most half as much again as has been in use at once.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

_PAGE, _HUGE = 1 << 16, 1 << 21
"""Blocks are multiples of one or the other; what is smaller is left to PyTorch."""


class _Pool:
    """Blocks of memory, lent to buffers as long as these live."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[mmap.mmap] = []  # those used last at the end
        self._back: deque[mmap.mmap] = deque()  # come back in any thread, in the middle of `lend` too
        self._lent: dict[int, weakref.ref] = {}
        self._in_use = self._most = 0

    def lend(self, size: int) -> ctypes.Array:
        """A buffer of at least so many bytes."""
        page = _PAGE if size < _HUGE else _HUGE
        size = -(-size // page) * page
        with self._lock:
            while self._back:
                self._free.append(self._back.popleft())
                self._in_use -= len(self._free[-1])
            self._in_use += size
            self._most = max(self._most, self._in_use)
            block = self._taken(size)
        buffer = (ctypes.c_char * size).from_buffer(block)
        number = id(buffer)

        def give_back(_: weakref.ref) -> None:
            del self._lent[number]
            self._back.append(block)

        self._lent[number] = weakref.ref(buffer, give_back)
        return buffer

    def _taken(self, size: int) -> mmap.mmap:
        for i in reversed(range(len(self._free))):
            if len(self._free[i]) == size:
                return self._free.pop(i)
        while self._free and self._in_use + sum(map(len, self._free)) > 1.5 * self._most:
            del self._free[0]
        block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        return block


_pool = _Pool()


def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the CPU, not initialised, in memory that is used again when it is gone."""
    size, count = dtype.itemsize * math.prod(shape), math.prod(shape)
    if size < _PAGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(_pool.lend(size), dtype=dtype, count=count).view(shape)
