"""The kernels: every kind, every width of maps and of vectors, whatever memory held before."""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from compiled import lively, small_program, thinned
from helpers import pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnw.compile import Program, Runtime, _measure, load_program, measured, plan, save_program
from dnw.compile import _native as native
from dnw.compile._layers import Activation, PlaceMean
from dnw.compile._lower import CACHE, Space
from dnw.compile._measure import summary
from dnw.compile._program import (
    Affine,
    Constant,
    Convolution,
    InstanceNorm,
    Instruction,
    Linear,
    Pick,
    Restore,
    tensors,
)
from dnw.compile._tasks import Maps
from dnw.models import GraphChain, Stage, tiny_digits

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
        added = Constant.of(self.numbers(*self.size)) if constant else None
        return self.add(Convolution(matrix[:, :, None, None], added, (1, 1), (0, 0), 1, sparse=True))

    def norm(self, instance: bool = False) -> Chain:
        scale, shift = self.numbers(self.size[0]), self.numbers(self.size[0])
        return self.add(InstanceNorm(scale, shift, 1e-3) if instance else Affine(scale, shift))

    def pick(self) -> Chain:
        return self.add(Pick(torch.arange(self.size[0] - 1)))

    def restore(self) -> Chain:
        channels, *sides = self.size
        return self.add(Restore(torch.arange(channels), self.numbers(channels + 1, *sides)))

    def program(self) -> Program:
        return Program.chain(self.instructions, self.input_size)


def chains(height: int, width: int) -> Iterator[Program]:
    """Every kernel that writes maps, each before one that reads their neighbours."""
    x = Chain(3, height, width, seed=width)
    x.convolution(targets=4).node().norm().add(Activation("relu")).edges().node().convolution(
        targets=4, kernel=(1, 1), padding=(0, 0)
    )
    x.node().norm(instance=True).node().edges(constant=True).node()
    x.convolution(kernel=(3, 1), padding=(1, 0)).node(stride=2).node().convolution(targets=3).node(stride=2).edges()
    yield x.add(PlaceMean()).add(Linear(x.numbers(5, 3), x.numbers(5))).program()
    x = Chain(3, height, width, seed=width)
    x.norm().node().pick().node().restore().add(Activation("relu")).node().convolution(stride=(2, 2)).convolution(
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
    return {record.kind for record in layout.lowered.records}


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
    layers = {"sum", "product", "pool", "adaptive_mean", "rearrange", "layer_norm", "group_norm", "attention"}
    assert kinds == set(native.tables().kinds) - layers  # which test_any_network.py tries


# --- compiled networks ---


@pytest.fixture
def program() -> Program:
    return small_program()


@pytest.mark.parametrize("batch", [0, 1, 2, 7])
@pytest.mark.parametrize("threads", [1, 3])
def test_batches_and_threads_give_the_same(program, batch, threads):
    images = torch.randn(batch, 3, 21, 18, generator=torch.Generator().manual_seed(0))
    runtime = Runtime(program, threads=threads)
    assert runtime.kind == "native"
    one_by_one = [Runtime(program)(image[None]) for image in images]
    assert torch.equal(runtime(images), torch.cat(one_by_one) if batch else torch.empty(0, 10))


@pytest.mark.parametrize(
    ("lanes", "side", "cache"),
    pairs([4, 8, 16], [(21, 18), (32, 32), (47, 35)], [1, 24_000, 100_000, 10**9]),
    indirect=["lanes"],
)
def test_any_cache_and_vector_width_give_the_same(lanes, stale, side, cache):
    """However few rows are made at a time; also where maps have just as many places as a vector, or half of them."""
    stages = (Stage(6, 8, 1, 2), Stage(8, 16, 2, 3), Stage(16, 16, 2, 2), Stage(16, 24, 2, 2))
    model = thinned(lively(GraphChain(10, image_stride=1, stages=stages)), 3, density=0.2)
    program = plan(model, (3, *side)).apply(model)
    images = torch.randn(2, 3, *side, generator=torch.Generator().manual_seed(0))
    runtime = Runtime(program)
    runtime._layouts = [native._Layout(program, cache)]
    torch.testing.assert_close(runtime(images), program(images), rtol=1e-4, atol=1e-5)
    calls, records = runtime._layout.lowered.calls, runtime._layout.lowered.records
    assert (len(calls) > len(records)) == (cache == 24_000 or (cache == 100_000 and side != (21, 18)))


class Beside(nn.Module):
    """A value that stands in a concatenation beside what a deep branch makes of it."""

    def __init__(self, width: int, depth: int, pool: bool) -> None:
        super().__init__()
        self.first, self.wide = nn.Conv2d(3, width, 1), nn.Conv2d(width, 2 * width, 1)
        self.branch = nn.Sequential(*[nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)])
        self.last = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Conv2d(2 * width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        joined = torch.cat([first, self.branch(first)], 1)
        return self.last(joined if isinstance(self.last, nn.MaxPool2d) else joined + self.wide(first))


@pytest.mark.parametrize("height", range(57, 68, 2))
@pytest.mark.parametrize(("width", "depth", "pool"), [(20, 4, False), (16, 7, False), (32, 4, True)])
def test_what_is_joined_row_by_row_lies_where_it_is_held(height, width, depth, pool):
    """A writer that has not begun yet still puts zeros above the first row."""
    torch.manual_seed(0)
    program = plan(model := Beside(width, depth, pool).eval(), (3, height, 64)).apply(model)
    images = torch.randn(2, 3, height, 64)
    torch.testing.assert_close(Runtime(program)(images), program(images), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    side=st.tuples(st.integers(3, 40), st.integers(3, 40)),
    strides=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3),
    levels=st.integers(1, 4),
    cache=st.sampled_from([1, 2_000, 10_000, 40_000]),
    lanes=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 1_000),
    dense=st.booleans(),
)
def test_random_chains_row_by_row(side, strides, levels, cache, lanes, seed, dense):
    torch.manual_seed(seed)
    stages = tuple(Stage(4, 4, stride, levels) for stride in strides)
    model = thinned(lively(GraphChain(3, image_stride=1, stages=stages), seed), seed, density=0.4)
    program = plan(model, (3, *side)).apply(model)
    if dense:
        program, _ = measured(program, least=0.0)  # whatever is faster here
    images = torch.randn(1, 3, *side)
    runtime = Runtime(program)
    runtime._layouts = [native._Layout(program, cache)]
    width = native.lanes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "lanes", lambda: min(lanes, width))
        torch.testing.assert_close(runtime(images), program(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("shared", [1, 3])
def test_sums_become_matrices_where_that_is_faster(faster, shared, program, monkeypatch, tmp_path):
    """Whatever the clock said: the same outputs, also from a file, in PyTorch, and from several threads."""
    times = itertools.cycle([2.0, 1.0] if faster else [1.0, 2.0])
    monkeypatch.setattr(_measure, "_seconds", lambda *_: next(times))
    chosen, timings = measured(program, least=0.15)
    assert len(timings) > 1
    assert {timing.faster_dense for timing in timings} == {faster}
    sums = [sums for sums in chosen.instructions if isinstance(sums, Convolution) and sums.pointwise]
    assert len(sums) > len(timings) / 2
    assert {chosen.instructions[timing.node].sparse for timing in timings} == {not faster}
    assert summary(timings).startswith(
        f"of {len(timings)} sums timed edge by edge and as a matrix with zeros, {len(timings) if faster else 0} run as a matrix"
    )
    images = torch.randn(2, 3, 21, 18)
    save_program(chosen, tmp_path / "net.dnw")
    stored = load_program(tmp_path / "net.dnw")
    for run in (chosen, stored, Runtime(stored, threads=shared), Runtime(stored, native=False)):
        torch.testing.assert_close(run(images), program(images), rtol=1e-4, atol=1e-5)
    kinds = [record.kind for record in Runtime(stored)._layout.lowered.records]
    assert (kinds.count("dense") > len(timings) / 2) == faster


def test_rows_lie_where_vectors_want_them():
    pitches = {width: Maps(1, 9, width).pitch for width in (2, 3, 7, 8, 9, 16, 17, 28, 56, 112)}
    assert pitches == {2: 2, 3: 4, 7: 8, 8: 8, 9: 16, 16: 16, 17: 32, 28: 32, 56: 64, 112: 112}


def test_many_threads_may_use_one_runtime(program):
    from concurrent.futures import ThreadPoolExecutor

    runtime = Runtime(program, threads=2)
    batches = [torch.randn(4, 3, 21, 18) for _ in range(24)]
    expected = [Runtime(program)(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(runtime, batches))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_forked_process_has_threads_of_its_own(program, threads, batch):
    runtime, images = Runtime(program, threads=threads), torch.randn(batch, 3, 21, 18)
    expected = runtime(images)
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(0 if torch.equal(runtime(images), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(runtime(images), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_pytorchs_defaults_change_nothing(program, threads):
    images = torch.randn(3, 3, 21, 18)
    expected = Runtime(program, threads=threads)(images)
    model = thinned(lively(tiny_digits()), 3, num_edges=100)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.float16):
            torch.set_default_dtype(dtype)
            assert torch.equal(Runtime(program, threads=threads)(images), expected)
            program_of_model = plan(model, (1, 8, 8)).apply(model)
            assert {t.dtype for t in tensors(program_of_model)} <= {torch.float32, torch.int64}
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        assert torch.equal(Runtime(program, threads=threads)(images), expected)
        plan(model, (1, 8, 8)).apply(model)


def test_places_in_the_arena_are_used_again(program):
    lowered = Runtime(program)._layout.lowered
    everything = sum(math.prod(size) for size in program.sizes())
    assert lowered.arena < 4 * everything
    space = Space()
    places = [space.take(100) for _ in range(4)]
    for place in places[1:3]:
        space.free(place, 100)
    assert space.take(200) == places[1]  # two neighbours make one room
    assert space.size == 4 * 112
