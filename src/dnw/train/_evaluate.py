"""What a network gets right on the test images, while it is trained and afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dnw.data import Batches
from dnw.train._images import load_data, make_batches, num_classes_of
from dnw.train._network import Checkpoint, Network, load_network
from dnw.train._processes import Alone, launch, lost_processes_named, sum_over_processes, threads_of
from dnw.train._run import RunDirectory

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Scores:
    """Top-1 and top-5 accuracy of one checkpoint of one run on the test images, from 0 to 1."""

    run: Path
    rule: str
    seed: int
    checkpoint: str
    epoch: int
    top1: float
    top5: float


def evaluate(path: str | Path, *, data_dir: str | Path | None = None) -> list[Scores]:
    """Tests the best and the last checkpoint of every single run in a run directory, on the test images whatever it held out.

    Raises:
        ValueError: this is no run directory, or it has no checkpoint yet.
    """
    run = RunDirectory(path)
    config = run.config()
    if data_dir is None:
        data_dir = Path() if config.data.name == "digits" else run.data_dir()  # the digits are in the package
    data = load_data(config, Path(data_dir), testing=True)
    fabric = launch(config, processes=1)
    scores = []
    with threads_of(run), lost_processes_named(run.path):
        for member, single in run.members():
            for checkpoint in ("last",) if member.network.exists() and not member.last.exists() else get_args(Checkpoint):
                network = load_network(member, single, checkpoint, num_classes=num_classes_of(data), fabric=fabric)
                top1, top5, _ = test(network, make_batches(single, data, fabric.device), fabric)
                scores.append(Scores(member.path, single.method, single.seed, checkpoint, network.epoch, top1, top5))
    return scores


@torch.no_grad()
def test(network: Network, batches: Batches, fabric: Fabric | Alone) -> tuple[float, float, float]:
    """Top-1, top-5 and mean loss on the test images, with the weights that the rule evaluates with."""
    sums = torch.zeros(4, device=fabric.device)
    model = network.wrapped_model.eval()
    with network.wiring.settled():
        for images, labels in batches.test():
            with fabric.autocast():
                logits = model(images)
            sums += _batch_scores(logits, labels)
    right1, right5, loss, images_seen = sum_over_processes(fabric, sums).tolist()
    return right1 / images_seen, right5 / images_seen, loss / images_seen


def _batch_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Right at first, right among five, sum of losses, number of images."""
    logits = logits.float()
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([ranked[:, 0].sum().float(), ranked.sum().float(), loss, loss.new_tensor(len(labels))])
