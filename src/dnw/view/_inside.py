"""What is inside the nodes of a network's graphs: their 3x3 filters, and what a few images look like there.

Contract: small arrays, whatever the size of the network: a map is shown with at most 8 by 8 pixels and 255 values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnw.count import graphs_of
from dnw.graphs._protocol import node_functions_of
from dnw.view._snapshots import as_half

_SIDE, _IMAGE_SIDE = 8, 48
_LARGEST = 1e30
"""In place of an infinity that a node sends."""


def inside(model: nn.Module, images: Tensor | None, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, np.ndarray]:
    """Everything there is to store beside a snapshot; maps only where there are images, normalised by mean and std."""
    found = {f"filters/{name}": rows for name, rows in filters_of(model).items()}
    if images is not None and (maps := maps_of(model, images)):
        found |= {f"maps/{name}": values for name, values in maps.items()}
        found["images"] = pictures_of(images, mean, std)
    return found


def filters_of(model: nn.Module) -> dict[str, np.ndarray]:
    """The filters of each graph on maps, by the graph's name: finite float16 ``[nodes, 9]``, 0 for nodes that have none."""
    found = {}
    for name, graph in graphs_of(model).items():
        filters = [
            (module.weight, nodes)
            for function, nodes in node_functions_of(graph)
            for module in function.modules()
            if isinstance(module, nn.Conv2d) and module.weight.shape == (len(nodes), 1, 3, 3)
        ]
        if filters:
            rows = torch.zeros(graph.num_nodes, 9)
            for weight, nodes in filters:
                rows[nodes.start : nodes.stop] = weight.detach().flatten(1).cpu()
            found[name] = as_half(rows.numpy())
    return found


@torch.no_grad()
def maps_of(model: nn.Module, images: Tensor) -> dict[str, np.ndarray]:
    """What each node sends when a network sees some images, by the graph's name: uint8 ``[images, nodes, h, w]``.

    Each node has its own scale: 128 is 0, and 255 the largest magnitude over all images.

    Args:
        model: the network; it is run in eval mode and left as it was.
        images: ``[images, channels, height, width]``, as the network takes them.
    """
    sent: dict[str, dict[range, Tensor]] = {}
    hooks = []

    def keep(name: str, nodes: range) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[1] == len(nodes):
                sent[name][nodes] = _shrunk(output.float().nan_to_num(posinf=_LARGEST, neginf=-_LARGEST), _SIDE)

        return hook

    graphs = graphs_of(model)
    if not graphs:
        return {}
    for name, graph in graphs.items():
        sent[name] = {}
        for module, nodes in _senders(graph):
            hooks.append(module.register_forward_hook(keep(name, nodes)))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        model(images)
    finally:
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()
    found = {}
    for name, parts in sent.items():
        in_order = [parts[nodes] for nodes in sorted(parts, key=lambda nodes: nodes.start)]
        all_there = sum(map(len, parts)) == graphs[name].num_nodes
        if all_there and len({part.shape[2:] for part in in_order}) == 1:
            values = torch.cat(in_order, dim=1)
            largest = values.abs().amax(dim=(0, 2, 3), keepdim=True).clamp_min(1e-12)
            found[name] = (128 + 127 * values / largest).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return found


def pictures_of(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Images as pixels to be seen: uint8 ``[images, channels, height, width]``, at most 48 pixels high and wide."""
    shape = (-1, 1, 1)
    pixels = images.detach().cpu().float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return (_shrunk(pixels, _IMAGE_SIDE) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def _shrunk(maps: Tensor, side: int) -> Tensor:
    """Maps ``[batch, channels, height, width]`` of at most so many pixels a side."""
    return F.adaptive_avg_pool2d(maps, (min(side, maps.shape[2]), min(side, maps.shape[3])))


def _senders(graph: Any) -> list[tuple[nn.Module, range]]:
    """The modules that return what nodes send, and which nodes those are: node functions, and the graph for its outputs."""
    functions = list(node_functions_of(graph))
    outputs = range(graph.num_nodes - graph.num_outputs, graph.num_nodes)
    has_own = any(nodes.stop > outputs.start for _, nodes in functions)
    return functions if has_own or not functions else [*functions, (graph, outputs)]
