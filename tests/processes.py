"""Runs functions, commands and scripts in processes of their own.

They are forked from a server in which everything heavy is imported already: to import it anew for each takes most of their
time. What is about how a process starts starts one as a user does.
"""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GROUP = pytest.mark.xdist_group("distributed")
"""For tests of several processes: by one worker, so that there is one server, and no more processes at once than one needs."""
_SECONDS = 240
_PRELOADED = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor",
    "torch.utils.data",
    "lightning_fabric",
    "lightning",
    "accelerate",
    "transformers.trainer",
    "pytest",
    "dnw.cli",
    "dnw.recipes",
    "dnw.train._loop",
    "dnw.train._view",
]
"""Where one is not installed the server goes without it."""


def needs(library: str) -> pytest.MarkDecorator:
    """Skips a test where a library is not installed, without importing it where only the processes need it."""
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


def _context() -> Any:
    """What makes processes; the server starts with the first of them and ends with the last of its users."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with patch.dict(os.environ, settings):
        multiprocessing.forkserver.ensure_running()
    return context


# --- one process ---


class Child:
    """A process that runs a function in a folder; its exit status is what the function returns."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, folder: Path, **environment: str) -> None:
        self._output = tempfile.TemporaryDirectory()
        self._files = [Path(self._output.name) / name for name in ("out", "err")]
        self._process = _context().Process(target=_run, args=(function, arguments, folder, environment, self._files))
        self._process.start()
        self.pid: int = self._process.pid

    def wait(self, seconds: float = _SECONDS) -> subprocess.CompletedProcess[str]:
        """What it returned and printed, when it has ended."""
        self._process.join(seconds)
        status = self._process.exitcode
        out, err = (file.read_text() if file.exists() else "" for file in self._files)
        if status is None:
            self._process.kill()
            self._process.join()
        self._output.cleanup()
        assert status is not None, f"it did not end in {seconds} seconds; it printed:\n{out}{err}"
        return subprocess.CompletedProcess([], status, out, err)


def command(*arguments: str, folder: Path, before: Callable[[], None] | None = None) -> Child:
    """``dnw`` with some arguments."""
    return Child(_command, arguments, before, folder=folder)


def commands(processes: int, *arguments: str, folder: Path) -> list[Child]:
    """The same as torchrun starts it, on some processes."""
    return [Child(_command, arguments, None, folder=folder, **rank) for rank in _ranks(processes)]


def script(path: Path, *options: object, processes: int = 0, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """A script run as ``__main__``: alone, or on some processes as torchrun starts them."""
    ranks = _ranks(processes) if processes else [{}]
    children = [Child(_script, path, tuple(map(str, options)), folder=folder, **rank) for rank in ranks]
    return [child.wait() for child in children]


def _ranks(world: int) -> list[dict[str, str]]:
    """What torchrun tells each of its processes, in their environments."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    common |= {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    return [{k: str(v) for k, v in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()} for rank in range(world)]


def _run(function: Callable[..., Any], arguments: tuple, folder: Path, environment: dict[str, str], files: list[Path]) -> None:
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(function(*arguments))


def _command(arguments: Sequence[str], before: Callable[[], None] | None) -> int:
    from dnw.cli import main

    if before is not None:
        before()
    return main(list(arguments))


def _script(path: Path, options: Sequence[str]) -> None:
    sys.argv = [str(path), *options]
    runpy.run_path(str(path), run_name="__main__")


# --- groups of processes ---


class _Group:
    """Some processes in a gloo group of their own; they stay for the next test."""

    def __init__(self, world: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = _context()
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
    """What a top-level function returned on each rank of a group. The first failure is raised with its traceback."""
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
