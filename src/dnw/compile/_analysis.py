"""What a network computes with which channels: which vary with the image, which are wanted, which are constant.

Contract: pure reading, in double precision, on the CPU. Three passes over a list of operators: forwards for what varies and for
the values of what does not, backwards for what is wanted, and forwards again to emit the instructions of what is both. A
channel that does not vary is folded into what reads it, as a map, because a constant node is not the same at the border as
inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dnw._checks import listing
from dnw._wiring.guard import EvaluationGuard
from dnw.compile._fold import folded
from dnw.compile._graph_operators import Begin, GraphOperator, Last
from dnw.compile._operators import OPERATORS, Average, Interface, Mix, Operator, Relu
from dnw.compile._program import Instruction, Pick, Program, Restore
from dnw.graphs import ContinuousTimeGraph, DiscreteTimeGraph, StaticGraph
from dnw.graphs._node import Node
from dnw.models import GraphChain, GraphClassifier

# --- from modules to operators ---


def _operators(module: nn.Module, name: str) -> Iterator[Operator]:
    """The operators of a module.

    Raises:
        ValueError: a module that is not compiled, by its name.
    """
    where = name or "the model"
    kind = next((kind for kind in (*_HOLDERS, *OPERATORS) if isinstance(module, kind)), None)
    if kind is None:
        raise _not_compiled(module, where)
    _require_nothing_of_its_own(module, kind, where)
    if kind in _HOLDERS:
        yield from _HOLDERS[kind](module, name)
    elif operator := OPERATORS[kind](module, where):
        yield operator


def _children(module: nn.Module, name: str, *children: str) -> Iterator[Operator]:
    """Those of some children, one after the other."""
    for child in children:
        yield from _operators(getattr(module, child), f"{name}.{child}".lstrip("."))


def _sequential(module: nn.Sequential, name: str) -> Iterator[Operator]:
    for child, inner in module._modules.items():  # a module that stands there twice runs twice
        assert inner is not None
        yield from _operators(inner, f"{name}.{child}".lstrip("."))


def _chain(module: GraphChain, name: str) -> Iterator[Operator]:
    yield from _children(module, name, "conv", "graphs", "norm", "relu")
    yield Average(0, None)
    yield from _children(module, name, "classifier")


def _static(graph: StaticGraph, name: str) -> Iterator[Operator]:
    nodes = [list(_operators(node, f"{name}.nodes.{i}".lstrip("."))) for i, node in enumerate(graph.nodes)]
    yield GraphOperator(graph, name, nodes)


def _unrolled(graph: DiscreteTimeGraph, name: str) -> Iterator[Operator]:
    if not graph.maps or graph.activation is not F.relu:
        raise _not_compiled(graph, name or "the model")
    yield Begin(graph)
    for _ in range(graph.steps):
        yield Relu()
        yield from _children(graph, name, "conv")
        yield Mix(graph.weight, None)
        yield from _children(graph, name, "norm")
    yield Last(graph.num_outputs)


_HOLDERS: dict[type[nn.Module], Callable[[Any, str], Iterable[Operator]]] = {
    GraphClassifier: lambda module, name: _children(module, name, "stem", "graph", "pool", "classifier"),
    Node: lambda module, name: _children(module, name, "norm", "relu", "conv"),
    GraphChain: _chain,
    nn.Sequential: _sequential,
    StaticGraph: _static,
    DiscreteTimeGraph: _unrolled,
}
"""Of modules that hold others: all operators of one, given it and its name."""


def _require_nothing_of_its_own(module: nn.Module, kind: type[nn.Module], where: str) -> None:
    """Raises ``ValueError`` where a module computes something else than its kind: by its class, or by hooks."""
    for method in ("forward", "_conv_forward"):
        own = module.__dict__.get(method) or getattr(type(module), method, None)
        if own is not getattr(kind, method, None):
            raise ValueError(f"{where} is a {type(module).__name__} with a {method} of its own, which is not compiled")
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(not isinstance(hook, EvaluationGuard) for hook in hooks):
        raise ValueError(f"{where} has forward hooks, which are not compiled; remove them first")


def _not_compiled(module: nn.Module, where: str) -> ValueError:
    if isinstance(module, ContinuousTimeGraph):
        what = "a graph in continuous time has as many evaluations as its solver takes; run it with PyTorch"
    elif isinstance(module, DiscreteTimeGraph):
        what = "compiled are graphs in discrete time on maps, with ReLU"
    else:
        kinds = tuple(kind.__name__ for kind in (StaticGraph, DiscreteTimeGraph, *OPERATORS))
        what = f"compiled are networks in nn.Sequential of {listing(kinds)} and the networks of dnw.models"
    return ValueError(f"{where} is a {type(module).__name__}, which is not compiled; {what}")


def is_of_graphs(model: nn.Module) -> bool:
    """Whether there are graphs in a model, and nothing but what is analysed here."""
    if not any(isinstance(module, (StaticGraph, DiscreteTimeGraph)) for module in model.modules()):
        return False
    try:
        return bool(list(_operators(model, "")))
    except ValueError:
        return False


# --- the three passes ---


class Analysis:
    """A network for inputs of one size, analysed.

    Args:
        model: any network of the kinds that are compiled, without wrappers, in any mode; it is read as in eval mode.
        input_size: channels, height and width of an input.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int]) -> None:
        self.input_size = input_size
        self.operators = list(_operators(model, ""))
        channels = input_size[0]
        x = Interface(torch.ones(channels, dtype=torch.bool), torch.zeros(input_size, dtype=torch.float64))
        self.interfaces = [x]
        for operator in self.operators:
            try:
                x = operator.forward(x)
            except (RuntimeError, IndexError) as error:
                size = "x".join(map(str, input_size))
                raise ValueError(f"the network does not take inputs of {size} ({str(error).splitlines()[0]})") from None
            self.interfaces.append(x)
        if x.pooled:
            raise ValueError("a network that ends with pooled maps is not compiled; end it with nn.Flatten()")
        self.kept = [x.varies]
        for operator in reversed(self.operators):
            self.kept.insert(0, operator.backward(self.kept[0]))

    def program(self) -> Program:
        """The instructions of what varies and is wanted."""
        instructions: list[Instruction] = []
        last = self.interfaces[-1]
        if bool(last.varies.any()):
            if not bool(self.kept[0].all()):
                instructions.append(Pick(self.kept[0].nonzero().flatten()))
            for operator, taken, sent in zip(self.operators, self.kept, self.kept[1:], strict=False):
                instructions += operator.emit(taken, sent)
        if not bool(last.varies.all()):
            instructions.append(Restore(last.varies.nonzero().squeeze(1), last.value.float()))
        return Program.chain(folded(instructions, self.input_size), self.input_size)

    def graphs(self) -> list[GraphOperator]:
        return [operator for operator in self.operators if isinstance(operator, GraphOperator)]
