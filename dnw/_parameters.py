"""Which parameters of a model are wired, which of their entries are candidate edges, and why the others stay dense.

Contract: pure reading. Nothing here changes a model or an optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dnw._budgets import matches
from dnw._checks import did_you_mean

Selector = str | type[nn.Module]
"""A shell-style pattern on the name of a parameter or module, or a module type."""


@runtime_checkable
class GraphModule(Protocol):
    """A module that says itself which entries of its parameters are candidate edges."""

    def edge_candidates(self) -> dict[str, Tensor]:
        """Boolean masks ``[targets, sources]`` of the candidate edges, by the name of this module's own parameter."""
        ...


@dataclass(frozen=True, eq=False)
class Wirable:
    """A parameter to wire. ``candidates`` is None where every entry is a candidate edge."""

    name: str
    module_name: str
    module: nn.Module
    parameter: nn.Parameter
    candidates: Tensor | None
    is_graph: bool = False


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
_INNER_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")

_RNN_WEIGHT = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")

_WIRED = "wired"
_GRAPH_EDGES = "graph edges"
_OTHER = "no weight of a convolution, linear layer, RNN cell, attention projection or graph"
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()),
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def _kind(module: nn.Module, attribute: str, parameter: nn.Parameter) -> str:
    """What a parameter is to its module: ``_WIRED``, ``_GRAPH_EDGES``, or the reason why it stays dense by default."""
    if isinstance(module, GraphModule) and attribute in module.edge_candidates():
        return _GRAPH_EDGES
    if isinstance(module, _NORMS):
        return "norm"
    if "bias" in attribute:
        return "bias"
    if isinstance(module, _EMBEDDINGS):
        return "embedding"
    if parameter.ndim < 2:
        return "one-dimensional"
    if isinstance(module, nn.modules.conv._ConvNd) and attribute == "weight":
        depthwise = module.groups > 1 and module.groups == module.in_channels
        return "depthwise convolution" if depthwise else _WIRED
    if isinstance(module, (nn.Linear, nn.Bilinear)) and attribute == "weight":
        return _WIRED
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and _RNN_WEIGHT.fullmatch(attribute):
        return _WIRED
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("proj_weight"):
        return _WIRED
    return _OTHER


@dataclass(eq=False)
class _Place:
    """One parameter with every place where a model holds it."""

    name: str
    module_name: str
    attribute: str
    parameter: nn.Parameter
    modules: list[tuple[str, str, nn.Module]]
    kind: str


def _places(model: nn.Module) -> list[_Place]:
    found: dict[int, _Place] = {}
    for raw_name, module in model.named_modules(remove_duplicate=False):
        module_name = _INNER_WRAPPERS.sub("", raw_name).strip(".")
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{module_name}.{attribute}" if module_name else attribute
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"{name!r} has no shape yet; run one batch through the model before wiring it")
            kind = _kind(module, attribute, parameter)
            place = found.get(id(parameter))
            if place is None:
                found[id(parameter)] = _Place(name, module_name, attribute, parameter, [(name, module_name, module)], kind)
            else:
                if kind == "embedding" or place.kind == "embedding":
                    place.kind = f"tied to an embedding ({name if kind == 'embedding' else place.name})"
                place.modules.append((name, module_name, module))
    return list(found.values())


def _is_pattern(selector: str) -> bool:
    return any(c in selector for c in "*?[")


def _fits(place: _Place, selector: Selector) -> bool:
    if isinstance(selector, str):
        return any(matches(name, module_name, selector) for name, module_name, _ in place.modules)
    return any(isinstance(module, selector) for _, _, module in place.modules)


def _chosen(place: _Place, selector: Selector) -> bool:
    """Whether an ``include`` entry that fits a place also picks it: edges always, what is dense for its kind if named."""
    if place.kind in (_WIRED, _GRAPH_EDGES):
        return True
    if isinstance(selector, str) and any(name == selector for name, _, _ in place.modules):
        return True
    if place.parameter.ndim < 2 or place.kind in ("bias", "norm"):
        return False
    if isinstance(selector, str) and _is_pattern(selector):
        return place.kind == _OTHER
    return True


def _check(selectors: Sequence[Selector], places: Iterable[_Place], argument: str, picks: bool) -> None:
    places = list(places)
    for selector in selectors:
        if not isinstance(selector, str) and not (isinstance(selector, type) and issubclass(selector, nn.Module)):
            raise ValueError(f"{argument}: {selector!r} is neither a name pattern nor a module type")
        fitting = [p for p in places if _fits(p, selector)]
        shown = repr(selector) if isinstance(selector, str) else selector.__name__
        if not fitting:
            names = [p.name for p in places]
            hint = did_you_mean(selector, names + [p.module_name for p in places]) if isinstance(selector, str) else ""
            raise ValueError(f"{argument}={shown} matches no parameter of the model{hint}")
        if picks and not any(_chosen(p, selector) for p in fitting):
            raise ValueError(
                f"{argument}={shown} matches only parameters that stay dense by their kind "
                f"({fitting[0].name!r}: {fitting[0].kind}); name a parameter in full to wire it all the same"
            )


def find_parameters(
    model: nn.Module, include: Sequence[Selector] | None, exclude: Sequence[Selector]
) -> tuple[list[Wirable], list[LeftOut]]:
    """Splits a model's parameters into those to wire and those to leave dense.

    Args:
        model: any module; wrappers are looked through and shared parameters are met once.
        include: exactly what to wire. None wires the weights of convolutions, linear layers, RNN cells and attention
            projections, or, where the model contains graphs, the graphs' edges alone.
        exclude: what to leave dense all the same.

    Raises:
        ValueError: a pattern or type that matches nothing; a model with nothing to wire.
    """
    places = _places(unwrap_model(model))
    _check(include or [], places, "include", picks=True)
    _check(exclude, places, "exclude", picks=False)
    has_graphs = any(p.kind == _GRAPH_EDGES for p in places)
    wirable, left = [], []
    for place in places:
        reason = _reason(place, include, exclude, has_graphs)
        if reason is None:
            module, is_graph = place.modules[0][2], place.kind == _GRAPH_EDGES
            wirable.append(Wirable(place.name, place.module_name, module, place.parameter, _candidates(place), is_graph))
        else:
            left.append(LeftOut(place.name, tuple(place.parameter.shape), reason))
    if not wirable:
        reasons = ", ".join(sorted({x.reason for x in left})) or "it has no parameters"
        raise ValueError(f"the model has nothing to wire ({reasons}); name what to wire with include")
    return wirable, left


def _reason(place: _Place, include: Sequence[Selector] | None, exclude: Sequence[Selector], has_graphs: bool) -> str | None:
    """Why a parameter stays dense; None where it is wired."""
    for selector in exclude:
        if _fits(place, selector):
            return f"excluded by {selector!r}" if isinstance(selector, str) else f"excluded by {selector.__name__}"
    if include is not None:
        if not any(_fits(place, s) and _chosen(place, s) for s in include):
            return "not included" if place.kind in (_WIRED, _GRAPH_EDGES) else place.kind
    elif place.kind != _GRAPH_EDGES:
        if place.kind != _WIRED:
            return place.kind
        if has_graphs:
            return "outside the graphs"
    return None if place.parameter.requires_grad else "requires_grad=False"


def _candidates(place: _Place) -> Tensor | None:
    module = place.modules[0][2]
    if not isinstance(module, GraphModule):
        return None
    mask = module.edge_candidates().get(place.attribute)
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape != place.parameter.shape:
        raise ValueError(
            f"{place.name!r}: edge_candidates() gave {mask.dtype} of shape {tuple(mask.shape)}; expected a boolean mask "
            f"of shape {tuple(place.parameter.shape)}"
        )
    if not bool(mask.any()):
        raise ValueError(f"{place.name!r} has no candidate edges")
    return None if bool(mask.all()) else mask.to(place.parameter.device)
