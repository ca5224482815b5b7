"""Checkpoints: what a run begins with, and how it stands after an epoch, in files of plain tensors.

Contract: what is read has been checked: it is whole, of a format that we know, made with the run's config, and its numbers
are possible. Whatever is wrong is one ``ValueError`` that names the file.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnw._files import read_tensors, write_whole
from dnw.recipes._config import Config, check_unchanged
from dnw.recipes._settings import MOST_EPOCHS, short

FORMAT = 1


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Stores tensors and plain values; the file is whole or not there."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_whole(path, buffer.getvalue())


def read_checkpoint(path: Path, config: Config | None = None) -> dict[str, Any]:
    """Reads the checkpoint of an epoch; nothing in the file is run.

    Args:
        path: the file.
        config: of the single run that it belongs to, which must be the one that it was made with.

    Returns:
        ``model`` and ``optimizer`` (state dicts), ``epoch`` and ``step`` (done), ``num_classes`` and, where the file is not of
        an older version, ``config``.

    Raises:
        ValueError: no checkpoint of ours, a damaged one, one of a newer version, or one that was made with another config.
    """
    content = _read(path, ("model", "optimizer", "epoch", "step"))
    if config is not None and "config" in content:
        check_unchanged(config, content["config"], "it was trained", path)
    _check_weights(path, content["model"])
    if not isinstance(content["optimizer"], dict):
        raise ValueError(f"{path}: not a checkpoint of a run (its optimizer is no state dict)")
    epoch, step = (_whole(path, content, key) for key in ("epoch", "step"))
    most = MOST_EPOCHS if config is None else config.epochs
    if epoch > most:
        raise ValueError(f"{path}: is of epoch {epoch}, but the run has {most} epochs")
    if (step and not epoch) or step % max(1, epoch):
        raise ValueError(f"{path}: step {step} is not the end of epoch {epoch}")
    return {**content, "num_classes": _num_classes(path, content)}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the weights that a run began with.

    Raises:
        ValueError: a damaged file, or one without them.
    """
    weights = _read(path, ("model",))["model"]
    _check_weights(path, weights)
    return weights


@dataclass(frozen=True, eq=False)
class Start:
    """What a run begins with, where its seed and its rule do not say it.

    Attributes:
        weights: of the model, by name.
        edges: masks by parameter name; None for those that the rule chooses.
        source: where they come from, for messages.
    """

    weights: dict[str, Tensor]
    edges: dict[str, Tensor] | None
    source: str


def read_ticket(path: Path) -> Start:
    """Reads the ticket that a run begins with.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a damaged file, or another one.
    """
    content = _read(path, ("model", "edges"))
    for weights in (content["model"], content["edges"]):
        _check_weights(path, weights)
    if any(mask.dtype != torch.bool for mask in content["edges"].values()):
        raise ValueError(f"{path}: not a ticket (its edges are no masks)")
    return Start(content["model"], content["edges"], str(path))


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    content = read_tensors(path)
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise ValueError(f"{path}: not a checkpoint of a run")
    version = content.get("format")
    if not isinstance(version, int) or version != FORMAT:
        raise ValueError(f"{path}: a checkpoint of format {short(version)}; this version of dnw reads {FORMAT}")
    return content


def _whole(path: Path, content: dict[str, Any], key: str) -> int:
    value = content[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{path}: {key}={short(value)}: expected a whole number from 0 on")
    return value


def _num_classes(path: Path, content: dict[str, Any]) -> int:
    """The number of classes of a network; of older files, which do not say it, the outputs of its last layer."""
    if "num_classes" in content:
        return max(1, _whole(path, content, "num_classes"))
    heads = [w for n, w in content["model"].items() if n.endswith("weight") and w.ndim == 2 and "graph" not in n]
    if not heads:
        raise ValueError(f"{path}: does not say how many classes there are")
    return heads[-1].shape[0]


def _check_weights(path: Path, weights: Any) -> None:
    if not isinstance(weights, dict) or not all(isinstance(n, str) and isinstance(w, Tensor) for n, w in weights.items()):
        raise ValueError(f"{path}: not a checkpoint of a run (it holds no weights by name)")
    wrong = [
        name for name, weight in weights.items() if weight.layout != torch.strided or not bool(torch.isfinite(weight).all())
    ]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} has values that are not finite numbers")
