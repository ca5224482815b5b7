"""Wirings to measure with: as many edges as were published, drawn at random, with as many nodes dead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnw.count import published_count
from dnw.models import GraphChain


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with norms as after training: no two alike, so that dead nodes send constants."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.3, generator=generator)
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def wire_at_random(model: GraphChain, width: float, multiply_adds: float | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Leaves a chain of graphs the edges of a width multiplier; all others are set to 0.

    Args:
        model: the chain; its weights are changed.
        width: the multiplier.
        multiply_adds: the nominal number to reach, at 224 px, as the authors count: in every level an equal fraction of nodes
            sends nothing, and so many outputs of the last graph get nothing, until that is the number. By default nodes are
            not kept from sending.
        seed: of the draw.

    Returns:
        The active edges of each graph.
    """
    low, high = 0.0, 0.9
    active = _drawn(model, width, 0.0, seed)
    while multiply_adds is not None and high - low > 1e-3:
        silent = (low + high) / 2
        active = _drawn(model, width, silent, seed)
        low, high = (silent, high) if published_count(model, active, width=width)[0] > multiply_adds else (low, silent)
    with torch.no_grad():
        for name, mask in active.items():
            model.get_parameter(name).mul_(mask)
    return active


def _drawn(model: GraphChain, width: float, silent: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    active = {}
    for number, (name, edges) in enumerate(model.num_edges(width).items()):
        levels = model.graphs[number].levels
        candidates = levels.candidates()
        candidates = candidates & (torch.rand(candidates.shape[1], generator=generator) >= silent)
        if number == len(model.graphs) - 1:
            candidates[-levels.num_outputs :] &= torch.rand(levels.num_outputs, 1, generator=generator) >= silent
        scores = torch.rand(candidates.shape, generator=generator).masked_fill(~candidates, -1.0)
        mask = torch.zeros(candidates.numel(), dtype=torch.bool)
        mask[scores.flatten().topk(edges).indices] = True
        active[name] = mask.view(candidates.shape)
    return active
