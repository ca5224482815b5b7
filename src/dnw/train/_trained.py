"""The network of a run, with the edges and weights of one of its checkpoints; what is done with it afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from torch import nn

from dnw._wiring.wiring import Wiring
from dnw.compile import Plan, Program, plan
from dnw.train._checkpoint import num_classes_of, read_checkpoint
from dnw.train._config import Config
from dnw.train._run import RunDirectory
from dnw.train._state import State

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
    content = read_checkpoint(file, config)
    steps = content["step"] * config.epochs // content["epoch"] if content["step"] else None
    state = State(config, num_classes_of(file, content), steps, member)
    state.load(file, content)
    return Trained(state.model.eval(), state.wiring, config)


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
