"""The network of a run as one of its checkpoints has it, and the same compiled."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from dnw.compile import Plan, Program, Report
from dnw.compile import compile as compiled
from dnw.compile._plan import planned
from dnw.count import graphs_of
from dnw.train._network import Checkpoint, Network, load_network
from dnw.train._run import RunDirectory


def load_trained(path: str | Path, checkpoint: Checkpoint = "last") -> Network:
    """The network of a run directory, in eval mode; the first seed's, where there are several.

    Raises:
        ValueError: this is no run directory, or it has no checkpoint yet, or a damaged one.
    """
    member, config = next(iter(RunDirectory(path).members()))
    network = load_network(member, config, checkpoint)
    network.model.eval()
    return network


def compile_run(
    path: str | Path, input_size: tuple[int, int, int] | None = None, checkpoint: Checkpoint | None = None
) -> tuple[Plan | Report, Program]:
    """The plan for a run's network, or for one that is no network of graphs the report, and the compacted network.

    Args:
        path: run directory, or the file of a checkpoint in one (best.pt or last.pt).
        input_size: channels, height and width to compile for; by default those of the run's images.
        checkpoint: which of the run's; by default the last.

    Raises:
        ValueError: no such checkpoint, or a network that is not compiled.
    """
    path = Path(path)
    if path.is_file():
        named = {"best.pt": "best", "last.pt": "last"}.get(path.name)
        if named is not None and checkpoint not in (None, named):
            raise ValueError(
                f"{path} is the {named} checkpoint; leave --checkpoint {checkpoint} out, or name the run directory"
            )
        if named is None:
            raise ValueError(
                f"{path}: expected a run directory or its best.pt or last.pt (dnw import makes runs of foreign files)"
            )
        path, checkpoint = path.parent, cast(Checkpoint, named)
    network = load_trained(path, checkpoint or "last")
    with network.wiring.settled():
        size = input_size or network.input_size
        if graphs_of(network.model):
            return planned(network.model, size)
        other = compiled(network.model, torch.rand(1, *size, generator=torch.Generator().manual_seed(0)))
        return other.report, other.program
