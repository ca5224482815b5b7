"""What a network computes with which channels: which vary with the image, which are wanted, which are constant.

Contract: pure reading, in double precision, on the CPU. Three passes over a list of steps: forwards for what varies and for
the values of what does not, backwards for what is wanted, and forwards again to emit the instructions of what is both. A
channel that does not vary is folded into what reads it, as a map, because a constant node is not the same at the border as
inside.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from dnw._checks import listing
from dnw._wiring.guard import EvaluationGuard
from dnw._wiring.parameters import unwrap_model
from dnw.compile._fold import folded
from dnw.compile._program import Instruction, Pick, Program, Restore
from dnw.compile._steps import (
    Average,
    Begin,
    Channels,
    Depthwise,
    Flatten,
    GraphStep,
    Last,
    Mix,
    Norm,
    Relu,
    Step,
    pair,
)
from dnw.graphs import ContinuousTimeGraph, DiscreteTimeGraph, StaticGraph
from dnw.graphs._node import Node
from dnw.models import GraphChain, GraphClassifier, Window


def _steps(module: nn.Module, name: str) -> Iterator[Step]:
    """The steps of a module.

    Raises:
        ValueError: a module that is not compiled, by its name.
    """
    kind = next((kind for kind in _COMPILED if isinstance(module, kind)), None)
    where = name.strip(".") or "the model"
    if kind is None:
        raise ValueError(f"{where} is a {type(module).__name__}, which is not compiled; {_what(module)}")
    _require_nothing_of_its_own(module, kind, where)
    if kind in _CHILDREN:
        for child in _CHILDREN[kind]:
            yield from _steps(getattr(module, child), f"{name}.{child}")
    elif isinstance(module, GraphChain):
        for child in ("conv", "graphs", "norm", "relu"):
            yield from _steps(getattr(module, child), f"{name}.{child}")
        yield Average(0, None)
        yield from _steps(module.classifier, f"{name}.classifier")
    elif isinstance(module, nn.Sequential):
        for child, inner in module._modules.items():  # a module that stands there twice runs twice
            assert inner is not None
            yield from _steps(inner, f"{name}.{child}")
    elif isinstance(module, StaticGraph):
        nodes = [list(_steps(node, f"{name}.nodes.{i}")) for i, node in enumerate(module.nodes)]
        yield GraphStep(module, name.strip("."), nodes)
    elif isinstance(module, DiscreteTimeGraph):
        if not module.maps or module.activation is not F.relu:
            raise ValueError(f"{where} is a {type(module).__name__}, which is not compiled; {_what(module)}")
        yield from _unrolled(module, name)
    elif isinstance(module, nn.Conv2d):
        yield _convolution(module, name)
    elif isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
        yield Norm(module, name.strip("."))
    elif isinstance(module, nn.ReLU):
        yield Relu()
    elif isinstance(module, nn.Linear):
        yield Mix(module.weight, module.bias, on_numbers=True)
    elif isinstance(module, Window):
        yield Average(module.start, module.stop)
    elif isinstance(module, nn.AdaptiveAvgPool2d):
        if module.output_size not in (1, (1, 1)):
            raise ValueError(f"{where}: pooling to {module.output_size} places is not compiled; to one is")
        yield Average(0, None, pooled=True)
    elif isinstance(module, nn.Flatten):
        if (module.start_dim, module.end_dim) not in ((1, -1), (1, 3)):
            raise ValueError(
                f"{where}: flattening from {module.start_dim} to {module.end_dim} is not compiled; from 1 to -1 is"
            )
        yield Flatten()


_CHILDREN: dict[type[nn.Module], tuple[str, ...]] = {
    GraphClassifier: ("stem", "graph", "pool", "classifier"),
    Node: ("norm", "relu", "conv"),
}
"""Modules that run their children one after the other."""
_COMPILED: tuple[type[nn.Module], ...] = (
    *_CHILDREN,
    GraphChain,
    nn.Sequential,
    StaticGraph,
    DiscreteTimeGraph,
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.InstanceNorm2d,
    nn.ReLU,
    nn.Linear,
    Window,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
)


def _require_nothing_of_its_own(module: nn.Module, kind: type[nn.Module], where: str) -> None:
    """Raises ``ValueError`` where a module computes something else than its kind: by its class, or by hooks."""
    for method in ("forward", "_conv_forward"):
        own = module.__dict__.get(method) or getattr(type(module), method, None)
        if own is not getattr(kind, method, None):
            raise ValueError(f"{where} is a {type(module).__name__} with a {method} of its own, which is not compiled")
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(not isinstance(hook, EvaluationGuard) for hook in hooks):
        raise ValueError(f"{where} has forward hooks, which are not compiled; remove them first")


def _what(module: nn.Module) -> str:
    if isinstance(module, ContinuousTimeGraph):
        return "a graph in continuous time has as many evaluations as its solver takes; run it with PyTorch"
    if isinstance(module, DiscreteTimeGraph):
        return "compiled are graphs in discrete time on maps, with ReLU"
    kinds = tuple(kind.__name__ for kind in _COMPILED if kind not in (*_CHILDREN, GraphChain, nn.Sequential))
    return f"compiled are networks in nn.Sequential of {listing(kinds)} and the networks of dnw.models"


def _unrolled(graph: DiscreteTimeGraph, name: str) -> Iterator[Step]:
    yield Begin(graph)
    for _ in range(graph.steps):
        yield Relu()
        yield from _steps(graph.conv, f"{name}.conv")
        yield Mix(graph.weight, None)
        yield from _steps(graph.norm, f"{name}.norm")
    yield Last(graph.num_outputs)


def _convolution(module: nn.Conv2d, name: str) -> Step:
    same = module.groups == module.in_channels == module.out_channels
    if module.groups > 1 and not same:
        raise ValueError(
            f"{name.strip('.')}: convolutions in {module.groups} groups are not compiled; one or one per channel are"
        )
    if pair(module.dilation) != (1, 1) or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError(f"{name.strip('.')}: only convolutions without dilation, padded with a number of zeros, are compiled")
    if same:
        return Depthwise(module)
    return Mix(module.weight, module.bias, pair(module.stride), pair(module.padding))


# --- the three passes ---


class Analysis:
    """A network for inputs of one size, analysed.

    Args:
        model: any network of the kinds that are compiled, in any mode; it is read as in eval mode.
        input_size: channels, height and width of an input.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int]) -> None:
        self.input_size = input_size
        self.steps = list(_steps(unwrap_model(model), ""))
        channels = input_size[0]
        x = Channels(torch.ones(channels, dtype=torch.bool), torch.zeros(input_size, dtype=torch.float64))
        self.interfaces = [x]
        for step in self.steps:
            try:
                x = step.forward(x)
            except (RuntimeError, IndexError) as error:
                size = "x".join(map(str, input_size))
                raise ValueError(f"the network does not take inputs of {size} ({str(error).splitlines()[0]})") from None
            self.interfaces.append(x)
        if x.pooled:
            raise ValueError("a network that ends with pooled maps is not compiled; end it with nn.Flatten()")
        self.kept = [x.varies]
        for step in reversed(self.steps):
            self.kept.insert(0, step.backward(self.kept[0]))

    def program(self) -> Program:
        """The instructions of what varies and is wanted."""
        instructions: list[Instruction] = []
        last = self.interfaces[-1]
        if bool(last.varies.any()):
            if not bool(self.kept[0].all()):
                instructions.append(Pick(self.kept[0].nonzero().flatten()))
            for step, taken, given in zip(self.steps, self.kept, self.kept[1:], strict=False):
                instructions += step.emit(taken, given)
        if not bool(last.varies.all()):
            instructions.append(Restore(last.varies.nonzero().squeeze(1), last.value.float()))
        return Program(folded(instructions, self.input_size), self.input_size)

    def graphs(self) -> list[GraphStep]:
        return [step for step in self.steps if isinstance(step, GraphStep)]
