"""The kernels: every kind, every width of maps and of vectors, whatever memory held before."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dnw.compile import Program, Runtime
from dnw.compile import _native as native
from dnw.compile._lower import CACHE
from dnw.compile._program import (
    Affine,
    Constant,
    Convolution,
    Edges,
    InstanceNorm,
    Instruction,
    Linear,
    Mean,
    Pick,
    Rectify,
    Restore,
)

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(native.kernels() is None, reason="the kernels are not built (no C compiler)"),
]


@pytest.fixture(params=[4, 8, 16])
def lanes(request, monkeypatch) -> int:
    """Each width of vectors that this machine has; the kernels then use it."""
    if request.param > native.lanes():
        pytest.skip(f"this machine has no vectors of {request.param} floats")
    monkeypatch.setattr(native, "lanes", lambda: request.param)
    return request.param


@pytest.fixture
def stale(monkeypatch) -> None:
    """Whatever the kernels find in memory that they have not written themselves is NaN."""
    monkeypatch.setattr(native, "_floats", lambda *shape: torch.full(shape, math.nan))
    monkeypatch.setattr(native._Layout, "take_arena", lambda layout: native._floats(layout.lowered.arena))


class Chain:
    """Instructions one after the other, with random numbers, on maps whose size is known."""

    def __init__(self, channels: int, height: int, width: int, seed: int) -> None:
        self.input_size = self.size = (channels, height, width)
        self.generator = torch.Generator().manual_seed(seed)
        self.instructions: list[Instruction] = []

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def add(self, instruction: Instruction) -> Chain:
        self.instructions.append(instruction)
        self.size = instruction.check(self.size)
        return self

    def convolution(self, kernel=(3, 3), stride=(1, 1), padding=(1, 1), targets: int | None = None) -> Chain:
        """One per channel, or to some targets from all channels."""
        sources = 1 if targets is None else self.size[0]
        weight = self.numbers(targets or self.size[0], sources, *kernel) / math.sqrt(sources * math.prod(kernel))
        return self.add(Convolution(weight, None, stride, padding, 1 if targets else self.size[0]))

    def node(self, stride: int = 1) -> Chain:
        return self.convolution(stride=(stride, stride))

    def edges(self, constant: bool = False) -> Chain:
        channels = self.size[0]
        matrix = self.numbers(channels, channels).masked_fill(torch.eye(channels, dtype=torch.bool), 0) / math.sqrt(channels)
        return self.add(Edges.of(matrix, Constant.of(self.numbers(*self.size)) if constant else None))

    def norm(self, instance: bool = False) -> Chain:
        scale, shift = self.numbers(self.size[0]), self.numbers(self.size[0])
        return self.add(InstanceNorm(scale, shift, 1e-3) if instance else Affine(scale, shift))

    def pick(self) -> Chain:
        return self.add(Pick(torch.arange(self.size[0] - 1)))

    def restore(self) -> Chain:
        channels, *sides = self.size
        return self.add(Restore(torch.arange(channels), self.numbers(channels + 1, *sides)))

    def program(self) -> Program:
        return Program(tuple(self.instructions), self.input_size)


def chains(height: int, width: int) -> Iterator[Program]:
    """Every kernel that writes maps, each before one that reads their neighbours."""
    x = Chain(3, height, width, seed=width)
    x.convolution(targets=4).node().norm().add(Rectify()).edges().node().convolution(targets=4, kernel=(1, 1), padding=(0, 0))
    x.node().norm(instance=True).node().edges(constant=True).node()
    x.convolution(kernel=(3, 1), padding=(1, 0)).node(stride=2).node().convolution(targets=3).node(stride=2).edges()
    yield x.add(Mean(0, max(x.size[1:]))).add(Linear(x.numbers(5, 3), x.numbers(5))).program()
    x = Chain(3, height, width, seed=width)
    x.norm().node().pick().node().restore().add(Rectify()).node().convolution(stride=(2, 2)).convolution(
        kernel=(1, 3), padding=(0, 1)
    )
    yield x.node(stride=2).node().convolution(kernel=(3, 5), stride=(2, 1), padding=(1, 2)).node().node(stride=2).program()


def assert_right(program: Program, cache: int = CACHE) -> set[str]:
    """Images one after the other, NaN in one of them, come out as from PyTorch; returns the kinds of kernels that ran."""
    images = torch.randn(3, *program.input_size, generator=torch.Generator().manual_seed(1))
    expected = program(images)
    images[1, :, images.shape[2] // 2, -1] = math.nan
    layout = native._Layout(program, cache)
    found = torch.empty_like(expected)
    layout.run(images, found)
    where = f"{program.input_size}, cache {cache}"
    torch.testing.assert_close(found[::2], expected[::2], rtol=1e-3, atol=1e-4, msg=lambda text: f"{where}: {text}")
    return {kernel.kind for kernel in layout.lowered.kernels}


@pytest.mark.parametrize("part", range(4))
def test_every_width_of_maps(lanes, stale, part):
    for width in range(1 + part, 101, 4):
        for program in chains(5, width):
            assert_right(program)


def test_flat_maps(lanes, stale):
    for width in range(2, 40):
        for program in chains(1, width):
            assert_right(program)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_on_one_image(lanes, stale, threads):
    for width in (7, 24, 40):
        for program in chains(5, width):
            runtime, images = Runtime(program, threads=threads), torch.randn(1, *program.input_size)
            for _ in range(2):
                torch.testing.assert_close(runtime(images), program(images), rtol=1e-3, atol=1e-4)


def test_every_kind_of_kernel_is_tried(lanes, stale):
    """A few rows at a time, too, where rows slide to make room."""
    kinds = set[str]()
    for width in (9, 24, 33, 40, 56):
        for program in chains(24, width):
            for cache in (4_000, 12_000, CACHE):
                kinds |= assert_right(program, cache)
    assert kinds == set(native._KINDS)
