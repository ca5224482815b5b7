"""Which parameters of a model are wired, which of their entries are candidate edges, and why the others stay dense.

Contract: pure reading. Nothing here changes a model or an optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dnw._checks import did_you_mean
from dnw._selection.budgets import matches
from dnw._selection.layout import TARGETS_FIRST, Layout
from dnw._wiring.kinds import EMBEDDING, GRAPH_EDGES, Kind, Naming, inner_kind_of, kind_of, refusal_of
from dnw.graphs._protocol import GraphModule


class Defaults(Enum):
    """The type of ``DEFAULTS``."""

    DEFAULTS = "what is wired without include"

    def __repr__(self) -> str:
        return "dnw.DEFAULTS"


DEFAULTS = Defaults.DEFAULTS
"""In ``include``: what is wired without it. ``include=[dnw.DEFAULTS, "own"]`` wires the defaults and ``own``."""

Selector = str | type[nn.Module] | Defaults
"""A shell-style pattern on the name of a parameter or module, a module type, or the defaults."""


@dataclass(frozen=True, eq=False)
class Wirable:
    """A parameter to wire.

    Attributes:
        name: in the model, without the prefixes of wrappers.
        module_name, module: whose weight it is, or is computed from it.
        parameter: itself.
        candidates: mask of its candidate edges; None where every entry is one.
        is_graph: whether it holds the edges of a graph module.
        layout: which of its dimensions are targets, and which are sources.
        least_per_target: active edges that every target needs, so that the model can be computed at all.
    """

    name: str
    module_name: str
    module: nn.Module
    parameter: nn.Parameter
    candidates: Tensor | None
    is_graph: bool = False
    layout: Layout = TARGETS_FIRST
    least_per_target: int = 0


@dataclass(frozen=True)
class LeftOut:
    """A parameter that stays dense, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


def unwrap_model(model: nn.Module) -> nn.Module:
    """The user's model inside the wrappers of compile, (Distributed)DataParallel and the launch libraries."""
    while True:
        children = dict(model.named_children())
        inner = children.get("_orig_mod") or children.get("_forward_module")
        if inner is None and isinstance(model, _WRAPPERS):
            inner = children["module"]
        if inner is None:
            return model
        model = inner


def parameters_named(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """Parameters by their plain names, in a copy of a model that may be wrapped in any way that prefixes all names alike.

    Raises:
        ValueError: some are missing.
    """
    model = unwrap_model(model)
    found = {_INNER_WRAPPERS.sub("", n).strip("."): p for n, p in model.named_parameters(remove_duplicate=False)}
    prefixes = ["", *(n[: -len(names[0])] for n in found if n.endswith("." + names[0]))]
    for prefix in prefixes:
        if all(prefix + name in found for name in names):
            return [found[prefix + name] for name in names]
    missing = next((name for name in names if name not in found), names[0])
    raise ValueError(f"{type(model).__name__} has no parameter {missing!r}{did_you_mean(missing, found)}")


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
_HINT = ": name it with include to wire it"
_INNER_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


@dataclass(eq=False)
class _Holder:
    """A module of a model that holds a parameter: by which name, with the module that uses it there, and as what."""

    name: str
    module_name: str
    module: nn.Module
    attribute: str
    kind: Kind


@dataclass(eq=False)
class _Held:
    """One parameter with every module of a model that holds it. It has the name of the first."""

    parameter: nn.Parameter
    holders: list[_Holder]

    @property
    def name(self) -> str:
        return self.holders[0].name

    @property
    def user(self) -> _Holder:
        """The holder that says what it is: an embedding where there is one, else that which is the most easily wired."""
        return min(self.holders, key=lambda h: (h.kind is not EMBEDDING, h.kind.naming))

    @property
    def kind(self) -> Kind:
        user = self.user
        tied = next((h.name for h in self.holders if h.kind is not EMBEDDING), None)
        if user.kind is not EMBEDDING or tied is None:
            return user.kind
        if self.holders[0].kind is EMBEDDING:
            return replace(EMBEDDING, reason=f"embedding, tied to {tied}")
        return replace(EMBEDDING, reason=f"tied to an embedding ({user.name})")


def _held_by(model: nn.Module) -> list[_Held]:
    found: dict[int, _Held] = {}
    parametrized: dict[int, tuple[str, nn.Module, str]] = {}
    for raw_name, module in model.named_modules(remove_duplicate=False):
        module_name = _INNER_WRAPPERS.sub("", raw_name).strip(".")
        if is_parametrized(module):
            for attribute, inner in dict(module.parametrizations).items():
                parametrized[id(inner)] = module_name, module, attribute
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{module_name}.{attribute}" if module_name else attribute
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"{name!r} has no shape yet; run one batch through the model before wiring it")
            if id(module) in parametrized:
                user_name, user, user_attribute = parametrized[id(module)]
                kind = inner_kind_of(user, user_attribute, parameter)
            else:
                user_name, user, user_attribute = module_name, module, attribute
                kind = kind_of(name, module, attribute, parameter)
            holder = _Holder(name, user_name, user, user_attribute, kind)
            found.setdefault(id(parameter), _Held(parameter, [])).holders.append(holder)
    return list(found.values())


def _is_pattern(selector: str) -> bool:
    return any(c in selector for c in "*?[")


def _fits(held: _Held, selector: Selector) -> bool:
    if isinstance(selector, str):
        return any(matches(h.name, h.module_name, selector) for h in held.holders)
    return isinstance(selector, Defaults) or any(isinstance(h.module, selector) for h in held.holders)


def _picks(selector: Selector, held: _Held) -> bool:
    """Whether an ``include`` entry that fits a parameter names it plainly enough."""
    if isinstance(selector, Defaults):
        naming = Naming.NOT
    elif not isinstance(selector, str):
        naming = Naming.BY_MODULE
    elif any(h.name == selector for h in held.holders):
        naming = Naming.IN_FULL
    else:
        naming = Naming.BY_PATTERN if _is_pattern(selector) else Naming.BY_MODULE
    return naming >= held.kind.naming


def _shown(selector: Selector) -> str:
    if isinstance(selector, type):
        return selector.__name__
    return repr(selector) if selector != "" else "'' (the model's own parameters)"


def _check(selectors: Sequence[Selector], found: Sequence[_Held], argument: str) -> None:
    for selector in selectors:
        if isinstance(selector, Defaults) and argument == "include":
            continue
        if not isinstance(selector, str) and not (isinstance(selector, type) and issubclass(selector, nn.Module)):
            raise ValueError(f"{argument}: {selector!r} is neither a name pattern nor a module type")
        fitting = [p for p in found if _fits(p, selector)]
        if not fitting:
            names = [h.name for p in found for h in p.holders] + [h.module_name for p in found for h in p.holders]
            hint = did_you_mean(selector, names) if isinstance(selector, str) else ""
            raise ValueError(f"{argument}={_shown(selector)} matches no parameter of the model{hint}")
        if argument == "exclude":
            continue
        picked = [p for p in fitting if _picks(selector, p)]
        refused = next((p for p in fitting if p.kind.refusal), None)
        if not picked and refused is not None:
            raise ValueError(f"{argument}={_shown(selector)}: {refused.name!r} {refused.kind.refusal}")
        if not picked:
            raise ValueError(
                f"{argument}={_shown(selector)} matches only parameters that stay dense by their kind "
                f"({fitting[0].name!r}: {fitting[0].kind.reason}); name a parameter in full to wire it all the same"
            )
        if not any(_is_wanted(selector, p) for p in picked):
            raise ValueError(
                f"{argument}={_shown(selector)} matches only parameters that are not trained ({picked[0].name!r}: "
                "requires_grad=False); name a parameter in full to choose its edges once all the same"
            )


def _is_wanted(selector: Selector, held: _Held) -> bool:
    """Whether a parameter that an ``include`` entry picks is to be wired: what is not trained only where it is named."""
    return held.parameter.requires_grad or (isinstance(selector, str) and not _is_pattern(selector))


def find_parameters(
    model: nn.Module, include: Sequence[Selector] | None, exclude: Sequence[Selector]
) -> tuple[list[Wirable], list[LeftOut]]:
    """Splits a model's parameters into those to wire and those to leave dense.

    Args:
        model: any module; wrappers are looked through and shared parameters are met once.
        include: exactly what to wire. None, and ``DEFAULTS`` among others, wires the weights of convolutions, linear layers,
            RNN cells and attention projections, or, where the model contains graphs, the graphs' edges alone.
        exclude: what to leave dense all the same.

    Raises:
        ValueError: a pattern or type that matches nothing; a parameter that cannot be wired; a model with nothing to wire.
    """
    found = _held_by(unwrap_model(model))
    _check(include or [], found, "include")
    _check(exclude, found, "exclude")
    has_graphs = any(p.kind is GRAPH_EDGES for p in found)
    wirable, left = [], []
    for held in found:
        reason = _reason(held, [DEFAULTS] if include is None else include, exclude, has_graphs)
        if reason is not None:
            left.append(LeftOut(held.name, tuple(held.parameter.shape), reason))
            continue
        if refusal := held.kind.refusal or refusal_of(held.parameter):
            raise ValueError(f"{held.name!r} {refusal}")
        kind, user = held.kind, held.user
        wirable.append(
            Wirable(
                held.name,
                held.holders[0].module_name,
                user.module,
                held.parameter,
                _candidates(held),
                kind is GRAPH_EDGES,
                kind.layout,
                kind.least_per_target,
            )
        )
    if not wirable:
        reasons = ", ".join(sorted({x.reason.removesuffix(_HINT) for x in left})) or "it has no parameters"
        raise ValueError(f"the model has nothing to wire ({reasons}); name what to wire with include")
    return wirable, left


def _reason(held: _Held, include: Sequence[Selector], exclude: Sequence[Selector], has_graphs: bool) -> str | None:
    """Why a parameter stays dense; None where it is wired."""
    for selector in exclude:
        if _fits(held, selector):
            return f"excluded by {_shown(selector)}"
    kind = held.kind
    picking = [s for s in include if _fits(held, s) and _picks(s, held)]
    if has_graphs and kind is not GRAPH_EDGES:
        picking = [s for s in picking if not isinstance(s, Defaults)]
    if any(_is_wanted(s, held) for s in picking):
        return None
    if picking:
        return "requires_grad=False"
    if kind.naming > Naming.NOT:
        return f"{kind.reason}{_HINT}" if kind.naming is Naming.BY_PATTERN else kind.reason
    return "outside the graphs" if DEFAULTS in include else "not included"


def _candidates(held: _Held) -> Tensor | None:
    module = held.user.module
    if not isinstance(module, GraphModule):
        return None
    mask = module.edge_candidates().get(held.user.attribute)
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape != held.parameter.shape:
        raise ValueError(
            f"{held.name!r}: edge_candidates() gave {mask.dtype} of shape {tuple(mask.shape)}; expected a boolean mask "
            f"of shape {tuple(held.parameter.shape)}"
        )
    if not bool(mask.any()):
        raise ValueError(f"{held.name!r} has no candidate edges")
    return None if bool(mask.all()) else mask.to(held.parameter.device)
