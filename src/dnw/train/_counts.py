"""Counts of the network of a recipe, as it starts, and of a run, with the edges that it has learned."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dnw.count import Count, count
from dnw.train._build import make_model, wire_model
from dnw.train._config import Config
from dnw.train._trained import load_trained


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
    trained = load_trained(path)
    return count(trained.model, input_size or trained.input_size, trained.wiring)


def _fresh(config: Config, num_classes: int | None) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = make_model(config, num_classes or (1000 if config.data.name == "folder" else 10))
    wiring = wire_model(config, model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=config.optim.momentum))
    return model, {name: wiring[name].active for name in wiring}


def _size(config: Config, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
    return given or (len(config.data.mean), config.data.image_size, config.data.image_size)
