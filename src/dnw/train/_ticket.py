"""Tickets: the edges that a run of the complete graph ends with, and the weights to start again from.

Contract: a run keeps its ticket, so that it can be resumed when the first stage's directory is gone.
"""

from __future__ import annotations

from dnw._checks import listing
from dnw.recipes._config import Config
from dnw.train._checkpoint import Start, read_weights, write_checkpoint
from dnw.train._network import load_network, make_network
from dnw.train._run import RunDirectory


def draw_ticket(config: Config, num_classes: int) -> Start:
    """The k largest weights of every layer at the end of the run that ``config.ticket`` names, and its first or last weights.

    Source: Frankle, Carbin, "The lottery ticket hypothesis", 2019, section 2 (one-shot); as compared in Wortsman et al., 2019,
    section 4.2.

    Raises:
        ValueError: no such run, one of another network or rule, or one that is not finished.
    """
    if config.ticket.run is None:
        raise ValueError(
            "edges=ticket needs the run directory of its first stage, the same network trained with rule=complete: give "
            "ticket.run=DIRECTORY"
        )
    source = RunDirectory(config.ticket.run)
    complete = {one.seed: (member, one) for member, one in source.members() if one.rule == "complete"}
    if not complete:
        raise ValueError(f"ticket.run={source.path}: a ticket is drawn from a run of rule=complete, and there is none in it")
    if config.seed not in complete:
        raise ValueError(
            f"ticket.run={source.path}: it has no run of seed {config.seed}, but of {listing(map(str, complete))}; each "
            "seed needs a first stage of its own"
        )
    run, other = complete[config.seed]
    trained, wanted = (f"{c.model} on {c.data.name}" for c in (other, config))
    if trained != wanted:
        raise ValueError(f"ticket.run={source.path}: it trained {trained}, not {wanted}")
    end = load_network(run, other, num_classes=num_classes)
    if end.epoch < other.epochs:
        raise ValueError(f"ticket.run={run.path}: it is not finished; dnw resume {source.path} trains on")
    if config.ticket.rewind and not run.first.exists():
        raise ValueError(f"ticket.run={run.path}: {run.first.name} is missing, the weights it began with")
    last = Start(end.model.state_dict(), None, f"ticket.run={run.path}")
    largest = make_network(config, num_classes, last).wiring
    edges = {name: parameter.active for name, parameter in largest.items()}
    return Start(read_weights(run.first) if config.ticket.rewind else last.weights, edges, last.source)


def check_tickets(config: Config, num_classes: int) -> None:
    """Raises ``ValueError`` where the ticket of a single run cannot be drawn, before anything is written."""
    for single in config.singles().values():
        if single.edges == "ticket":
            draw_ticket(single, num_classes)


def keep_ticket(run: RunDirectory, config: Config, num_classes: int) -> None:
    """Draws a single run's ticket and stores it with the run, unless it is there already."""
    if config.edges == "ticket" and not run.ticket.exists():
        ticket = draw_ticket(config, num_classes)
        write_checkpoint(run.ticket, {"edges": ticket.edges, "model": ticket.weights})
