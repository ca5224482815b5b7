"""Tickets: the edges that a run of the complete graph ends with, and the weights to start again from.

Contract: a run of rule ticket keeps its ticket, so that it can be resumed when the first stage's directory is gone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dnw._files import read_tensors
from dnw.train._build import make_model, wire_model
from dnw.train._config import Config
from dnw.train._run import RunDirectory, read_checkpoint, write_checkpoint

_FILE = "ticket.pt"


def draw_ticket(config: Config, num_classes: int) -> dict[str, dict[str, Tensor]]:
    """The k largest weights of every layer at the end of the run that ``config.ticket`` names, and its weights.

    Source: Frankle, Carbin, "The lottery ticket hypothesis", 2019, section 2 (one-shot); as compared in Wortsman et al., 2019,
    section 4.2.

    Returns:
        ``edges`` (masks by parameter name) and ``model`` (the first or the last weights of that run).

    Raises:
        ValueError: no such run, one of another network or rule, or one that is not finished.
    """
    if config.ticket.run is None:
        raise ValueError(
            "rule=ticket needs the run directory of its first stage, the same network trained with rule=complete: give "
            "ticket.run=DIRECTORY"
        )
    source = RunDirectory(config.ticket.run)
    found = next((m for m in source.members() if m[1].seeds == config.seeds and m[1].rule == "complete"), None)
    if found is None:
        found = next((m for m in source.members() if m[1].rule == "complete"), None)
    if found is None:
        raise ValueError(f"ticket.run={source.path}: a ticket is drawn from a run of rule=complete, and there is none in it")
    run, other = found
    if other.model != config.model or other.data.name != config.data.name:
        raise ValueError(
            f"ticket.run={source.path}: it trained {other.model} on {other.data.name}, not {config.model} on {config.data.name}"
        )
    if len(run.metrics()) < other.epochs or not run.last.exists():
        raise ValueError(f"ticket.run={run.path}: it is not finished; dnw resume {source.path} trains on")
    last = read_checkpoint(run.last)["model"]
    if config.ticket.rewind and not run.first.exists():
        raise ValueError(f"ticket.run={run.path}: {run.first.name} is missing, the weights it began with")
    model = make_model(config, num_classes)
    model.load_state_dict(last)
    wiring = wire_model(config, model, torch.optim.SGD(model.parameters(), lr=1.0))
    edges = {name: parameter.active for name, parameter in wiring.items()}
    return {"edges": edges, "model": read_tensors(run.first)["model"] if config.ticket.rewind else last}


def keep_ticket(path: Path, config: Config, num_classes: int) -> None:
    """Draws a run's ticket and stores it with the run, unless it is there already."""
    if config.rule == "ticket" and not (path / _FILE).exists():
        write_checkpoint(path / _FILE, draw_ticket(config, num_classes))


def edges_of_ticket(path: Path, model: nn.Module | None = None) -> dict[str, Tensor] | None:
    """The edges of a run's ticket, None where it has none; a model gets the ticket's weights."""
    if not (path / _FILE).exists():
        return None
    content = read_tensors(path / _FILE)
    if model is not None:
        model.load_state_dict(content["model"])
    return dict(content["edges"])
