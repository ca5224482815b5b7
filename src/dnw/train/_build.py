"""From names in a config to objects."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnw._rules import RULES
from dnw._rules.fixed import Complete, Frozen
from dnw._rules.rule import Rule
from dnw._selection.budgets import Global
from dnw._selection.patterns import Blocks, Channels, NOfM, Pattern
from dnw._selection.schedules import DensitySchedule
from dnw._wiring.parameters import unwrap_model
from dnw._wiring.wire import wire
from dnw._wiring.wiring import Wiring
from dnw.count import num_live_nodes
from dnw.data import Augment, Batches, FolderImages, InMemory, Streaming, load
from dnw.models import (
    GraphChain,
    mobilenet_v1,
    original_random_graph,
    resnet18_cifar,
    resnet50,
    tiny_cifar10,
    tiny_cifar10_continuous,
    tiny_cifar10_discrete,
    tiny_digits,
    tiny_mnist,
)
from dnw.train._config import RULE_SETTINGS, Config, OptimConfig

MODELS: dict[str, Callable[[Config, int], nn.Module]] = {
    "tiny_digits": lambda c, classes: tiny_digits(classes),
    "tiny_mnist": lambda c, classes: tiny_mnist(classes),
    "tiny_cifar10": lambda c, classes: tiny_cifar10(classes, rank_all_entries=c.rank_all_entries),
    "tiny_cifar10_discrete": lambda c, classes: tiny_cifar10_discrete(classes),
    "tiny_cifar10_continuous": lambda c, classes: tiny_cifar10_continuous(
        classes, solver=c.solver, solver_steps=c.solver_steps, adjoint=c.adjoint, rectify_in_place=c.rectify_in_place
    ),
    "mobilenet_v1_graphs": lambda c, classes: GraphChain(
        classes, image_stride=_image_stride(c), rank_all_entries=c.rank_all_entries
    ),
    "mobilenet_v1_graphs_small": lambda c, classes: GraphChain(
        classes, image_stride=_image_stride(c), learned_classifier=True, rank_all_entries=c.rank_all_entries
    ),
    "mobilenet_v1": lambda c, classes: mobilenet_v1(classes, width=c.width or 1.0, image_stride=_image_stride(c)),
    "resnet18_cifar": lambda c, classes: resnet18_cifar(classes),
    "resnet50": lambda c, classes: resnet50(classes),
}


def _image_stride(config: Config) -> int:
    """Of the first convolution of a MobileNet: small images are not halved there."""
    return 1 if config.data.image_size <= 64 else 2


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


def num_steps(config: Config, batches: Batches) -> int:
    """Optimizer steps of a whole run."""
    return config.epochs * batches.num_batches


def make_model(config: Config, num_classes: int) -> nn.Module:
    """The network, freshly initialised by the config's seed."""
    torch.manual_seed(config.seeds[0])
    return MODELS[config.model](config, num_classes)


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
    for rule in filter(None, (config.rule, config.baseline)):
        one, wired = config.model_copy(update={"rule": rule, "baseline": None}), copy.deepcopy(model)
        optimizer = torch.optim.SGD(wired.parameters(), lr=1.0, momentum=config.optim.momentum)
        wiring = wire_model(one, wired, optimizer, num_steps(config, batches))
        live, nodes = num_live_nodes(wired, wiring)
        if wiring.rule.fixed and nodes and not live:
            raise ValueError(
                f"rule={rule}, seed {config.seeds[0]}: with its {wiring.num_active:,} edges nothing can reach an output of the "
                "graph, and they never change; raise the budget or take another seed"
            )


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The parameters in one group, or in two where norms and biases do not decay."""
    if optim.decay_norms:
        return [{"params": list(model.parameters()), "weight_decay": optim.weight_decay}]
    plain = [p for p in model.parameters() if p.ndim > 1]
    return [
        {"params": plain, "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]


def wire_model(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int | None = None,
    edges: Mapping[str, Tensor] | None = None,
) -> Wiring:
    """Wires a model, wrapped or not, by the rule and with the budget of a config.

    Args:
        config: of the run.
        model, optimizer: to wire.
        steps: of the whole run, of which schedules take their share; without it the budget holds from the start.
        edges: of rule ticket; without them the largest weights are taken.
    """
    seed = config.seeds[0]
    common: dict[str, Any] = {"seed": seed, "exclude": config.dense}
    if config.rule == "complete":
        return wire(model, optimizer, rule=Complete(), **common)
    if config.rule == "random_original":
        assert config.num_edges is not None
        edges = {"graph.weight": original_random_graph(config.num_edges, seed)}
    if edges is not None:
        return wire(model, optimizer, rule=Frozen(dict(edges)), include=list(edges), seed=seed)
    common |= {"rule": _rule(config, steps), "pattern": _pattern(config.pattern), "schedule": _schedule(config, steps)}
    inner = unwrap_model(model)
    if isinstance(inner, GraphChain) and config.width is not None:
        budget = inner.num_edges(config.width)
        density: dict[str, float] = {"classifier.weight": config.width} if inner.classifier.bias is None else {}
        return wire(model, optimizer, density, num_edges=budget, include=[*budget, *density], **common)
    of_all = Global(config.density) if config.shared_budget and config.density is not None else config.density
    return wire(model, optimizer, of_all, num_edges=config.num_edges, **common)


def _rule(config: Config, steps: int | None) -> Rule:
    name = "dnw" if config.rule == "ticket" else config.rule
    settings = {
        k: v for k, v in config.rule_settings.model_dump().items() if v is not None and k in RULE_SETTINGS.get(name, ())
    }
    if "until" in settings:
        settings["until"] = None if steps is None else max(1, round(settings["until"] * steps))
    return RULES[name](**settings)


def _schedule(config: Config, steps: int | None) -> DensitySchedule | None:
    chosen = config.density_schedule
    if chosen.end is None or steps is None or RULES[config.rule]().fixed:
        return None
    end = max(1, round(chosen.end * steps))
    begin = min(end - 1, round(chosen.begin * steps))
    return DensitySchedule(end, begin=begin, every=chosen.every, initial=chosen.initial, power=chosen.power)


def _pattern(text: str | None) -> Pattern | None:
    if text is None:
        return None
    if text == "channels":
        return Channels()
    first, second = map(int, re.split("[:x]", text))
    return NOfM(first, second) if ":" in text else Blocks(first, second)
