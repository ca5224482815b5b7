"""Recipes. The first line of each docstring is what ``dnw recipes`` shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dnw._checks import one_of
from dnw._files import read_text
from dnw.recipes._config import MOST_BYTES, Config, config_from_json
from dnw.recipes._settings import DataConfig, OptimConfig

_CIFAR10 = DataConfig(
    name="cifar10", image_size=32, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262), crop_padding=4, flip=True
)
_IMAGENET = DataConfig(name="folder", image_size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def _variant(config: Config, recipe: str, **changes: object) -> Config:
    return config.model_copy(update={"recipe": recipe, **changes})


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


def mnist_mlp() -> Config:
    """An ordinary multilayer perceptron (LeNet-300-100) on MNIST with 2 % of the weights of every layer."""
    return _variant(mnist(), "mnist_mlp", model="lenet_300_100", num_edges=None, density=0.02)


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


def cifar10_best() -> Config:
    """The tiny classifier by NormSTE at full rate, its density falling from 1 to 32,000 edges over the first half."""
    return _variant(
        cifar10(),
        "cifar10_best",
        rule="norm_ste",
        rule_settings={"rate": 1.0},
        floor={"per_target": 1},
        density_schedule={"end": 0.5, "every": 10},
    )


def cifar10_random() -> Config:
    """The tiny classifier with a random graph all of whose edges can be used."""
    return _variant(cifar10(), "cifar10_random", rule="random")


def cifar10_random_original() -> Config:
    """The tiny classifier with a random graph as the authors draw it: about 27,000 usable edges (published: 76.1 %)."""
    return _variant(cifar10(), "cifar10_random_original", rule="frozen", edges="random_original", rank_all_entries=True)


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
    """The chain with a random graph (published: 87.2 %)."""
    return _variant(cifar10_mobilenet_dnw_x225(), "cifar10_mobilenet_random_x225", rule="random")


def cifar10_mobilenet_x25() -> Config:
    """Plain MobileNetV1 of width x0.25 on CIFAR-10 (published: 86.3 %)."""
    return _variant(cifar10_mobilenet_dnw_x225(), "cifar10_mobilenet_x25", model="mobilenet_v1", width=0.25, rule="complete")


def _chain(rule: str, **changes: object) -> Config:
    return _variant(cifar10_mobilenet_dnw_x225(), f"cifar10_mobilenet_{rule}_x225", rule=rule, **changes)


def cifar10_mobilenet_no_update_x225() -> Config:
    """The chain without the update rule: dormant edges get no gradient (published: 86.7 %)."""
    return _chain("no_update")


def cifar10_mobilenet_l1_anneal_x225() -> Config:
    """The chain by an L1 penalty and pruning over the first half (published: 84.3 %; the settings are ours)."""
    return _chain("l1_anneal", rule_settings={"penalty": 1e-4}, density_schedule={"end": 0.5, "every": 10})


def cifar10_mobilenet_targeted_dropout_x225() -> Config:
    """The chain by targeted dropout, rate 0.95 (published: 89.2 %)."""
    return _chain("targeted_dropout", rule_settings={"rate": 0.95})


def cifar10_mobilenet_complete() -> Config:
    """The complete graph, all edges used: the first stage of the next two."""
    return _variant(cifar10_mobilenet_dnw_x225(), "cifar10_mobilenet_complete", rule="complete", width=None)


def cifar10_mobilenet_lottery_x225() -> Config:
    """The one-shot lottery ticket of a run of the complete graph: give ticket.run=RUN (published: 87.9 %)."""
    return _variant(cifar10_mobilenet_dnw_x225(), "cifar10_mobilenet_lottery_x225", rule="frozen", edges="ticket")


def cifar10_mobilenet_fine_tune_x225() -> Config:
    """The largest weights of a run of the complete graph, trained on at a learning rate of 0.01: give ticket.run=RUN."""
    base = cifar10_mobilenet_dnw_x225()
    optim = base.optim.model_copy(update={"lr": 0.01})
    ticket = {"rewind": False}
    return _variant(base, "cifar10_mobilenet_fine_tune_x225", rule="frozen", edges="ticket", ticket=ticket, optim=optim)


# --- the field's rules on the same network, budget and schedule ---


def cifar10_mobilenet_magnitude_pruning_x225() -> Config:
    """The chain by gradual magnitude pruning: a cubic schedule over the first three quarters."""
    return _chain("magnitude_pruning", density_schedule={"end": 0.75, "every": 100})


def cifar10_mobilenet_set_x225() -> Config:
    """The chain by sparse evolutionary training (SET): random edges come."""
    return _chain("set", rule_settings={"every": 100, "until": 0.75})


def cifar10_mobilenet_rigl_x225() -> Config:
    """The chain by RigL: edges come where the gradient is largest."""
    return _chain("rigl", rule_settings={"every": 100, "until": 0.75})


def cifar10_mobilenet_sparse_momentum_x225() -> Config:
    """The chain by sparse momentum (Sparse networks from scratch), which moves edges between the graphs."""
    return _chain("sparse_momentum", rule_settings={"every": 391, "until": 1.0})


def cifar10_mobilenet_sr_ste_x225() -> Config:
    """The chain by the sparse-refined straight-through estimator (SR-STE), in which dormant edges decay."""
    return _chain("sr_ste")


def cifar10_mobilenet_best_x225() -> Config:
    """The chain by NormSTE at full rate, its density falling from 1 to the budget over the first half."""
    return _variant(
        _chain("norm_ste"),
        "cifar10_mobilenet_best_x225",
        rule_settings={"rate": 1.0},
        floor={"per_target": 1},
        density_schedule={"end": 0.5, "every": 10},
    )


def cifar10_mobilenet_st3_x225() -> Config:
    """The chain by ST-3, with its cubic schedule over the first half."""
    return _chain("st3", density_schedule={"end": 0.5})


def cifar10_mobilenet_feather_x225() -> Config:
    """The chain by Feather, with its cubic schedule over the first half."""
    return _chain("feather", density_schedule={"end": 0.5})


def cifar10_mobilenet_top_kast_x225() -> Config:
    """The chain by Top-KAST, with a backward set of three times as many edges."""
    return _chain("top_kast", rule_settings={"backward": 3.0})


# --- sparse training of ResNets (section 4.4) ---


def cifar10_resnet18() -> Config:
    """ResNet-18 for small images on CIFAR-10, dense."""
    return Config(
        recipe="cifar10_resnet18",
        data=_CIFAR10,
        model="resnet18_cifar",
        rule="complete",
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=5e-4, decay_norms=False, schedule="cosine"),
        epochs=100,
        batch_size=128,
    )


def cifar10_resnet18_dnw() -> Config:
    """ResNet-18 with 10 % of the weights of every layer; dnw sweep takes more: --over density=0.05,0.1,0.2."""
    return _variant(cifar10_resnet18(), "cifar10_resnet18_dnw", rule="dnw", density=0.1)


def imagenet_resnet50() -> Config:
    """ResNet-50 on ImageNet, dense (published: 77.5 %)."""
    return Config(
        recipe="imagenet_resnet50",
        data=_IMAGENET,
        model="resnet50",
        rule="complete",
        optim=OptimConfig(
            lr=0.256,
            momentum=0.875,
            weight_decay=2**-15,
            decay_norms=False,
            label_smoothing=0.1,
            schedule="cosine",
            warmup_epochs=5,
            per_epoch=True,
        ),
        epochs=100,
        batch_size=256,
    )


def imagenet_resnet50_dnw() -> Config:
    """ResNet-50 with 10 % of the weights of every layer (published: 74.0 %; 20 %: 76.2 %, 30 %: 76.9 %)."""
    return _variant(imagenet_resnet50(), "imagenet_resnet50_dnw", rule="dnw", density=0.1)


def imagenet_resnet50_dnw_first_dense() -> Config:
    """ResNet-50 with 10 % of the weights and a dense first layer (published: 75.0 %; 20 %: 76.6 %, 30 %: 77.1 %)."""
    return _variant(imagenet_resnet50_dnw(), "imagenet_resnet50_dnw_first_dense", dense=("conv1.weight",))


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
    """The chain with the edges of width x0.3 (published: 65.0 %)."""
    return _variant(imagenet_dnw_x225(), "imagenet_dnw_x30", width=0.3)


def imagenet_dnw_x49() -> Config:
    """The chain with the edges of width x0.49 (published: 70.4 %)."""
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


# --- the peers of that table, at the same settings ---


def _peer(name: str, model: str, width: float | None = None) -> Config:
    return _variant(imagenet_dnw_x225(), f"imagenet_{name}", model=model, width=width, rule="complete")


def imagenet_mobilenet_x25() -> Config:
    """MobileNetV1 x0.25 (published: 50.6 %)."""
    return _peer("mobilenet_x25", "mobilenet_v1", 0.25)


def imagenet_mobilenet_x50() -> Config:
    """MobileNetV1 x0.5 (published: 63.7 %)."""
    return _peer("mobilenet_x50", "mobilenet_v1", 0.5)


def imagenet_expander_x50() -> Config:
    """X-4 MobileNetV1: an expander, every target of a 1x1 convolution reads a quarter of its sources (published: 54.0 %)."""
    return _variant(imagenet_mobilenet_x50(), "imagenet_expander_x50", rule="frozen", edges="expander", density=0.25)


def imagenet_mobilenet_v2_x15() -> Config:
    """MobileNetV2 x0.15 (published: 44.9 %; torchvision's, extra vision)."""
    return _peer("mobilenet_v2_x15", "mobilenet_v2", 0.15)


def imagenet_mobilenet_v2_x40() -> Config:
    """MobileNetV2 x0.4 at 160 px, as it was counted (published: 56.6 %; torchvision's, extra vision)."""
    return _smaller(_peer("mobilenet_v2_x40", "mobilenet_v2", 0.4), 160)


def imagenet_mobilenet_v2_x60() -> Config:
    """MobileNetV2 x0.6 (published: 66.6 %; torchvision's, extra vision)."""
    return _peer("mobilenet_v2_x60", "mobilenet_v2", 0.6)


def imagenet_mobilenet_v2_x75() -> Config:
    """MobileNetV2 x0.75 at 192 px, as it was counted (published: 67.9 %; torchvision's, extra vision)."""
    return _smaller(_peer("mobilenet_v2_x75", "mobilenet_v2", 0.75), 192)


def _smaller(config: Config, image_size: int) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"image_size": image_size})})


def imagenet_densenet_x50() -> Config:
    """A DenseNet of 42M multiply-adds (published: 41.1 %; torchvision's, extra vision)."""
    return _peer("densenet_x50", "densenet_small", 0.5)


def imagenet_densenet_x100() -> Config:
    """A DenseNet of 142M multiply-adds (published: 54.8 %; torchvision's, extra vision)."""
    return _peer("densenet_x100", "densenet_small", 1.0)


def imagenet_xception_x50() -> Config:
    """Xception-like, which is ShuffleNet in one group, x0.5 (published: 55.1 %)."""
    return _peer("xception_x50", "xception_small", 0.5)


def imagenet_xception_x100() -> Config:
    """Xception-like, which is ShuffleNet in one group, x1 (published: 65.9 %)."""
    return _peer("xception_x100", "xception_small", 1.0)


def imagenet_shufflenet_v1_x50() -> Config:
    """ShuffleNetV1 x0.5 in three groups (published: 56.8 %)."""
    return _peer("shufflenet_v1_x50", "shufflenet_v1", 0.5)


def imagenet_shufflenet_v1_x100() -> Config:
    """ShuffleNetV1 x1 in three groups (published: 67.4 %)."""
    return _peer("shufflenet_v1_x100", "shufflenet_v1", 1.0)


def imagenet_shufflenet_v2_x50() -> Config:
    """ShuffleNetV2 x0.5 (published: 60.3 %; torchvision's, extra vision)."""
    return _peer("shufflenet_v2_x50", "shufflenet_v2", 0.5)


def imagenet_shufflenet_v2_x100() -> Config:
    """ShuffleNetV2 x1 (published: 69.4 %; torchvision's, extra vision)."""
    return _peer("shufflenet_v2_x100", "shufflenet_v2", 1.0)


def imagenet_mnasnet() -> Config:
    """MnasNet-search1 (published: 64.9 %; timm's MnasNet-Small, extra vision)."""
    return _peer("mnasnet", "mnasnet_small")


GROUPS: dict[str, tuple[Callable[[], Config], ...]] = {
    "small, to begin with": (digits, mnist, mnist_mlp),
    "tiny classifiers on CIFAR-10 (table 1)": (
        *(cifar10, cifar10_best, cifar10_random, cifar10_random_original),
        *(cifar10_discrete, cifar10_discrete_random, cifar10_continuous, cifar10_continuous_random),
    ),
    "ways of finding a wiring: MobileNetV1 as graphs on CIFAR-10 (table 2, and what came later)": (
        *(cifar10_mobilenet_dnw_x225, cifar10_mobilenet_random_x225, cifar10_mobilenet_x25),
        *(cifar10_mobilenet_no_update_x225, cifar10_mobilenet_l1_anneal_x225, cifar10_mobilenet_targeted_dropout_x225),
        *(cifar10_mobilenet_complete, cifar10_mobilenet_lottery_x225, cifar10_mobilenet_fine_tune_x225),
        *(cifar10_mobilenet_magnitude_pruning_x225, cifar10_mobilenet_set_x225, cifar10_mobilenet_rigl_x225),
        *(cifar10_mobilenet_sparse_momentum_x225, cifar10_mobilenet_sr_ste_x225, cifar10_mobilenet_st3_x225),
        *(cifar10_mobilenet_feather_x225, cifar10_mobilenet_top_kast_x225, cifar10_mobilenet_best_x225),
    ),
    "sparse ResNets": (
        *(cifar10_resnet18, cifar10_resnet18_dnw),
        *(imagenet_resnet50, imagenet_resnet50_dnw, imagenet_resnet50_dnw_first_dense),
    ),
    "MobileNetV1 as graphs on ImageNet (table 3)": (
        *(imagenet_dnw_x225, imagenet_dnw_x30, imagenet_dnw_x49, imagenet_dnw_small_x15, imagenet_dnw_small_x225),
        *(imagenet_random_x225, imagenet_random_x49),
    ),
    "the networks beside them in that table": (
        *(imagenet_mobilenet_x25, imagenet_mobilenet_x50, imagenet_expander_x50),
        *(imagenet_mobilenet_v2_x15, imagenet_mobilenet_v2_x40, imagenet_mobilenet_v2_x60, imagenet_mobilenet_v2_x75),
        *(imagenet_densenet_x50, imagenet_densenet_x100, imagenet_xception_x50, imagenet_xception_x100),
        *(imagenet_shufflenet_v1_x50, imagenet_shufflenet_v1_x100, imagenet_shufflenet_v2_x50, imagenet_shufflenet_v2_x100),
        imagenet_mnasnet,
    ),
}
"""The recipes by what they are for."""
RECIPES: dict[str, Callable[[], Config]] = {recipe.__name__: recipe for group in GROUPS.values() for recipe in group}
"""Every recipe by name."""


def config_of(recipe: str | Path | Config) -> Config:
    """The config of a recipe by its name, of a stored ``config.json`` by its path, or a config as it is.

    Raises:
        ValueError: no such recipe, or a file that holds no valid config.
        OSError: no such file.
    """
    if isinstance(recipe, Config):
        return recipe
    name = str(recipe)
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".json"):
        return config_from_json(read_text(Path(name), MOST_BYTES), name)
    raise ValueError(f"no recipe {name!r}{one_of(name, RECIPES)}, or give the path of a config.json")
