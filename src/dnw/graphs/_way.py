"""Which way a graph runs: on kernels that skip absent edges, or as layers of PyTorch.

Contract: looks, and decides. Both ways give the same numbers within float32 rounding. What the kernels do not know (another
norm, a hook on a part of the graph, another device or dtype, tensors that are traced) runs as layers of PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from dnw.graphs._node import Node
from dnw.kernels._graph import Norm, lanes, library
from dnw.kernels._room import room
from dnw.kernels._wired import density_of

SPARSE_ENOUGH, FEWEST_IMAGES = 0.5, 8
"""Up to this density of the candidate edges, and from so many images on, kernels are faster (``benchmarks/step_costs.py``)."""

_MODES = ("auto", "always", "never")
_mode = os.environ.get("DNW_GRAPH_KERNELS", "auto")


def set_graph_kernels(mode: Literal["auto", "always", "never"]) -> None:
    """Says when graphs run on kernels of their own, of those that can.

    The environment variable ``DNW_GRAPH_KERNELS`` says it for a process from its start.

    Args:
        mode: "auto" where the weight is sparse enough for it to pay, "always", or "never".
    """
    global _mode
    if mode not in _MODES:
        raise ValueError(f"mode={mode!r}: allowed are 'auto', 'always' and 'never'")
    _mode = mode


def graph_kernels() -> str:
    """What graphs run on in this process, in a few words."""
    if library() is None:
        return "layers: no native code"
    return "layers" if _mode == "never" else f"{_mode}: vectors of {lanes()} floats"


def why_not(x: Tensor, weight: Tensor, candidates: int, parts: Sequence[nn.Module]) -> str:
    """Why a graph runs as layers of PyTorch; empty where it runs on kernels.

    Args:
        x: what the graph is given.
        weight: its edges.
        candidates: how many of them there may be.
        parts: the modules that compute what nodes send.
    """
    if _mode not in _MODES:
        raise ValueError(f"DNW_GRAPH_KERNELS={_mode!r}: allowed are 'auto', 'always' and 'never'")
    if _mode == "never":
        return "kernels are turned off"
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return f"kernels are for a CPU, and this is on {x.device}"
    tensors = (x, weight, *(p for part in parts for p in part.parameters(recurse=False)))
    if any(t.dtype != torch.float32 for t in tensors) or torch.is_autocast_enabled("cpu"):
        return "kernels compute in float32"
    if x.numel() == 0:
        return "the batch is empty"
    if any(map(has_hooks, parts)):
        return "a part of the graph has hooks"
    if not _is_built():
        return "the package was installed without a C compiler"
    if torch.compiler.is_compiling():  # density and batch are not known yet: kernels whatever they will be
        return "the graph is exported" if torch.compiler.is_exporting() else ""
    if type(x) not in (Tensor, nn.Parameter) or _is_watched():
        return "operations are traced or transformed"
    if _mode == "always":
        return ""
    if len(x) < FEWEST_IMAGES:
        return f"the batch has fewer than {FEWEST_IMAGES} images"
    density = density_of(weight, candidates)
    if density > SPARSE_ENOUGH:
        return f"{density:.0%} of the candidate edges are active, and kernels pay up to {SPARSE_ENOUGH:.0%}"
    return ""


_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def has_hooks(part: Any) -> bool:
    """Whether somebody wants to be called with what a module computes; of functions nobody can."""
    if not isinstance(part, nn.Module):
        return False
    return any(getattr(part, f"_{name}") or getattr(nn.modules.module, f"_global_{name}") for name in _HOOKS)


def _is_built() -> bool:
    return library() is not None


_is_built._dynamo_marked_constant = True  # type: ignore[attr-defined]
"""What ``torch.compiler.assume_constant_result`` says; but that imports the compiler, which takes as long as torch itself."""


def _is_watched() -> bool:
    """Whether a mode, a transform or a tracer wants to see single operations."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or any(type(mode) is not DeviceContext for mode in _function_modes())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.onnx.is_in_onnx_export()
    )


def _function_modes() -> list[Any]:
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


def norm_kind(norms: Sequence[nn.Module], pixels: int, images: int) -> tuple[Norm, float] | None:
    """Where the statistics of norms that are alike come from, and their eps; None where kernels do not know them.

    Args:
        norms: of the levels of a graph.
        pixels, images: number of pixels of the smallest map, and of images.
    """
    first: Any = norms[0]
    if any(type(norm) is not type(first) for norm in norms):
        return None
    if type(first) is nn.Identity:
        return Norm.NONE, 0.0
    if type(first) not in (nn.BatchNorm2d, nn.InstanceNorm2d):
        return None
    alike = ("eps", "affine", "track_running_stats", "training", "momentum")
    if any(getattr(norm, name) != getattr(first, name) for norm in norms for name in alike):
        return None
    if any((getattr(norm, name) is None) != (getattr(first, name) is None) for norm in norms for name in ("weight", "bias")):
        return None
    if type(first) is nn.InstanceNorm2d:
        return (Norm.INSTANCE, first.eps) if not first.track_running_stats and pixels > 1 else None
    if first.training or not first.track_running_stats:
        return (Norm.BATCH, first.eps) if pixels * images > 1 else None
    return Norm.GIVEN, first.eps


def is_node(node: nn.Module) -> bool:
    """Whether a node function is one that kernels know."""
    return type(node) is Node and type(node.relu) is nn.ReLU and is_convolution(node.conv)


def is_convolution(conv: nn.Module) -> bool:
    """Whether a convolution is that of nodes: 3x3, one for each channel, without bias, of stride 1 or 2."""
    if type(conv) is not nn.Conv2d or conv.bias is not None:
        return False
    is_nodewise = conv.groups == conv.in_channels == conv.out_channels and conv.padding == (1, 1) and conv.dilation == (1, 1)
    return is_nodewise and conv.kernel_size == (3, 3) and conv.stride in ((1, 1), (2, 2)) and conv.padding_mode == "zeros"


def joined(norms: Sequence[nn.Module], name: str) -> Tensor | None:
    """A parameter or statistic of all norms, end to end; None where they have none."""
    values: list[Any] = [getattr(norm, name, None) for norm in norms]
    return None if any(value is None for value in values) else torch.cat(values)


def statistics(
    nodes: int, images: int, norm: Norm, mean: Tensor | None, variance: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation of the norms of some nodes: given, or zeros in their place."""
    if norm is Norm.GIVEN:
        assert mean is not None
        assert variance is not None
        return mean.clone(), (variance + eps).rsqrt()
    shape = (nodes, images) if norm is Norm.INSTANCE else (nodes,)
    return room(*shape).zero_(), room(*shape).zero_()


@torch.no_grad()
def update_statistics(norms: Sequence[Any], mean: Tensor, deviation: Tensor, counts: Sequence[int]) -> None:
    """Moves the running statistics of batch norms, as these do themselves.

    Args:
        norms: of the levels.
        mean, deviation: mean and reciprocal deviation of the batch, of all levels.
        counts: of each level how many numbers these are of.
    """
    first = 0
    for norm, count in zip(norms, counts, strict=True):
        last = first + norm.num_features
        if norm.track_running_stats and norm.training:
            norm.num_batches_tracked.add_(1)
            factor = norm.num_batches_tracked.reciprocal() if norm.momentum is None else norm.momentum
            variance = (deviation[first:last].double().pow(-2) - norm.eps).clamp(min=0).float()
            norm.running_mean.lerp_(mean[first:last], factor)
            norm.running_var.lerp_(variance * (count / max(1, count - 1)), factor)
        first = last
