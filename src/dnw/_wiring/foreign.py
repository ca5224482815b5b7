"""Optimizers of others: wrappers around an optimizer, and methods beside ``step`` that write to parameters.

Contract: says of an optimizer what it is, by what it has. Nothing here needs the packages that they come from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import LBFGS, Optimizer

_LAUNCHERS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
"""Packages whose wrappers of an optimizer only pass a step on, or leave it out."""
_PARTS = ("first_step", "second_step", "third_step")
"""Methods that make a step in parts, between which gradients are computed anew: SAM and its kin."""
_AVERAGING = ("eval", "train")
"""Methods that put an average in the place of the parameters, and take it away again: Schedule-Free and its kin."""


def inside_launchers(optimizer: object) -> object:
    """The user's optimizer inside the wrappers of launch libraries, and inside whatever has no step of its own."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer) and (
        not isinstance(optimizer, Optimizer)
        or type(optimizer).step is Optimizer.step
        or type(optimizer).__module__.partition(".")[0] in _LAUNCHERS
    ):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def refuse(optimizer: Optimizer) -> None:
    """Raises ``ValueError`` for optimizers whose writes nothing can surround."""
    name = type(optimizer).__name__
    if hasattr(optimizer, "fused_backward"):
        raise ValueError(f"{name} steps inside the backward pass, where no wiring can be; take one that steps in step()")
    if hasattr(optimizer, "sampled_params"):
        raise ValueError(f"{name} draws other weights for every forward pass, beside the wiring; take one that does not")


def chain(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those inside it that step the same parameters (Lookahead, SAM), the outermost first."""
    found = [optimizer]
    while True:
        held = {id(p) for group in found[-1].param_groups for p in group["params"]}
        inner = [x for x in _attributes(found[-1]) if any(id(p) in held for group in x.param_groups for p in group["params"])]
        if not inner or inner[0] in found:
            return found
        found.append(inner[0])


def _attributes(optimizer: Optimizer) -> Iterator[Optimizer]:
    if not any(c.__name__ == "ZeroRedundancyOptimizer" for c in type(optimizer).__mro__):  # see _ranks.local_optimizer
        yield from (value for value in vars(optimizer).values() if isinstance(value, Optimizer))


def has_state_hooks(optimizer: Optimizer) -> bool:
    """Whether hooks on its state dict can be registered: some wrappers leave out the base class's constructor."""
    return hasattr(optimizer, "_optimizer_state_dict_pre_hooks") and hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks")


def step_with_hooks(optimizer: Optimizer) -> Callable[..., Any] | None:
    """A ``step`` that runs hooks, where the class has left out the base class's constructor, which sees to that; else None."""
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        vars(optimizer).setdefault(name, OrderedDict())
    if getattr(optimizer.step, "hooked", None) is not None:
        return None
    step: Callable[..., Any] = Optimizer.profile_hook_step(type(optimizer).step).__get__(optimizer)
    return step


def parts(optimizer: Optimizer) -> tuple[str, ...]:
    """The methods that make a step in parts, in order; none for most optimizers."""
    return tuple(name for name in _PARTS if callable(getattr(optimizer, name, None)))


def averaging_methods(optimizer: Optimizer) -> tuple[str, ...]:
    """The methods that exchange parameters and their average; none for most optimizers."""
    return _AVERAGING if all(callable(getattr(optimizer, name, None)) for name in _AVERAGING) else ()


def evaluates_first(optimizer: Optimizer) -> bool:
    """Whether it is known to evaluate a closure once, before it writes to parameters."""
    return type(optimizer).__module__.startswith("torch.optim.") and not isinstance(optimizer, LBFGS)


def loads_in_its_own_way(optimizer: Optimizer) -> bool:
    """Whether it has a ``load_state_dict`` of its own, which may run no hooks."""
    own = type(optimizer).load_state_dict is not Optimizer.load_state_dict
    return own and not type(optimizer).__module__.startswith("torch.")
