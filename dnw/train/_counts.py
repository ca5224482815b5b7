"""Counts of the network of a recipe, as it starts, and of a run, with the edges that it has learned."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dnw.count import Count, count
from dnw.train._build import make_model, wire_model
from dnw.train._config import Config
from dnw.train._run import RunDirectory, read_checkpoint
from dnw.train._ticket import edges_of_ticket


def count_config(config: Config, input_size: tuple[int, int, int] | None = None, num_classes: int | None = None) -> Count:
    """Counts the network of a config as it starts, with the edges that its rule chooses first.

    Args:
        config: what to build.
        input_size: colours, height and width; by default those of the config's data.
        num_classes: of the classifier; by default 10, or 1000 for image folders.
    """
    model, wiring_masks = _fresh(config, num_classes)
    return count(model, _size(config, input_size), wiring_masks)


def count_run(path: Path, input_size: tuple[int, int, int] | None = None) -> Count:
    """Counts the network of a run with the edges of its last checkpoint.

    Raises:
        ValueError: this is no run directory, or it has no checkpoint yet.
    """
    run = RunDirectory(path)
    member, config = next(iter(run.members()))
    if not member.last.exists():
        raise ValueError(f"{member.path}: no {member.last.name} yet; dnw resume {path} trains on")
    content = read_checkpoint(member.last)
    heads = [w for n, w in content["model"].items() if n.endswith("weight") and w.ndim == 2 and "graph" not in n]
    model = make_model(config, heads[-1].shape[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=config.optim.momentum)
    steps = content["step"] * config.epochs // content["epoch"] if content["epoch"] else None
    wiring = wire_model(config, model, optimizer, steps, edges_of_ticket(member.path))
    try:
        optimizer.load_state_dict(content["optimizer"])
        model.load_state_dict(content["model"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{member.last}: does not fit the run's config ({str(error).splitlines()[0]})") from None
    return count(model, _size(config, input_size), wiring)


def _fresh(config: Config, num_classes: int | None) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = make_model(config, num_classes or (1000 if config.data.name == "folder" else 10))
    wiring = wire_model(config, model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=config.optim.momentum))
    return model, {name: wiring[name].active for name in wiring}


def _size(config: Config, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
    return given or (len(config.data.mean), config.data.image_size, config.data.image_size)
