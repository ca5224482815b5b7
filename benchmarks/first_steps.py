"""What a wiring does in its first steps: python benchmarks/first_steps.py [RECIPE] [key=value ...] --data-dir DATA

Trains a recipe of graphs for 60 steps and prints, graph by graph: the share of the first edges that are still there, targets
without any edge, the largest weight, and the gradient of the edges into such targets as a multiple of the median target's (root
mean square over a target's entries).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from dnw.recipes import config_of
from dnw.train import override
from dnw.train._images import load_data, make_batches, num_classes_of
from dnw.train._network import make_network

SHOWN = (0, 1, 2, 5, 10, 20, 40, 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="cifar10_mobilenet_dnw_x225")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    given = parser.parse_args()
    config = override(config_of(given.recipe), given.settings)
    data = load_data(config, given.data_dir)
    batches, per_epoch = make_batches(config, data, torch.device("cpu")), len(data[0]) // config.batch_size
    network = make_network(config, num_classes_of(data), steps=config.epochs * per_epoch)
    parameters = dict(network.model.named_parameters())
    first = {name: wired.active.clone() for name, wired in network.wiring.items()}
    print(
        "| step | loss | parameter | still there | targets without edges | largest weight | their gradient, times the median |"
    )
    print("|---|---|---|---|---|---|---|")
    for step, (images, labels) in enumerate(batches.train(1)):
        for group in network.optimizer.param_groups:
            group["lr"] = config.lr_at(step / per_epoch)
        network.optimizer.zero_grad()
        loss = F.cross_entropy(network.model(images), labels)
        loss.backward()
        if step in SHOWN:
            for name, wired in network.wiring.items():
                gradient = parameters[name].grad
                assert gradient is not None
                sizes = gradient.square().mean(1).sqrt()
                targets = torch.ones(len(sizes)).bool() if wired.candidates is None else wired.candidates.any(1)
                bare = targets & ~wired.active.any(1)
                some = targets & wired.active.any(1)
                times = f"{float(sizes[bare].max() / sizes[some].median()):,.0f}" if bare.any() else ""
                kept = int((wired.active & first[name]).sum()) / int(first[name].sum())
                print(
                    f"| {step} | {loss.item():.2f} | {name} | {kept:.0%} | {int(bare.sum())} of {int(targets.sum())} | "
                    f"{float(wired.weight.abs().max()):.3g} | {times} |",
                    flush=True,
                )
        if step == max(SHOWN):
            return
        network.optimizer.step()


if __name__ == "__main__":
    main()
