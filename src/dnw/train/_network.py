"""From a config to its network: the model that it names, with an optimizer and a wiring; fresh, or from a run's files.

Contract: whoever needs the network of a run gets it here: training, testing, counting, compiling. The same config and classes
give the same weights, and nobody's random generator moves on for them.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dnw._rules import RULES
from dnw._rules.fixed import Frozen
from dnw._rules.rule import Rule
from dnw._selection.budgets import Floor, Global, num_edges
from dnw._selection.patterns import Blocks, Channels, NOfM, Pattern
from dnw._selection.schedules import DensitySchedule
from dnw._wiring.state import STATE_KEYS
from dnw._wiring.wire import wire
from dnw._wiring.wiring import Wiring
from dnw.graphs import StaticGraph, barabasi_albert, watts_strogatz
from dnw.models import (
    GraphChain,
    densenet_small,
    expander_edges,
    lenet_300_100,
    mnasnet_small,
    mobilenet_v1,
    mobilenet_v2,
    original_random_graph,
    resnet18_cifar,
    resnet50,
    shufflenet_v1,
    shufflenet_v2,
    tiny_cifar10,
    tiny_cifar10_continuous,
    tiny_cifar10_discrete,
    tiny_digits,
    tiny_mnist,
)
from dnw.models._pretrained import read_network
from dnw.recipes._config import Config
from dnw.recipes._settings import RANDWIRE, SHARES_OF_THE_RUN, OptimConfig
from dnw.train._checkpoint import Start, read_checkpoint, read_ticket, write_checkpoint
from dnw.train._run import RunDirectory

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from dnw.train._processes import Alone

MODELS: dict[str, Callable[[Config, int], nn.Module]] = {
    "tiny_digits": lambda c, classes: tiny_digits(classes),
    "tiny_mnist": lambda c, classes: tiny_mnist(classes),
    "lenet_300_100": lambda c, classes: lenet_300_100(classes, c.data.image_size),
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
    "mobilenet_v2": lambda c, classes: mobilenet_v2(classes, width=c.width or 1.0, image_stride=_image_stride(c)),
    "shufflenet_v1": lambda c, classes: shufflenet_v1(classes, width=c.width or 1.0, image_stride=_image_stride(c)),
    "shufflenet_v2": lambda c, classes: shufflenet_v2(classes, width=c.width or 1.0, image_stride=_image_stride(c)),
    "mnasnet_small": lambda c, classes: mnasnet_small(classes, image_stride=_image_stride(c)),
    "xception_small": lambda c, classes: shufflenet_v1(classes, width=c.width or 1.0, groups=1, image_stride=_image_stride(c)),
    "densenet_small": lambda c, classes: densenet_small(classes, width=c.width or 1.0, image_stride=_image_stride(c)),
    "resnet18_cifar": lambda c, classes: resnet18_cifar(classes, width=c.width or 1.0),
    "resnet50": lambda c, classes: resnet50(classes),
}
Checkpoint = Literal["best", "last"]


def _image_stride(config: Config) -> int:
    """Of the first convolution of a network for large images: small images are not halved there."""
    return 1 if config.data.image_size <= 64 else 2


@dataclass(frozen=True, eq=False)
class Network:
    """The network of a single run: a model, its optimizer and its wiring.

    Attributes:
        config: of the single run.
        num_classes: that the model tells apart.
        model: with the weights that its rule trains with; ``with wiring.settled()`` for those it evaluates with.
        optimizer: that trains it.
        wrapped_model, wrapped_optimizer: the two as they are called in training, which may be wrapped.
        wiring: of the model.
        epoch, step: how far its weights are trained, in epochs and optimizer steps; 0 where the run begins.
        ages: since when its edges are there (:meth:`dnw.view.Recorder.state_dict`), where the checkpoint says it.
    """

    config: Config
    num_classes: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    wrapped_model: nn.Module
    wrapped_optimizer: torch.optim.Optimizer
    wiring: Wiring
    epoch: int = 0
    step: int = 0
    ages: Any = None

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that it takes."""
        return self.config.data.input_size

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The probability of each class, in single precision.

        Args:
            images: ``[batch, channels, height, width]``, uint8, or floating-point from 0 to 1; normalised here.

        Returns:
            ``[batch, classes]`` on the CPU.

        Raises:
            ValueError: images of another kind or size.
        """
        images = torch.as_tensor(images)
        size, data = self.input_size, self.config.data
        whole = images.dtype == torch.uint8
        if images.ndim != 4 or tuple(images.shape[1:]) != size or not (whole or images.is_floating_point()):
            wanted = "x".join(map(str, size))
            given = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"images are {given}; expected [batch, {wanted}], uint8, or floating-point from 0 to 1")
        device, modes = next(self.model.parameters()).device, {module: module.training for module in self.model.modules()}
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (data.mean, data.std))
        try:
            with self.wiring.settled():
                parts = [
                    self.model.eval()((part.to(device).float() / (255 if whole else 1) - mean) / std).softmax(1).cpu()
                    for part in images.split(256)
                ]
        finally:
            for module, training in modes.items():
                module.training = training
        return torch.cat(parts) if parts else torch.empty(0, self.num_classes)

    def save(self, file: Path, epoch: int, step: int, ages: Any = None) -> None:
        """Writes a checkpoint of the weights as they are now, after so many epochs and steps."""
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": epoch,
            "step": step,
            "num_classes": self.num_classes,
            "config": self.config.model_dump(mode="json"),
        }
        if ages is not None:
            content["ages"] = ages
        write_checkpoint(file, content)

    def is_finite(self) -> bool:
        """Whether all weights are, the latent ones too."""
        weights = [*self.model.state_dict().values(), *(parameter.latent for parameter in self.wiring.values())]
        return bool(torch.stack([torch.isfinite(weight).all() for weight in weights]).all())


def load_network(
    run: RunDirectory,
    config: Config,
    checkpoint: Checkpoint | None = "last",
    *,
    num_classes: int | None = None,
    steps: int | None = None,
    fabric: Fabric | Alone | None = None,
) -> Network:
    """The network of a single run as it is stored.

    Args:
        run: the directory of the single run.
        config: of it.
        checkpoint: whose weights the network gets; None for those that the run begins with.
        num_classes: into how many the images fall that it is meant for; by default as many as the run has.
        steps: of the whole run on those images; by default as many as the checkpoint goes by.
        fabric: what wraps model and optimizer for training.

    Raises:
        ValueError: no such checkpoint, a damaged one, or one that does not fit; the file is named.
    """
    if checkpoint is not None and run.network.exists() and not run.last.exists():
        if checkpoint == "best":
            raise ValueError(f"{run.path}: is a result that was kept, of which the last weights are there, not the best ones")
        return _kept_network(run.network, config, num_classes, fabric)
    start = read_ticket(run.ticket) if config.edges == "ticket" else None
    if checkpoint is None:
        classes = num_classes or num_classes_of_run(run)
        if classes is None:
            raise ValueError(f"{run.path}: nothing in it says how many classes there are; give num_classes")
        return make_network(config, classes, start, steps=steps, fabric=fabric)
    file = run.best if checkpoint == "best" else run.last
    if not file.exists():
        raise ValueError(f"{run.path}: no {file.name} yet; dnw resume {run.path} trains on")
    content = read_checkpoint(file, config)
    epoch, step, classes = content["epoch"], content["step"], content["num_classes"]
    if num_classes not in (None, classes):
        raise ValueError(f"{file}: it tells {classes} classes apart, and the data has {num_classes}")
    if steps is None and step:
        steps = step // epoch * config.epochs
    elif steps is not None and step and step != epoch * steps // config.epochs:
        raise ValueError(
            f"{file}: it was trained on {step // epoch:,} batches an epoch, and the data now gives {steps // config.epochs:,}; "
            "continue with the same images and number of processes"
        )
    network = make_network(config, classes, start, steps=steps, fabric=fabric)
    try:
        _fill(network, content["model"], content["optimizer"])
    except Exception as error:  # whatever a file that is none of ours makes PyTorch stumble over
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: does not fit the run's config ({reason})") from None
    return dataclasses.replace(network, epoch=epoch, step=step, ages=content.get("ages"))


def _kept_network(file: Path, config: Config, num_classes: int | None, fabric: Fabric | Alone | None) -> Network:
    """A network of which no more is kept than its weights: its edges are those that it has."""
    stored = read_network(file)
    if num_classes not in (None, stored.num_classes):
        raise ValueError(f"{file}: it tells {stored.num_classes} classes apart, and the data has {num_classes}")
    start = Start(stored.weights, stored.edges, str(file))
    try:
        network = make_network(config, stored.num_classes, start, fabric=fabric)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: does not fit the run's config ({str(error).splitlines()[0]})") from None
    return dataclasses.replace(network, epoch=stored.epoch, step=stored.step)


def num_classes_of_run(run: RunDirectory) -> int | None:
    """How many classes a run has; of an older one, which does not say it, by its checkpoint, and None before its first."""
    stored: int | None = run.environment().get("num_classes")
    return read_checkpoint(run.last)["num_classes"] if stored is None and run.last.exists() else stored


def make_network(
    config: Config,
    num_classes: int,
    start: Start | None = None,
    *,
    steps: int | None = None,
    fabric: Fabric | Alone | None = None,
) -> Network:
    """The network of a config as its run begins.

    Args:
        config: of a single run.
        num_classes: that it tells apart.
        start: what it begins with; by default weights that the seed gives, and the edges that the rule chooses. Those of a
            ticket that is not at hand are the largest weights, too.
        steps: of the whole run, of which schedules take their part; without it the budget holds from the start.
        fabric: what wraps model and optimizer for training, before they are wired.

    Raises:
        ValueError: a start of another network, or a budget or rule that does not fit this one.
    """
    model = make_model(config, num_classes)
    edges = None if start is None else start.edges
    if start is not None:
        try:
            model.load_state_dict(start.weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{start.source}: its weights are those of another network ({reason})") from None
    elif config.edges == "random_original":
        assert config.num_edges is not None
        edges = {"graph.weight": original_random_graph(config.num_edges, config.seed)}
    elif config.edges == "expander":
        assert config.density is not None
        edges = expander_edges(model, config.density, config.seed)
    elif config.edges in RANDWIRE:
        edges = _randwire(config, model)
    optim = config.optim
    fused = True if fabric is None or fabric.device.type == "cpu" else None  # few passes over memory
    optimizer = torch.optim.SGD(_parameter_groups(model, optim), lr=optim.lr, momentum=optim.momentum, fused=fused)
    wrapped_model, wrapped_optimizer = (model, optimizer) if fabric is None else fabric.setup(model, optimizer)
    scheduled = None if steps is None else steps // config.epochs * config.first_epochs
    told = _told(config, model, scheduled, edges)
    wiring = wire(wrapped_model, wrapped_optimizer, **told)
    return Network(config, num_classes, model, optimizer, wrapped_model, wrapped_optimizer, wiring)


def make_model(config: Config, num_classes: int) -> nn.Module:
    """The model of a config with the weights that its seed gives."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # that of the CPU alone, where models are made
        return MODELS[config.model](config, num_classes)


def _randwire(config: Config, model: nn.Module) -> dict[str, Tensor]:
    """The edges of each static graph, as many as its budget, drawn with the run's seed."""
    draw = watts_strogatz if config.edges == "watts_strogatz" else barabasi_albert
    budgets = model.num_edges(config.width) if isinstance(model, GraphChain) and config.width is not None else {}
    edges: dict[str, Tensor] = {}
    for name, graph in model.named_modules():
        if isinstance(graph, StaticGraph):
            candidates = int(graph.edge_candidates()["weight"].sum())
            of_all = config.num_edges or num_edges(config.density or 1.0, candidates)
            budget = budgets.get(f"{name}.weight", of_all)
            edges[f"{name}.weight"] = draw(graph, budget, seed=config.seed)
    return edges


def _parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The parameters in one group, or in two where norms and biases do not decay."""
    if optim.decay_norms:
        return [{"params": list(model.parameters()), "weight_decay": optim.weight_decay}]
    plain = [p for p in model.parameters() if p.ndim > 1]
    return [
        {"params": plain, "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _told(config: Config, model: nn.Module, steps: int | None, edges: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """What ``dnw.wire`` is told beside the model and its optimizer."""
    if edges is not None:
        return {"rule": Frozen(dict(edges)), "include": list(edges), "seed": config.seed}
    rule = _rule(config, steps)
    dormant = dataclasses.replace(rule.dormant, **config.dormant.given())
    told: dict[str, Any] = {"rule": rule, "seed": config.seed, "exclude": config.dense, "dormant": dormant}
    if config.rule == "complete":
        return told
    told |= {"pattern": _pattern(config.pattern), "schedule": _schedule(config, steps)}
    told["floor"] = Floor(**config.floor.model_dump())
    if isinstance(model, GraphChain) and config.width is not None:
        budget = model.num_edges(config.width)
        density: dict[str, float] = {"classifier.weight": config.width} if model.classifier.bias is None else {}
        return told | {"density": density, "num_edges": budget, "include": [*budget, *density]}
    of_all = Global(config.density) if config.shared_budget and config.density is not None else config.density
    return told | {"density": of_all, "num_edges": config.num_edges}


def _rule(config: Config, steps: int | None) -> Rule:
    name = "dnw" if config.rule == "frozen" else config.rule  # a ticket's edges are the largest, as those of DNW
    settings = config.rule_settings.given()
    for key in settings.keys() & set(SHARES_OF_THE_RUN):
        settings[key] = None if steps is None else max(1, round(settings[key] * steps))
    return RULES[name](**settings)


def _schedule(config: Config, steps: int | None) -> DensitySchedule | None:
    chosen = config.density_schedule
    if chosen.end is None or steps is None:
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


def _fill(network: Network, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Takes over the weights and the optimizer's state of a checkpoint; raises whatever where they do not fit."""
    model, optimizer = network.model, network.optimizer
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    for name, own in model.state_dict().items():
        if name in weights and weights[name].dtype != own.dtype:
            raise ValueError(f"{name} is {weights[name].dtype}, not {own.dtype}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the loaded optimizer state")  # says that latent weights are missing
        model.load_state_dict(weights)  # first: the optimizer's latent weights then count
        optimizer.load_state_dict(state)
    for group, own_settings in zip(optimizer.param_groups, settings, strict=True):
        group.update(own_settings)  # what the config says counts, whatever stands in the file
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            if key in STATE_KEYS or value is None:
                continue
            if not isinstance(value, Tensor) or value.shape != parameter.shape or not bool(torch.isfinite(value).all()):
                raise ValueError(f"the optimizer's {key} is no tensor of finite numbers of the parameter's shape")
