"""Weights of the authors' released code, read safely and put into our models under our names.

Contract: a foreign file is data. Nothing that its pickle names is executed: tensors and plain containers are read by
PyTorch's restricted reader, the one harmless class that the authors' training writes (a meter) is replaced by an inert
recorder of ours, and anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dnw._checks import listing
from dnw._files import read_tensors
from dnw.graphs import DynamicGraph, StaticGraph
from dnw.models._classifier import GraphClassifier
from dnw.models._mobilenet import GraphChain


class _Recorded:
    """Stands in for an object of the authors' code: keeps its attributes, runs nothing."""


_HARMLESS = ("train.ScalarMeter", "__main__.ScalarMeter")
_CONSTANTS = ("zeros",)
"""Buffers of constants among the original's tensors, which our models do not need."""


@dataclass(frozen=True)
class OriginalCheckpoint:
    """What an original checkpoint holds that is of use.

    Attributes:
        weights: the model's tensors by the original's names, without the leading ``module.``.
        epoch: the last finished epoch, or None where the file does not say.
    """

    weights: dict[str, Tensor]
    epoch: int | None


def read_original(path: str | Path) -> OriginalCheckpoint:
    """Reads a checkpoint of the authors' code (``epoch_N.pt``, ``best.pt``, ``init.pt``, in PyTorch's old or new format).

    Raises:
        ValueError: the file is no such checkpoint, or its pickle names something else than tensors and plain containers.
        FileNotFoundError: there is no such file.
    """
    content = read_tensors(Path(path), [(_Recorded, name) for name in _HARMLESS])
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a checkpoint with an entry 'model', found a {type(content).__name__}")
    model = content.get("model", content.get("state_dict"))
    if not isinstance(model, Mapping) or not all(isinstance(v, Tensor) for v in model.values()):
        raise ValueError(f"{path}: no weights under 'model'; its entries are {listing(map(str, content))}")
    epoch = content.get("last_epoch")
    return OriginalCheckpoint(
        {str(k).removeprefix("module."): v for k, v in model.items()}, epoch if isinstance(epoch, int) else None
    )


def original_num_edges(prune_rate: float, entries: int) -> int:
    """The original's number of edges for its float prune rate: ``entries - int(prune_rate * entries)``.

    It differs from :func:`dnw.num_edges`, which rounds half up.
    """
    return entries - int(prune_rate * entries)


def original_random_graph(num_edges: int, seed: int) -> Tensor:
    """A random graph for the tiny static CIFAR-10 classifier, drawn from the entries that the authors' code allows.

    It allows 305,600 of the 640,000 entries: those of row r in columns below ``32 + 100 * (r // 100)``. The graph reads 258,160
    of them, so of 32,000 edges about 27,000 do anything. A fair random graph is ``dnw.RandomGraph`` on the candidates.

    Args:
        num_edges: how many.
        seed: of the draw, which is ours; the authors' own draws are not reproduced.

    Returns:
        Boolean mask ``[800, 800]``.
    """
    allowed = torch.arange(800)[None, :] < 32 + 100 * (torch.arange(800)[:, None] // 100)
    entries = allowed.flatten().nonzero().squeeze(1)
    if not 1 <= num_edges <= len(entries):
        raise ValueError(f"num_edges={num_edges}: allowed is a whole number from 1 to {len(entries):,}")
    chosen = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))[:num_edges]
    mask = torch.zeros(640_000, dtype=torch.bool)
    mask[entries[chosen]] = True
    return mask.view(800, 800)


def load_original(model: GraphClassifier | GraphChain, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Puts the original's weights into one of our networks, which must not be wired yet.

    The edges go in dense, as the original's latent weights; wire the model afterwards. Nothing is changed where a name
    or a shape does not fit.

    Args:
        model: a network of the same architecture, such as :func:`tiny_cifar10` or :class:`GraphChain`.
        weights: tensors by the original's names.

    Returns:
        The original's fixed edge sets, by our parameter names: what ``dnw.Frozen`` takes; empty for learned wirings.

    Raises:
        ValueError: a missing or unknown name, or a wrong shape; the first one is named.
    """
    theirs = {k: v for k, v in weights.items() if k not in _CONSTANTS}
    ours = _chain(model, theirs) if isinstance(model, GraphChain) else _tiny(model.graph, theirs)
    edges = {name.removesuffix("mask") + "weight": ours.pop(name).bool() for name in list(ours) if name.endswith(".mask")}
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in ours:
            raise ValueError(f"the checkpoint has nothing for {name!r}")
        if ours[name].shape != tensor.shape:
            raise ValueError(
                f"the checkpoint's weight for {name!r} has shape {tuple(ours[name].shape)}, the model's has "
                f"{tuple(tensor.shape)}"
            )
    unknown = [name for name in ours if name not in own]
    if unknown:
        raise ValueError(f"the checkpoint holds {unknown[0]!r}, which the model does not have")
    model.load_state_dict(ours)
    return edges


def _tiny(graph: object, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the tensors of a tiny classifier.

    In a static graph the one convolution over all nodes is split by level, and each level has a norm of its own; a
    continuous one lies deeper in the original; edges become a matrix.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        top, _, rest = name.removeprefix("odesolve.odefunc.").partition(".")
        if top == "downsample":
            ours[f"stem.{rest}"] = tensor
        elif top == "fc":
            ours[f"classifier.{rest}"] = tensor
        elif top == "graph" and _is_matrix(tensor):
            ours[f"graph.{rest}"] = tensor[:, :, 0, 0]
        elif isinstance(graph, DynamicGraph) and top in ("norm", "conv"):
            ours[f"graph.{top}.{rest}"] = tensor
        elif isinstance(graph, StaticGraph) and top == "norm":
            index, _, field = rest.partition(".")
            ours[f"graph.nodes.{index}.norm.{field}"] = tensor
        elif isinstance(graph, StaticGraph) and name == "conv.weight" and tensor.shape[0] == graph.levels.num_sources:
            for level, part in enumerate(tensor.split(graph.levels.sizes)):
                ours[f"graph.nodes.{level}.conv.weight"] = part
        else:
            raise _no_place(name, tensor)
    return ours


def _chain(model: GraphChain, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the tensors of a chain of graphs; in the original the inputs' convolution stands apart."""
    ours: dict[str, Tensor] = {}
    renamed = {"conv1": "conv", "bn": "norm", "linear": "classifier"}
    for name, tensor in weights.items():
        top, _, rest = name.partition(".")
        if name.startswith("linear.graph.") and _is_matrix(tensor):
            ours["classifier." + name.removeprefix("linear.graph.")] = tensor[:, :, 0, 0]
            continue
        if top in renamed:
            ours[f"{renamed[top]}.{rest}"] = tensor
            continue
        index, _, inner = rest.partition(".")
        if top != "layers" or not index.isdecimal() or int(index) >= len(model.graphs):
            raise _no_place(name, tensor)
        graph = model.graphs[int(index)]
        assert isinstance(graph, StaticGraph)
        part, _, field = inner.partition(".")
        if part == "graph" and _is_matrix(tensor):
            ours[f"graphs.{index}.{field}"] = tensor[:, :, 0, 0]
        elif inner == "downsample.0.weight":
            ours[f"graphs.{index}.nodes.0.conv.weight"] = tensor
        elif part == "norm":
            level, _, field = field.partition(".")
            ours[f"graphs.{index}.nodes.{level}.norm.{field}"] = tensor
        elif inner == "conv.weight" and tensor.shape[0] == graph.levels.num_inner:
            for number, weight in enumerate(tensor.split(graph.levels.sizes[1:]), start=1):
                ours[f"graphs.{index}.nodes.{number}.conv.weight"] = weight
        else:
            raise _no_place(name, tensor)
    return ours


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.shape[2:] == (1, 1)


def _no_place(name: str, tensor: Tensor) -> ValueError:
    return ValueError(f"the checkpoint holds {name!r} of shape {tuple(tensor.shape)}, which has no place in the model")
