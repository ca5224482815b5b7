"""Memory that kernels use again and again: the system takes longer to hand out fresh pages than kernels to fill them.

Contract: what is handed out is not initialised, cannot be resized, and comes back by itself when no tensor holds it any more.
Free memory and memory in use are together at most half as much again as has been in use at once of late.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import threading
import weakref

import torch
from torch import Tensor

_PAGE, _HUGE = 1 << 16, 1 << 21
"""Blocks are multiples of one or the other; what is smaller is left to PyTorch."""
_OF_LATE = 1000
"""So many times memory is lent before what was in use earlier is forgotten."""
_IS_FRESH = bool(os.environ.get("DNW_FRESH_MEMORY"))
"""Whether all memory is PyTorch's, so that sanitizers see where it ends."""


class _Pool:
    """Blocks of memory, lent to buffers as long as these live."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[mmap.mmap] = []  # those used last at the end
        self._lent: list[tuple[weakref.ref, mmap.mmap]] = []
        self._most, self._most_before, self._times = 0, 0, 0

    def lend(self, size: int) -> ctypes.Array:
        """A buffer of at least so many bytes."""
        page = _PAGE if size < _HUGE else _HUGE
        size = -(-size // page) * page
        with self._lock:
            self._take_back()
            return self._lent_block(size)

    def _take_back(self) -> None:
        """Sorts out which buffers live. Each is asked once: one may die at any moment, in another thread or of old age."""
        alive: list[tuple[weakref.ref, mmap.mmap]] = []
        for buffer, block in self._lent:
            if buffer() is None:
                self._free.append(block)
            else:
                alive.append((buffer, block))
        self._lent = alive

    def _lent_block(self, size: int) -> ctypes.Array:
        in_use = size + sum(len(block) for _, block in self._lent)
        self._times += 1
        if self._times % _OF_LATE == 0:
            self._most_before, self._most = self._most, 0
            self._keep(in_use)
        self._most = max(self._most, in_use)
        block = next((block for block in reversed(self._free) if len(block) == size), None)
        if block is None:
            self._keep(in_use)
            block = _new_block(size)
        else:
            self._free.remove(block)
        buffer = (ctypes.c_char * size).from_buffer(block)
        self._lent.append((weakref.ref(buffer), block))
        return buffer

    def _keep(self, in_use: int) -> None:
        """Gives the system free blocks that are too many beside what is in use, those used longest ago first."""
        most = 1.5 * max(self._most, self._most_before, in_use)
        while self._free and in_use + sum(map(len, self._free)) > most:
            del self._free[0]


def _new_block(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # it is advice, which not every system takes
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


_pool = _Pool()


def _begin_anew() -> None:
    """In a forked process: whoever held the lock is not there."""
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_begin_anew)


def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the CPU, not initialised, in memory that is used again when it is gone."""
    count = math.prod(shape)
    if count * dtype.itemsize < _PAGE or _IS_FRESH:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(_pool.lend(count * dtype.itemsize), dtype=dtype, count=count).view(shape)
