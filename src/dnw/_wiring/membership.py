"""Whether wired parameters are still those of their model, and whether only their own optimizer steps them.

Contract: looks, and says so in one message. What it costs in a step is a few dictionary look-ups for each layer.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from dnw._checks import listing
from dnw._wiring.wired_layer import WiredLayer


class Owner(Protocol):
    """What is asked of a wiring here."""

    def steps_with(self, optimizer: Optimizer) -> bool:
        """Whether a step of this optimizer is, or is part of, a step of the wiring's own."""
        ...


WIRED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Weak references to the wirings, by wired parameter, so that none is wired twice."""


def owner_of(parameter: nn.Parameter) -> Owner | None:
    """The wiring of a parameter."""
    reference = WIRED.get(parameter)
    found: Owner | None = None if reference is None else reference()
    return found


class Members:
    """The wired parameters of a model, by where they were in it when it was wired."""

    def __init__(self, model: nn.Module, layers: Iterable[WiredLayer]) -> None:
        self._model = weakref.ref(model)
        wanted = {id(layer.parameter) for layer in layers}
        self._paths: dict[int, tuple[str, ...]] = {}
        for name, module in model.named_modules():
            for attribute, parameter in module._parameters.items():
                if id(parameter) in wanted:
                    self._paths.setdefault(id(parameter), (*filter(None, name.split(".")), attribute))

    @property
    def model(self) -> nn.Module | None:
        return self._model()

    def missing(self, layers: Iterable[WiredLayer]) -> list[str]:
        """The names of the layers whose parameters are no longer in the model; none where the model is gone."""
        model = self.model
        if model is None:
            return []
        lost = [layer for layer in layers if _at(model, self._paths[id(layer.parameter)]) is not layer.parameter]
        if lost:  # perhaps it has only moved, as where adapters are put around a layer
            held = {id(parameter) for parameter in model.parameters()}
            lost = [layer for layer in lost if id(layer.parameter) not in held]
        return [layer.name for layer in lost]


def _at(model: nn.Module, path: tuple[str, ...]) -> nn.Parameter | None:
    module: nn.Module | None = model
    for name in path[:-1]:
        module = None if module is None else module._modules.get(name)
    return None if module is None else module._parameters.get(path[-1])


def gone(names: Iterable[str]) -> str:
    """What to say of layers that are no longer in the model."""
    return (
        f"the model has other parameters in the place of {listing(names)} than those that were wired (a layer was replaced, "
        "say), and the new ones train dense; take the wiring off with wiring.remove() and wire again"
    )


def watch_other_optimizers() -> None:
    """From now on an optimizer that steps a parameter wired to another is refused: its writes would make it dense."""
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_refuse_another))


_watching: list[Any] = []


def _refuse_another(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if torch.compiler.is_compiling() or not WIRED:
        return
    if any(not owner.steps_with(optimizer) for owner in _owners(optimizer)):
        gc.collect()  # the wiring of an optimizer that is gone lives until its cycle is collected
        number = sum(not owner.steps_with(optimizer) for owner in _owners(optimizer))
        if number:
            raise RuntimeError(
                f"this {type(optimizer).__name__} steps {number} parameters that are wired to another optimizer, which would "
                "make them dense; leave them out of it, or take the wiring off first with wiring.remove()"
            )


def _owners(optimizer: Optimizer) -> Iterator[Owner]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            owner = owner_of(parameter) if parameter.grad is not None else None
            if owner is not None:
                yield owner
