"""Work that is shared out over as many threads as PyTorch uses.

Contract: kernels that say it all in numbers run on the threads of PyTorch's own operations (:func:`openmp`), which are awake
already and do not compete with them; no Python runs there, so that signals find the interpreter as always. What is made of
Python runs on threads of Python (:func:`each`). Neither is called from within the other.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

SMALL = 1 << 16
"""Entries, in all, that are not worth waking threads for."""
_PROCESS = os.getpid()


def openmp() -> int | None:
    """Where the way into a parallel region of the OpenMP runtime that PyTorch has loaded lies.

    None where there is none: PyTorch without it, or a forked process, in which its threads do not live on.
    """
    return _parallel() if os.getpid() == _PROCESS else None


@cache
def _parallel() -> int | None:
    try:
        found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(found, ctypes.c_void_p).value


def each(jobs: Sequence[tuple[int, Callable[[], Any]]]) -> list[Any]:
    """The results of some jobs, each with its size in entries, run at once by as many threads as PyTorch uses.

    Jobs on an accelerator have size 0: alone they are launched from this thread, into its stream.

    Returns only when none of them runs any more, also where it is interrupted.
    """
    threads = min(torch.get_num_threads(), len(jobs))
    if threads < 2 or sum(size for size, _ in jobs) < SMALL:
        return [job() for _, job in jobs]
    largest_first = sorted(range(len(jobs)), key=lambda i: -jobs[i][0])
    futures: dict[int, Future[Any]] = {}
    try:
        for i in largest_first:
            futures[i] = _crew(os.getpid(), threads).submit(jobs[i][1])
        return [futures[i].result() for i in range(len(jobs))]
    finally:
        wait(futures.values())


@lru_cache(maxsize=1)
def _crew(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: one that is forked from it has none."""
    return ThreadPoolExecutor(threads, thread_name_prefix="dnw")
