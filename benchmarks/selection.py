"""What the selection step costs, beside an optimizer step and a training step: python benchmarks/selection.py [--steps-only]

First ``optimizer.step()`` alone, on the shapes of ResNet-18: SGD with momentum on the dense network, and wired by rules of
every kind, as ratios to the dense one. Rules that exchange edges now and then are timed between two exchanges.

Then compares, as fractions of a training step of ResNet-50, in one run and in turn, a step of SGD with momentum on the dense
network, the same step wired (every convolution and the classifier at one density), the same step with a random graph (exchange
without selection), and a full sort of all magnitudes, which is what the textbook form does in every forward pass. Forward and
backward pass are timed once, on their own, and the fractions are of forward + backward + dense step.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from _timing import in_turn, machine, report
from torch import Tensor, nn

import dnw


class Basic(nn.Module):
    """The block of ResNet-18."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


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
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def resnet18() -> nn.Sequential:
    """The shapes of ResNet-18: 11.7 million parameters."""
    return _resnet(Basic, (2, 2, 2, 2), 1)


def resnet50() -> nn.Sequential:
    """The shapes of ResNet-50: 25.6 million parameters."""
    return _resnet(Bottleneck, (3, 4, 6, 3), 4)


def _resnet(block: type[Basic | Bottleneck], blocks: tuple[int, ...], expansion: int) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for stage, number in enumerate(blocks):
        for i in range(number):
            layers.append(block(inputs, 64 << stage, 2 if stage and i == 0 else 1))
            inputs = expansion * (64 << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, and a gradient for every parameter."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)


def optimizer_steps(arguments: argparse.Namespace) -> None:
    """Times ``optimizer.step()`` under rules of every kind."""
    never = 1 << 40  # an exchange that is not reached
    ways = {
        "random graph": {"rule": dnw.RandomGraph()},
        "RigL between exchanges": {"rule": dnw.RigL(every=never)},
        "SET between exchanges": {"rule": dnw.SET(every=never)},
        "magnitude pruning, k constant": {"rule": dnw.MagnitudePruning()},
        "DNW": {"rule": dnw.DNW()},
        "DNW, 2 of 4": {"pattern": dnw.NOfM(2, 4), "exclude": "0"},
    }
    steps = {"dense": optimizer_of(resnet18().to(arguments.device)).step}
    for name, how in ways.items():
        model = resnet18().to(arguments.device)
        optimizer = optimizer_of(model)
        dnw.wire(model, optimizer, **({} if "pattern" in how else {"density": arguments.density}), **how)
        steps[name] = optimizer.step
    print(f"optimizer.step() on ResNet-18, density {arguments.density}")
    report(in_turn(steps, arguments.rounds), "dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps-only", action="store_true", help="optimizer.step() alone, without ResNet-50")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(machine())
    optimizer_steps(arguments)
    if not arguments.steps_only:
        training_step(arguments)


def training_step(arguments: argparse.Namespace) -> None:
    """Times the steps of ResNet-50 beside its forward and backward pass."""
    print(f"ResNet-50, batch {arguments.batch} at {arguments.size} px, density {arguments.density}")

    optimizers, wirings, models = {}, {}, {}
    for name, rule in (("dense step", None), ("random graph step", dnw.RandomGraph()), ("wired step", dnw.DNW())):
        model = models[name] = resnet50().to(arguments.device)
        optimizers[name] = optimizer_of(model)
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
