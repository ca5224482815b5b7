"""The processes and threads that compute a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dnw._wiring.wiring import Wiring
from dnw.recipes._config import Config
from dnw.train._log import Log
from dnw.train._run import RunDirectory, TrainingStoppedError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Alone:
    """One process on one device: what a run needs of Lightning Fabric, whose import takes longer than that of torch.

    Attributes:
        device: where models and images are.
        global_rank, world_size, is_global_zero: of the only process.
    """

    global_rank, world_size, is_global_zero = 0, 1, True

    def __init__(self, config: Config) -> None:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if config.device == "auto" else config.device)
        self._mixed = config.precision == "bf16-mixed"

    def setup(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        return model.to(self.device), optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self._mixed else nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def all_reduce(self, values: Tensor, reduce_op: str) -> Tensor:
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        return values[None]

    def broadcast(self, value: str) -> str:
        return value

    def barrier(self) -> None:
        pass


def check_launcher(config: Config) -> None:
    """Raises ``ValueError`` where torchrun has started another number of processes: each would train a run of its own."""
    started = os.environ.get("WORLD_SIZE", "") if "TORCHELASTIC_RUN_ID" in os.environ else ""
    if started and started != str(config.processes):
        raise ValueError(
            f"torchrun has started {started} processes, but processes={config.processes}; give processes={started} as well"
        )


def launch(config: Config, processes: int) -> Fabric | Alone:
    """Starts the processes of a run beside this one, where there are any.

    Raises:
        ValueError: this machine has fewer devices.
    """
    on_gpus = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if on_gpus and torch.cuda.device_count() < processes:
        raise ValueError(
            f"device={config.device}, processes={processes}: this machine shows {torch.cuda.device_count()} CUDA devices; use "
            "device=cpu or fewer processes"
        )
    if processes == 1:
        return Alone(config)
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    from lightning_fabric import Fabric  # which sets its own

    logger.setLevel(level or logger.level)
    fabric = Fabric(accelerator=config.device, devices=processes, strategy="ddp", precision=config.precision)
    fabric.launch()
    return fabric


def part(fabric: Fabric | Alone, path: Path) -> None:
    """Ends the group of processes together: one that goes first makes the others abort on their way out."""
    with lost_processes_named(path):
        fabric.barrier()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_agreement(fabric: Fabric | Alone, wiring: Wiring, epoch: int) -> None:
    """Raises where processes that train together have come to hold different latent weights or edges."""
    if fabric.world_size == 1:
        return
    digest = [f(wiring[n]).double().sum() for n in wiring for f in (lambda p: p.latent, lambda p: p.latent * p.active)]
    everywhere = fabric.all_gather(torch.stack(digest))
    assert isinstance(everywhere, Tensor)
    if not bool((everywhere == everywhere[0]).all()):
        raise TrainingStoppedError(f"after epoch {epoch + 1} the processes hold different wirings; nothing of it was saved")


def sum_over_processes(fabric: Fabric | Alone, values: Tensor) -> Tensor:
    reduced = fabric.all_reduce(values, reduce_op="sum")
    assert isinstance(reduced, Tensor)
    return reduced


@contextmanager
def lost_processes_named(path: Path) -> Iterator[None]:
    """Says in one line what PyTorch says in many when a process has died that works along with this one."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "DataLoader worker" in text:
            who = "a process that decodes images (data.workers)"
        elif isinstance(error, torch.distributed.DistError) or "gloo" in text or "Connection closed by peer" in text:
            who = "another process of this run"
        else:
            raise
        raise ChildProcessError(
            f"{who} has died; nothing of a finished epoch is lost: continue with dnw resume {path}"
        ) from None


@contextmanager
def threads_of(run: RunDirectory, log: Log | None = None) -> Iterator[None]:
    """Computes with as many threads as the run was started with, where it says so."""
    before = torch.get_num_threads()
    wanted = run.environment().get("threads") or before
    if log is not None and wanted != before:
        log.line(f"{wanted} threads, as this run was started with")
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
