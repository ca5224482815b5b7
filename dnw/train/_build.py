"""From names in a config to objects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dnw._rules import RULES, Rule
from dnw._wire import wire
from dnw.data import Augment, Batches, FolderImages, InMemory, Streaming, load
from dnw.models import tiny_cifar10, tiny_digits, tiny_mnist
from dnw.train._config import Config

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "tiny_digits": tiny_digits,
    "tiny_mnist": tiny_mnist,
    "tiny_cifar10": tiny_cifar10,
}

ImageData = tuple
"""Training and test images as :func:`dnw.data.load` returns them."""


def load_data(config: Config, folder: Path) -> ImageData:
    """The images of a config's data set; read once for all seeds."""
    return load(config.data.name, folder, config.data.image_size)


def make_batches(config: Config, data: ImageData, device: torch.device, rank: int, world: int) -> Batches:
    """Batches for one run of one seed."""
    train, test = data
    (seed,), chosen = config.seeds, config.data
    if isinstance(train, FolderImages):
        return Streaming(
            train,
            test,
            size=chosen.image_size,
            batch_size=config.batch_size,
            seed=seed,
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
        seed=seed,
        augment=Augment(chosen.crop_padding, chosen.flip),
        mean=chosen.mean,
        std=chosen.std,
        device=device,
        rank=rank,
        world=world,
    )


def make_model(config: Config, num_classes: int) -> nn.Module:
    """The network, freshly initialised by the config's seed."""
    torch.manual_seed(config.seeds[0])
    return MODELS[config.model](num_classes)


def check_fit(config: Config, data: ImageData) -> None:
    """Raises ``ValueError`` where data, model, budget and rule of a config do not fit together, before anything is written."""
    colours = 3 if isinstance(data[0], FolderImages) else data[0].images.shape[1]
    if colours != len(config.data.mean):
        raise ValueError(f"data.mean={config.data.mean}: the images have {colours} colours")
    batches = make_batches(config.model_copy(update={"seeds": config.seeds[:1]}), data, torch.device("cpu"), 0, 1)
    images, _ = next(batches.test())
    model = make_model(config, num_classes=len(data[0].classes))
    try:
        with torch.no_grad():
            model.eval()(images[:2])
    except RuntimeError as error:
        shape = "x".join(map(str, images.shape[1:]))
        raise ValueError(f"model={config.model} does not take images of {shape} ({str(error).splitlines()[0]})") from None
    rule, budget = make_rule(config)
    wire(model, torch.optim.SGD(model.parameters(), lr=1.0), rule=rule, **budget)  # type: ignore[arg-type]


def make_rule(config: Config) -> tuple[Rule, dict[str, float | int | None]]:
    """The rule, and the budget as arguments of :func:`dnw.wire`."""
    rule = RULES[config.rule]()
    fixes_its_own = config.rule == "complete"
    return rule, {} if fixes_its_own else {"density": config.density, "num_edges": config.num_edges}
