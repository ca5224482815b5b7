"""What a parameter is to the module that uses it: whether it is wired by default, which way round it is, or why it cannot be.

Contract: pure reading, one parameter at a time. Foreign classes (of transformers, of adapters) are known by their names and
shapes, and never imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dnw._selection.layout import TARGETS_FIRST, Layout
from dnw.graphs._protocol import GraphModule


class Naming(IntEnum):
    """How plainly a parameter has to be named to be wired; each way includes those before it."""

    NOT = 0
    BY_PATTERN = 1
    BY_MODULE = 2
    IN_FULL = 3


@dataclass(frozen=True)
class Kind:
    """What a parameter is to its module.

    Attributes:
        reason: why it stays dense where it is not named plainly enough.
        naming: how plainly that is.
        layout: which of its dimensions are targets, and which are sources.
        least_per_target: active edges that every target needs.
        refusal: why it cannot be wired at all, and what to do; empty where it can.
    """

    reason: str
    naming: Naming
    layout: Layout = TARGETS_FIRST
    least_per_target: int = 0
    refusal: str = ""


GRAPH_EDGES = Kind("edges of a graph", Naming.NOT)
EMBEDDING = Kind("embedding", Naming.BY_MODULE)
_WEIGHT = Kind("weight", Naming.NOT)
_NORM = Kind("norm", Naming.IN_FULL)
_BIAS = Kind("bias", Naming.IN_FULL)
_ONE_DIMENSIONAL = Kind("one-dimensional", Naming.IN_FULL)
_GAIN = Kind("gain of a weight norm", Naming.IN_FULL)

_ONLY_WEIGHT_NORMS = "and of parametrizations only weight norms can be wired"

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()),
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_RNN_WEIGHT = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")
_ADAPTER = re.compile(r"(^|\.)lora_(embedding_)?[ab](\.|$)", re.IGNORECASE)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kind_of(name: str, module: nn.Module, attribute: str, parameter: nn.Parameter) -> Kind:
    """What a parameter is to the module whose attribute it is. Its name in the model says whether it belongs to an adapter."""
    kind = _kind_by_hook(module, attribute, parameter) or _kind(module, attribute, parameter)
    if kind.naming <= Naming.BY_PATTERN and _ADAPTER.search(name):
        return replace(kind, reason="LoRA adapter", naming=Naming.BY_PATTERN)
    return kind


def inner_kind_of(module: Any, attribute: str, parameter: nn.Parameter) -> Kind:
    """What a parameter is to the module whose attribute a parametrization computes from it."""
    kind, inner = _kind(module, attribute, parameter), module.parametrizations[attribute]
    steps = list(inner)
    if len(steps) == 1 and isinstance(steps[0], _WeightNorm):
        return _GAIN if parameter is inner.original0 else _direction(kind, steps[0].dim)
    by = ", ".join(type(step).__name__.lstrip("_") for step in steps)
    way_out = f"torch.nn.utils.parametrize.remove_parametrizations(module, {attribute!r})"
    return _inside(kind, f"parametrized by {by}", _ONLY_WEIGHT_NORMS, way_out)


def refusal_of(parameter: nn.Parameter) -> str:
    """Why a parameter cannot be wired, whatever it is to its module, and what to do; empty where it can."""
    if parameter.is_meta:
        return "is on the meta device and has no values yet; give it some (to_empty, then load or initialise) before wiring it"
    if parameter.is_complex():
        return f"is {parameter.dtype}, and complex weights cannot be wired; leave it dense with exclude"
    is_packed = hasattr(parameter, "__tensor_flatten__") and not hasattr(parameter, "placements")
    if parameter.dtype not in _DTYPES or is_packed:
        what = type(parameter.data).__name__ if is_packed else parameter.dtype
        return f"is quantized ({what}); wire it before quantizing it, or leave it dense with exclude"
    return ""


def _kind(module: nn.Module, attribute: str, parameter: nn.Parameter) -> Kind:
    if isinstance(module, GraphModule) and attribute in module.edge_candidates():
        return GRAPH_EDGES
    if isinstance(module, _NORMS):
        return _NORM
    if "bias" in attribute:
        return _BIAS
    if isinstance(module, _EMBEDDINGS):
        return EMBEDDING
    if parameter.ndim < 2:
        return _ONE_DIMENSIONAL
    if isinstance(module, nn.modules.conv._ConvNd) and attribute == "weight":
        layout = Layout(isinstance(module, nn.modules.conv._ConvTransposeNd), module.groups)
        if module.groups > 1 and module.groups == module.in_channels:
            return Kind("depthwise convolution", Naming.BY_MODULE, layout)
        return replace(_WEIGHT, layout=layout)
    if isinstance(module, (nn.Linear, nn.Bilinear)) and attribute == "weight":
        return _WEIGHT
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and _RNN_WEIGHT.fullmatch(attribute):
        return _WEIGHT
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("proj_weight"):
        return _WEIGHT
    name = type(module).__name__
    if name == "Conv1D" and parameter.ndim == 2 and getattr(module, "nf", None) == parameter.shape[1]:
        return replace(_WEIGHT, layout=Layout(transposed=True))  # the linear layer of GPT-2 in transformers
    if parameter.ndim == 3 and ("Experts" in name or getattr(module, "num_experts", None) == len(parameter)):
        layout = Layout(bool(getattr(module, "is_transposed", False)), len(parameter), stacked=True)
        return Kind(f"experts of {name} in one tensor", Naming.BY_PATTERN, layout)
    return Kind(f"parameter of {name}", Naming.BY_PATTERN)


def _kind_by_hook(module: nn.Module, attribute: str, parameter: nn.Parameter) -> Kind | None:
    """What a parameter is from which a hook computes a weight before each forward pass; None where it is none such."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and attribute == f"{hook.name}_g":
            return _GAIN
        if isinstance(hook, WeightNorm) and attribute == f"{hook.name}_v":
            return _direction(_kind(module, hook.name, parameter), hook.dim)
        if isinstance(hook, SpectralNorm) and attribute == f"{hook.name}_orig":
            by, way_out = "parametrized by SpectralNorm", f"torch.nn.utils.remove_spectral_norm(module, {hook.name!r})"
            return _inside(_kind(module, hook.name, parameter), by, _ONLY_WEIGHT_NORMS, way_out)
        if isinstance(hook, BasePruningMethod) and attribute == f"{hook._tensor_name}_orig":
            kind, by = _kind(module, hook._tensor_name, parameter), "pruned by torch.nn.utils.prune"
            way_out = f"torch.nn.utils.prune.remove(module, {hook._tensor_name!r}), which makes it permanent"
            return replace(_inside(kind, by, "whose mask would hide edges", way_out), naming=kind.naming)
    return None


def _direction(kind: Kind, dim: int) -> Kind:
    """What a parameter is whose slices along a dimension (-1: which as a whole) a weight norm divides by their length.

    A slice without edges would be 0 / 0.
    """
    if dim == -1:
        return kind  # every layer has an edge
    if not kind.layout.stacked and dim == (1 if kind.layout.transposed else 0):
        return replace(kind, least_per_target=1)
    return Kind(
        f"weight norm along dimension {dim}",
        max(kind.naming, Naming.BY_MODULE),
        refusal=f"has a weight norm along dimension {dim}, which is not that of its targets, so that a slice without edges "
        "would be 0 / 0; norm it along its targets, or leave it dense with exclude",
    )


def _inside(kind: Kind, by: str, why: str, way_out: str) -> Kind:
    """What a parameter is that cannot be wired, because something computes the weight from it."""
    refusal = f"is {by}, {why}; first take that off with {way_out}, or leave it dense with exclude"
    if kind.naming > Naming.BY_PATTERN:
        return replace(kind, refusal=refusal)
    return Kind(by, Naming.BY_MODULE, refusal=refusal)
