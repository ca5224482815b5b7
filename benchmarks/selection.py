"""What the selection step costs, as a share of a training step of ResNet-50: python benchmarks/selection.py

Compares, in one run and in turn, a step of SGD with momentum on the dense network, the same step wired (every convolution
and the classifier at one density), the same step with a random graph (exchange without selection), and a full sort of all
magnitudes, which is what the textbook form does in every forward pass. Forward and backward pass are timed once, on their
own, and the shares are of forward + backward + dense step.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from _timing import in_turn, machine, report
from torch import Tensor, nn

import dnw


class Bottleneck(nn.Module):
    """The block of ResNet-50 v1.5: the stride is in its 3x3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Sequential:
    """The shapes of ResNet-50: 25.6 million parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if i == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"ResNet-50, batch {arguments.batch} at {arguments.size} px, density {arguments.density}; {machine()}")

    optimizers, wirings, models = {}, {}, {}
    for name, rule in (("dense step", None), ("random graph step", dnw.RandomGraph()), ("wired step", dnw.DNW())):
        model = models[name] = resnet50().to(arguments.device)
        optimizers[name] = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        if rule is not None:
            wirings[name] = dnw.wire(model, optimizers[name], density=arguments.density, rule=rule)
    weights = [model for n, model in models["dense step"].named_parameters() if model.ndim > 1]

    def full_sort() -> None:
        for weight in weights:
            weight.detach().abs().flatten().sort()

    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    seconds = in_turn({**steps, "full sort alone": full_sort}, arguments.rounds)

    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=arguments.device)
    labels = torch.randint(1000, (arguments.batch,), device=arguments.device)

    def passes() -> None:
        models["dense step"].zero_grad()
        F.cross_entropy(models["dense step"](images), labels).backward()

    seconds["forward and backward"] = in_turn({"": passes}, max(1, arguments.rounds // 2))[""]
    whole = statistics.median(seconds["forward and backward"]) + statistics.median(seconds["dense step"])
    report({n: v for n, v in seconds.items() if n != "forward and backward"}, "dense step")
    print(f"forward and backward pass: {statistics.median(seconds['forward and backward']) * 1e3:.1f} ms")
    for name in ("random graph step", "wired step", "full sort alone"):
        extra = statistics.median(seconds[name]) - (0 if "sort" in name else statistics.median(seconds["dense step"]))
        print(f"{name}: {extra / whole:+.2%} of a dense training step")
    extra_bytes = wirings["wired step"].num_candidates * (4 + 1 + 1)
    print(f"memory beside the dense step's: {extra_bytes / 2**20:.0f} MiB of latent weights and masks")
    if arguments.device == "cuda":
        for name in ("dense step", "wired step"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            steps[name]()
            print(f"{name}: {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB at its peak, given back afterwards")


if __name__ == "__main__":
    main()
