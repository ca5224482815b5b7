"""The network of a run, with the edges and weights of one of its checkpoints; what is done with it afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

from dnw._wiring import Wiring
from dnw.compile import Plan, Program, plan
from dnw.train._build import make_model, parameter_groups, wire_model
from dnw.train._config import Config
from dnw.train._run import RunDirectory, read_checkpoint
from dnw.train._ticket import edges_of_ticket

Checkpoint = Literal["last", "best"]


@dataclass(frozen=True)
class Trained:
    """A network of a run.

    Attributes:
        model: in eval mode, with the weights that its rule trains with; ``with wiring.settled()`` for those it evaluates with.
        wiring: of the model.
        config: of the single run.
    """

    model: nn.Module
    wiring: Wiring
    config: Config

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that it was trained on."""
        return len(self.config.data.mean), self.config.data.image_size, self.config.data.image_size


def load_trained(path: Path, checkpoint: Checkpoint = "last") -> Trained:
    """The network of a run directory; the first seed's, where there are several.

    Raises:
        ValueError: this is no run directory, or it has no checkpoint yet, or a damaged one.
    """
    run = RunDirectory(path)
    member, config = next(iter(run.members()))
    file = member.best if checkpoint == "best" else member.last
    if not file.exists():
        raise ValueError(f"{member.path}: no {file.name} yet; dnw resume {path} trains on")
    content = read_checkpoint(file)
    heads = [w for n, w in content["model"].items() if n.endswith("weight") and w.ndim == 2 and "graph" not in n]
    model = make_model(config, heads[-1].shape[0])
    optimizer = torch.optim.SGD(parameter_groups(model, config.optim), lr=1.0, momentum=config.optim.momentum)
    steps = content["step"] * config.epochs // content["epoch"] if content["epoch"] else None
    wiring = wire_model(config, model, optimizer, steps, edges_of_ticket(member.path))
    try:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: does not fit the run's config ({str(error).splitlines()[0]})") from None
    return Trained(model.eval(), wiring, config)


def compile_run(
    path: Path, input_size: tuple[int, int, int] | None = None, checkpoint: Checkpoint | None = None
) -> tuple[Plan, Program]:
    """The plan for a run's network, and the network compacted by it.

    Args:
        path: run directory, or the file of a checkpoint in one (best.pt or last.pt).
        input_size: channels, height and width to compile for; by default those of the run's images.
        checkpoint: which of the run's; by default the last.

    Raises:
        ValueError: no such checkpoint, or a network that is not compiled.
    """
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
    trained = load_trained(path, checkpoint or "last")
    with trained.wiring.settled():
        found = plan(trained.model, input_size or trained.input_size)
        return found, found.apply(trained.model)
