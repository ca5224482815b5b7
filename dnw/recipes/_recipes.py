"""Recipes. The first line of each docstring is what ``dnw recipes`` shows."""

from __future__ import annotations

from collections.abc import Callable

from dnw.train import Config, DataConfig, OptimConfig


def digits() -> Config:
    """Tiny static graph on the handwritten digits in the package, beside a random graph; about a minute on a CPU."""
    return Config(
        recipe="digits",
        data=DataConfig(name="digits", image_size=8, mean=(0.306,), std=(0.375,), crop_padding=1),
        model="tiny_digits",
        num_edges=100,
        baseline="random",
        optim=OptimConfig(lr=0.1, schedule="cosine"),
        epochs=60,
        batch_size=32,
    )


def mnist() -> Config:
    """Small static graph on MNIST (IDX files in --data-dir)."""
    return Config(
        recipe="mnist",
        data=DataConfig(name="mnist", image_size=28, mean=(0.1307,), std=(0.3081,)),
        model="tiny_mnist",
        num_edges=600,
        optim=OptimConfig(lr=0.1, schedule="cosine"),
        epochs=10,
        batch_size=128,
    )


def cifar10() -> Config:
    """The paper's tiny CIFAR-10 classifier with a static graph, 32,000 edges, 160 epochs (section 4.1, table 1)."""
    return Config(
        recipe="cifar10",
        data=DataConfig(
            name="cifar10",
            image_size=32,
            mean=(0.491, 0.482, 0.447),
            std=(0.247, 0.243, 0.262),
            crop_padding=4,
            flip=True,
        ),
        model="tiny_cifar10",
        num_edges=32_000,
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=1e-4, schedule="steps", milestones=(0.5, 0.75)),
        epochs=160,
        batch_size=512,
    )


RECIPES: dict[str, Callable[[], Config]] = {"digits": digits, "mnist": mnist, "cifar10": cifar10}
"""Every recipe by name."""
