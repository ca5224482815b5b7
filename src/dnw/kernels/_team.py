"""Work that is shared out over the threads of PyTorch.

Contract: jobs run at once on the threads that PyTorch's own operations use, which are awake already and do not compete with
them. Where there are none (PyTorch without OpenMP, or a forked process, in which they do not live on) threads of Python do it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

_SMALL = 1 << 16
"""Entries, in all, that are not worth waking threads for."""
_PROCESS = os.getpid()
_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def each(jobs: Sequence[tuple[int, Callable[[], Any]]]) -> list[Any]:
    """The results of some jobs, each with its size in entries, run at once by as many threads as PyTorch uses.

    Jobs on an accelerator have size 0: they are launched from this thread, into its stream.

    Returns only when none of them runs any more, also where it is interrupted.
    """
    threads = min(torch.get_num_threads(), len(jobs))
    if threads < 2 or sum(size for size, _ in jobs) < _SMALL:
        return [job() for _, job in jobs]
    waiting = sorted(range(len(jobs)), key=lambda i: jobs[i][0])  # the largest are taken first
    results: dict[int, Any] = {}
    failures: list[BaseException] = []

    def work(_: object = None) -> None:
        while not failures:
            try:
                i = waiting.pop()
            except IndexError:
                return
            try:
                results[i] = jobs[i][1]()
            except BaseException as failure:  # here nobody would hear of it
                failures.append(failure)

    openmp = _openmp() if os.getpid() == _PROCESS else None
    if openmp is None:
        futures = [_crew(os.getpid(), threads).submit(work) for _ in range(threads)]
        try:
            wait(futures)
        finally:
            wait(futures)
    else:
        openmp(_WORK(work), None, threads, 0)
    if failures:
        raise failures[0]
    return [results[i] for i in range(len(jobs))]


@cache
def _openmp() -> Any:
    """The way into a parallel region of the OpenMP runtime that PyTorch has loaded; None where there is none."""
    try:
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = [_WORK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


@lru_cache(maxsize=1)
def _crew(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: one that is forked from it has none."""
    return ThreadPoolExecutor(threads, thread_name_prefix="dnw")
