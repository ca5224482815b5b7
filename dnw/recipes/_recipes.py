"""Recipes. The first line of each docstring is what ``dnw recipes`` shows."""

from __future__ import annotations

from collections.abc import Callable

from dnw.train import Config, DataConfig, OptimConfig

_CIFAR10 = DataConfig(
    name="cifar10", image_size=32, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262), crop_padding=4, flip=True
)
_IMAGENET = DataConfig(name="folder", image_size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def _variant(config: Config, recipe: str, **changes: object) -> Config:
    return Config.model_validate({**config.model_dump(), "recipe": recipe, **changes})


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


# --- the tiny classifiers (section 4.1, table 1) ---


def cifar10() -> Config:
    """The paper's tiny CIFAR-10 classifier with a static graph, 32,000 edges, 160 epochs (published: 80.9 %)."""
    return Config(
        recipe="cifar10",
        data=_CIFAR10,
        model="tiny_cifar10",
        num_edges=32_000,
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=1e-4, schedule="steps", milestones=(0.5, 0.75)),
        epochs=160,
        batch_size=512,
    )


def cifar10_random() -> Config:
    """The same with a random graph all of whose edges can be used."""
    return _variant(cifar10(), "cifar10_random", rule="random")


def cifar10_random_original() -> Config:
    """The same with a random graph as the authors draw it, of whose edges about 27,000 can be used (published: 76.1 %)."""
    return _variant(cifar10(), "cifar10_random_original", rule="random_original", rank_all_entries=True)


def cifar10_discrete() -> Config:
    """The tiny classifier in discrete time, five steps (published: 82.3 %)."""
    return _variant(cifar10(), "cifar10_discrete", model="tiny_cifar10_discrete")


def cifar10_discrete_random() -> Config:
    """The tiny classifier in discrete time with a random graph (published: 77.3 %)."""
    return _variant(cifar10_discrete(), "cifar10_discrete_random", rule="random")


def cifar10_continuous() -> Config:
    """The tiny classifier in continuous time, an ODE on [0, 1] (published: 83.1 %)."""
    return _variant(cifar10(), "cifar10_continuous", model="tiny_cifar10_continuous")


def cifar10_continuous_random() -> Config:
    """The tiny classifier in continuous time with a random graph (published: 78.5 %)."""
    return _variant(cifar10_continuous(), "cifar10_continuous_random", rule="random")


# --- ways of discovering a wiring (section 4.2): MobileNetV1 on CIFAR-10 ---


def cifar10_mobilenet_dnw_x225() -> Config:
    """MobileNetV1 as a chain of graphs with the edges of width x0.225, on CIFAR-10 (published: 89.7 %)."""
    return Config(
        recipe="cifar10_mobilenet_dnw_x225",
        data=_CIFAR10,
        model="mobilenet_v1_graphs",
        width=0.225,
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=1e-4, schedule="cosine"),
        epochs=160,
        batch_size=128,
    )


def cifar10_mobilenet_random_x225() -> Config:
    """The same with a random graph (published: 87.2 %)."""
    return _variant(cifar10_mobilenet_dnw_x225(), "cifar10_mobilenet_random_x225", rule="random")


def cifar10_mobilenet_x25() -> Config:
    """Plain MobileNetV1 of width x0.25 on CIFAR-10 (published: 86.3 %)."""
    return _variant(cifar10_mobilenet_dnw_x225(), "cifar10_mobilenet_x25", model="mobilenet_v1", width=0.25, rule="complete")


# --- ImageNet (section 4.3, table 3) ---


def imagenet_dnw_x225() -> Config:
    """MobileNetV1 as a chain of graphs with the edges of width x0.225, on ImageNet (published: 60.9 %)."""
    return Config(
        recipe="imagenet_dnw_x225",
        data=_IMAGENET,
        model="mobilenet_v1_graphs",
        width=0.225,
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=5e-5, schedule="cosine"),
        epochs=250,
        batch_size=512,
    )


def imagenet_dnw_x30() -> Config:
    """The same with the edges of width x0.3 (published: 65.0 %)."""
    return _variant(imagenet_dnw_x225(), "imagenet_dnw_x30", width=0.3)


def imagenet_dnw_x49() -> Config:
    """The same with the edges of width x0.49 (published: 70.4 %)."""
    return _variant(imagenet_dnw_x225(), "imagenet_dnw_x49", width=0.49)


def imagenet_dnw_small_x15() -> Config:
    """Small: the classifier's edges are learned too, width x0.15 (published: 50.3 %)."""
    return _variant(imagenet_dnw_x225(), "imagenet_dnw_small_x15", model="mobilenet_v1_graphs_small", width=0.15)


def imagenet_dnw_small_x225() -> Config:
    """Small: the classifier's edges are learned too, width x0.225 (published: 59.9 %)."""
    return _variant(imagenet_dnw_x225(), "imagenet_dnw_small_x225", model="mobilenet_v1_graphs_small")


def imagenet_random_x225() -> Config:
    """The chain with a random graph, width x0.225 (published: 53.3 %)."""
    return _variant(imagenet_dnw_x225(), "imagenet_random_x225", rule="random")


def imagenet_random_x49() -> Config:
    """The chain with the random graph that is published as x0.49, which has the edges of width x0.51 (published: 64.1 %)."""
    return _variant(imagenet_dnw_x225(), "imagenet_random_x49", rule="random", width=0.51)


_ALL = (
    *(digits, mnist),
    *(cifar10, cifar10_random, cifar10_random_original),
    *(cifar10_discrete, cifar10_discrete_random, cifar10_continuous, cifar10_continuous_random),
    *(cifar10_mobilenet_dnw_x225, cifar10_mobilenet_random_x225, cifar10_mobilenet_x25),
    *(imagenet_dnw_x225, imagenet_dnw_x30, imagenet_dnw_x49, imagenet_dnw_small_x15, imagenet_dnw_small_x225),
    *(imagenet_random_x225, imagenet_random_x49),
)

RECIPES: dict[str, Callable[[], Config]] = {recipe.__name__: recipe for recipe in _ALL}
"""Every recipe by name."""
