"""Runs functions on several processes that form a gloo group, as a test. The processes stay for the next test."""

from __future__ import annotations

import atexit
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_SECONDS = 240


class _Group:
    """Some processes in a group of their own."""

    def __init__(self, world: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self.pipes, self._processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(rank, world, self._folder.name, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


_groups: dict[int, _Group] = {}


def on_processes(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a top-level function returned on each rank. The first failure is raised with its traceback."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of PyTorch has no gloo")
    group = _groups.get(world)
    if group is None:
        group = _groups[world] = _Group(world)
        atexit.register(group.close)
    for pipe in group.pipes:
        pipe.send((function, arguments))
    answers, failures = [], []
    for rank, pipe in enumerate(group.pipes):
        if pipe.poll(5 if failures else _SECONDS):
            ok, answer = pipe.recv()
            (answers if ok else failures).append(answer)
        else:
            failures.append(f"rank {rank} does not answer")
    if failures:
        _groups.pop(world).close()
        pytest.fail("\n".join(failures))
    return answers


def _rank(rank: int, world: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'group'}", rank=rank, world_size=world)
    while True:
        function, arguments = pipe.recv()
        try:
            answer = True, function(rank, *arguments)
        except BaseException:
            answer = False, f"rank {rank}:\n{traceback.format_exc()}"
        pipe.send(answer)
