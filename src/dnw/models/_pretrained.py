"""Trained networks that come with the package, each with the wiring that it has found.

Contract: a network is a folder of small files that run nothing: its settings, what its training gave, and its weights, those of
edges without the zeros between them. It is a run directory without what training goes on with.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnw._checks import one_of
from dnw._files import PRETRAINED, pretrained_names, read_tensors, read_text, write_whole
from dnw._rules.fixed import Frozen
from dnw._wiring.wire import wire
from dnw._wiring.wiring import Wiring
from dnw.models._classifier import tiny_cifar10, tiny_digits, tiny_mnist

FORMAT = 1
_MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "tiny_digits": tiny_digits,
    "tiny_mnist": tiny_mnist,
    "tiny_cifar10": tiny_cifar10,
}
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A trained network.

    Attributes:
        name: of it.
        model: in eval mode; images ``[batch, channels, height, width]``, normalised as ``config["data"]`` says, to logits.
        wiring: of the model, with the edges that were found, which stay; ``wiring.remove()`` before it is wired anew.
        config: all settings of its training, as plain values.
        top1: accuracy on the test images after the last epoch, from 0 to 1.
    """

    name: str
    model: nn.Module
    wiring: Wiring
    config: dict[str, Any]
    top1: float

    def __repr__(self) -> str:
        edges = sum(int(parameter.active.count_nonzero()) for parameter in self.wiring.values())
        data, epochs = self.config["data"]["name"], self.config["epochs"]
        return f"Pretrained({self.name!r}: {edges:,} edges, {self.top1:.2%} on {data} after {epochs} epochs)"


def pretrained_folder(name: str) -> Path:
    """Where a network lies.

    Raises:
        ValueError: there is none of that name.
    """
    names = pretrained_names()
    if name not in names:
        raise ValueError(f"no pretrained network {name!r}{one_of(name, names)}")
    return PRETRAINED / name


def pretrained(name: str) -> Pretrained:
    """A trained network of the package.

    >>> network = pretrained("digits_static")
    >>> logits = network.model(images)

    Raises:
        ValueError: there is none of that name.
    """
    folder = pretrained_folder(name)
    config = json.loads(read_text(folder / "config.json", _MOST_BYTES))
    last = json.loads(read_text(folder / "metrics.jsonl", _MOST_BYTES).splitlines()[-1])
    stored = read_network(folder / "network.pt")
    model = _MAKERS[config["model"]](stored.num_classes)
    model.load_state_dict(stored.weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = wire(model, optimizer, rule=Frozen(stored.edges), include=list(stored.edges))
    return Pretrained(name, model.eval(), wiring, config, last["top1"])


# --- weights in files ---


@dataclass(frozen=True, eq=False)
class StoredNetwork:
    """What a file of weights holds.

    Attributes:
        weights: of the model, by name, in single precision.
        edges: masks of wired parameters, by name.
        num_classes: that the model tells apart.
        epoch, step: how far it is trained.
    """

    weights: dict[str, Tensor]
    edges: dict[str, Tensor]
    num_classes: int
    epoch: int
    step: int


def write_network(path: Path, model: nn.Module, edges: Mapping[str, Tensor], *, num_classes: int, epoch: int, step: int) -> int:
    """Writes the weights of a model, in half precision but for norms and biases; returns the number of bytes.

    Args:
        path: of the file.
        model: with the weights that its rule evaluates with.
        edges: masks of wired parameters, by name; of those no more is stored than the weights of active edges.
        num_classes, epoch, step: see :class:`StoredNetwork`.
    """
    weights = {name: _stored(tensor.detach().cpu(), edges.get(name)) for name, tensor in model.state_dict().items()}
    content = {"format": FORMAT, "network": weights, "num_classes": num_classes, "epoch": epoch, "step": step}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())
    return buffer.tell()


def _stored(tensor: Tensor, mask: Tensor | None) -> Any:
    if mask is None:
        return tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor.clone()
    at = mask.cpu().flatten().nonzero().flatten()
    gaps = at.diff(prepend=at.new_full((1,), -1))
    narrow = torch.int16 if not len(gaps) or int(gaps.max()) < 1 << 15 else torch.int32
    return {"shape": list(tensor.shape), "gaps": gaps.to(narrow), "weights": tensor.flatten()[at].half()}


def read_network(path: Path) -> StoredNetwork:
    """Reads what :func:`write_network` wrote; nothing in the file is run.

    Raises:
        ValueError: no such file of ours, or a damaged one.
    """
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("network"), dict):
        raise ValueError(f"{path}: not a stored network of this version of dnw")
    weights, edges = dict[str, Tensor](), dict[str, Tensor]()
    try:
        for name, stored in content["network"].items():
            if isinstance(stored, Tensor):
                weights[name] = stored.float() if stored.is_floating_point() else stored
                continue
            shape, at = [int(n) for n in stored["shape"]], stored["gaps"].long().cumsum(0) - 1
            flat, mask = torch.zeros(shape).flatten(), torch.zeros(shape, dtype=torch.bool).flatten()
            flat[at], mask[at] = stored["weights"].float(), True
            weights[name], edges[name] = flat.view(shape), mask.view(shape)
        return StoredNetwork(weights, edges, *(int(content[key]) for key in ("num_classes", "epoch", "step")))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path}: damaged ({(str(error) or type(error).__name__).splitlines()[0]})") from None
