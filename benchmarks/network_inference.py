"""Sparse networks that others wrote, compiled: python benchmarks/network_inference.py resnet50 --zeros 0.8 0.9 0.95

In one run, in turn: the network compiled by us against the same in ONNX Runtime (dense float32, and 8-bit integers, which
is what one would ship instead), in OpenVINO and in PyTorch; at 224 px, with uniform random masks except in the stem and in
convolutions per channel, random weights and norms that are nothing special. ``bert`` is the linear layers of BERT-base on 128
tokens. Networks are torchvision's; what is not installed is left out. Pin it for one core: taskset -c 1 python ...
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from _timing import in_turn, machine, report
from _torchvision import models
from inference import Run, exported, in_onnx_runtime, in_openvino
from torch import Tensor, nn

import dnw.compile


class LinearLayersOfBert(nn.Module):
    """What BERT-base multiplies by matrices: four of 768 x 768, and up to 3,072 and down again, in each of 12 layers."""

    def __init__(self) -> None:
        super().__init__()
        square = [nn.ModuleList(nn.Linear(768, 768) for _ in range(4)) for _ in range(12)]
        self.square = nn.ModuleList(square)
        self.up = nn.ModuleList(nn.Linear(768, 3072) for _ in range(12))
        self.down = nn.ModuleList(nn.Linear(3072, 768) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for (query, key, value, out), up, down in zip(self.square, self.up, self.down, strict=True):
            x = out(query(x) + key(x) + value(x))
            x = down(up(x))
        return x


def sparse(model: nn.Module, zeros: float) -> nn.Module:
    """With so many of its weights 0, at random, but for the first layer and convolutions per channel; in eval mode."""
    generator, first = torch.Generator().manual_seed(0), True
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                stem = first and isinstance(module, nn.Conv2d)
                first = False
                density = 1.0 if stem or getattr(module, "groups", 1) > 1 else 1 - zeros
                kept = torch.rand(module.weight.shape, generator=generator) < density
                module.weight.normal_(0, (1.5 / (kept[0].numel() * density)) ** 0.5, generator=generator).mul_(kept)
    return model.eval()


def in_integers(content: bytes, images: Tensor, threads: int) -> Run | None:
    """A run in ONNX Runtime in 8-bit integers, calibrated on one batch; None where it is not installed."""
    try:
        from onnxruntime import quantization
    except ImportError:
        return None

    class Once(quantization.CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.left = [{name: images.numpy()}]

        def get_next(self) -> dict[str, object] | None:
            return self.left.pop() if self.left else None

    import onnx

    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "given.onnx"), Path(folder, "made.onnx")
        given.write_bytes(content)
        name = onnx.load(given).graph.input[0].name
        try:
            quantization.quantize_static(given, made, Once(name), quant_format=quantization.QuantFormat.QDQ, per_channel=True)
        except Exception as error:  # an operator that it does not know
            print(f"no integers: {type(error).__name__}")
            return None
        return in_onnx_runtime(made.read_bytes(), images, threads)


def compare(name: str, zeros: float, batch: int, threads: int, rounds: int, peers: list[str]) -> None:
    """Prints what each alternative takes."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    if name == "bert":
        model, images = sparse(LinearLayersOfBert(), zeros), torch.randn(batch, 128, 768)
    else:
        model, images = sparse(getattr(models(), name)(weights=None), zeros), torch.randn(batch, 3, 224, 224)
    compiled = dnw.compile.compile(model, images[:1], threads=threads)
    ways = Counter(row.way for row in compiled.report.rows)
    print(f"\n{name}, {zeros:.0%} zeros, batch {batch}, threads {threads}; {dict(ways)}; error {compiled.report.error:.0e}")
    content = exported(model, images)
    alternatives: dict[str, Callable[[], Run | None]] = {
        "ONNX Runtime": lambda: in_onnx_runtime(content, images, threads),
        "ONNX Runtime, int8": lambda: in_integers(content, images, threads),
        "OpenVINO": lambda: in_openvino(content, images, threads),
        "PyTorch": lambda: torch.no_grad()(lambda: model(images)),
    }
    runs: dict[str, Run] = {"compiled by us": lambda: compiled(images)}
    for peer in peers:
        if (run := alternatives[peer]()) is not None:
            runs[peer] = run
    report(in_turn(runs, rounds, rest=0.05), "compiled by us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peers", nargs="+", default=["ONNX Runtime", "ONNX Runtime, int8", "OpenVINO", "PyTorch"])
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(f"sparse networks at 224 px; {machine()}")
    for name in arguments.networks:
        for batch in arguments.batches:
            for zeros in arguments.zeros:
                compare(name, zeros, batch, arguments.threads, arguments.rounds, arguments.peers)


if __name__ == "__main__":
    main()
