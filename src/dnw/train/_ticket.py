"""Tickets: the edges that a run of the complete graph ends with, and the weights to start again from.

Contract: a run of rule ticket keeps its ticket, so that it can be resumed when the first stage's directory is gone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dnw._checks import listing
from dnw.train._build import make_model, wire_model
from dnw.train._checkpoint import read_checkpoint, read_weights, write_checkpoint
from dnw.train._config import Config
from dnw.train._run import RunDirectory

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
    complete = {one.seeds[0]: (member, one) for member, one in source.members() if one.rule == "complete"}
    if not complete:
        raise ValueError(f"ticket.run={source.path}: a ticket is drawn from a run of rule=complete, and there is none in it")
    if config.seeds[0] not in complete:
        raise ValueError(
            f"ticket.run={source.path}: it has no run of seed {config.seeds[0]}, but of {listing(map(str, complete))}; each "
            "seed needs a first stage of its own"
        )
    run, other = complete[config.seeds[0]]
    trained, wanted = (f"{c.model} on {c.data.name}" for c in (other, config))
    if trained != wanted:
        raise ValueError(f"ticket.run={source.path}: it trained {trained}, not {wanted}")
    content = read_checkpoint(run.last, other) if run.last.exists() else None
    if content is None or content["epoch"] < other.epochs:
        raise ValueError(f"ticket.run={run.path}: it is not finished; dnw resume {source.path} trains on")
    last = content["model"]
    if config.ticket.rewind and not run.first.exists():
        raise ValueError(f"ticket.run={run.path}: {run.first.name} is missing, the weights it began with")
    model = make_model(config, num_classes)
    try:
        model.load_state_dict(last)
    except RuntimeError as error:
        raise ValueError(f"ticket.run={run.path}: it trained another network ({str(error).splitlines()[-1].strip()})") from None
    wiring = wire_model(config, model, torch.optim.SGD(model.parameters(), lr=1.0))
    edges = {name: parameter.active for name, parameter in wiring.items()}
    return {"edges": edges, "model": read_weights(run.first, "model")["model"] if config.ticket.rewind else last}


def keep_ticket(path: Path, config: Config, num_classes: int) -> None:
    """Draws a run's ticket and stores it with the run, unless it is there already."""
    if config.rule == "ticket" and not (path / _FILE).exists():
        write_checkpoint(path / _FILE, draw_ticket(config, num_classes))


def edges_of_ticket(path: Path, model: nn.Module | None = None) -> dict[str, Tensor] | None:
    """The edges of a run's ticket, None where it has none; a model gets the ticket's weights.

    Raises:
        ValueError: a damaged ticket, or one of another network.
    """
    file = path / _FILE
    if not file.exists():
        return None
    content = read_weights(file, "model", "edges")
    if any(mask.dtype != torch.bool for mask in content["edges"].values()):
        raise ValueError(f"{file}: not a ticket (its edges are no masks)")
    if model is not None:
        try:
            model.load_state_dict(content["model"])
        except RuntimeError as error:
            raise ValueError(f"{file}: does not fit the run's network ({str(error).splitlines()[-1].strip()})") from None
    return content["edges"]
