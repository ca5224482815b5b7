"""Counts of the network of a recipe, as it starts, of a run, with the edges that it has learned, and of a model by its name."""

from __future__ import annotations

from pathlib import Path

from dnw.count import Count, count
from dnw.recipes._config import Config
from dnw.recipes._settings import validated
from dnw.train._network import make_network
from dnw.train._trained import load_trained

_INPUT_SIZES = {
    "tiny_digits": (1, 8, 8),
    "tiny_mnist": (1, 28, 28),
    "lenet_300_100": (1, 28, 28),
    "resnet18_cifar": (3, 32, 32),
}
_INPUT_SIZES |= {f"tiny_cifar10{kind}": (3, 32, 32) for kind in ("", "_discrete", "_continuous")}
"""Of networks by their names, where no data set says it; those that are not here take 224 pixels."""


def count_run(path: str | Path, input_size: tuple[int, int, int] | None = None) -> Count:
    """Counts the network of a run with the edges of its last checkpoint.

    Raises:
        ValueError: this is no run directory, or it has no checkpoint yet.
    """
    network = load_trained(path)
    return count(network.model, input_size or network.input_size, network.wiring)


def count_config(config: Config, input_size: tuple[int, int, int] | None = None, num_classes: int | None = None) -> Count:
    """Counts the network of a config as it starts, with the edges that its rule chooses first.

    Args:
        config: what to build; its first seed.
        input_size: channels, height and width; by default those of the config's data.
        num_classes: of the classifier; by default 10, or 1000 for image folders.
    """
    single = next(iter(config.singles().values()))
    network = make_network(single, num_classes or (1000 if config.data.name == "folder" else 10))
    return count(network.model, input_size or network.input_size, network.wiring)


def config_of_model(model: str, input_size: tuple[int, int, int] | None = None) -> Config:
    """A config around one of the networks alone, complete, for images of a size (channels, height, width) or of its own."""
    channels, size, _ = input_size or _INPUT_SIZES.get(model, (3, 224, 224))
    data = {"name": "folder", "image_size": size, "mean": (0.5,) * channels, "std": (0.5,) * channels}
    values = {"recipe": model, "data": data, "model": model, "rule": "complete", "epochs": 1, "batch_size": 1}
    return validated(Config, values, model)
