"""From a config to images: the data set that it names, and the batches of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from dnw.data import Augment, Batches, FolderImages, InMemory, Streaming, hold_out, load
from dnw.recipes._config import Config

ImageData = tuple
"""Training and test images as :func:`dnw.data.load` returns them."""


def load_data(config: Config, folder: Path, *, testing: bool = False) -> ImageData:
    """The images of a config's data set, to train with and to measure on; read once for all seeds.

    Args:
        config: whose images.
        folder: where the data lies.
        testing: the test images, also where the config measures on training images that it holds out.
    """
    train, test = load(config.data.name, folder, config.data.image_size, testing=testing)
    return hold_out(train, config.data.validation) if config.data.validation and not testing else (train, test)


def num_classes_of(data: ImageData) -> int:
    """Into how many classes the images fall."""
    return len(data[0].classes)


def make_batches(config: Config, data: ImageData, device: torch.device, rank: int = 0, world: int = 1) -> Batches:
    """Batches for a single run, of one process among several."""
    train, test = data
    chosen = config.data
    if isinstance(train, FolderImages):
        return Streaming(
            train,
            test,
            size=chosen.image_size,
            batch_size=config.batch_size,
            seed=config.seed,
            mean=chosen.mean,
            std=chosen.std,
            device=device,
            workers=chosen.workers,
            rank=rank,
            world=world,
        )
    return InMemory(
        train,
        test,
        batch_size=config.batch_size,
        seed=config.seed,
        augment=Augment(chosen.crop_padding, chosen.flip),
        mean=chosen.mean,
        std=chosen.std,
        device=device,
        rank=rank,
        world=world,
    )


def num_steps(config: Config, batches: Batches) -> int:
    """Optimizer steps of a whole run."""
    return config.epochs * batches.num_batches
