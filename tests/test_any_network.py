"""Any model compiled: what PyTorch can write down and ``torch.export`` can read, on kernels, in files, as ONNX and as C."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compiled import lively, thinned
from helpers import pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dnw
from dnw.compile import (
    Program,
    Runtime,
    _layers,
    _onnx,
    _program,
    _standalone,
    _tasks,
    compile,
    load_program,
    save_c,
    save_onnx,
    save_program,
)
from dnw.compile import _native as native
from dnw.compile._capture import HANDLERS, captured, operators_table
from dnw.compile._program import Convolution, Instruction, Linear, tensors
from dnw.compile._shrink import shrunk
from dnw.compile._torch import Foreign
from dnw.models import tiny_digits


class Residual(nn.Module):
    """A bottleneck with a shortcut of its own."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        inner = channels // 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).add_(self.shortcut(x))
        return F.relu_(x)


class Excited(nn.Module):
    """Depthwise convolutions with squeeze and excitation."""

    def __init__(self, channels: int, kernel: int, activation: nn.Module) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.BatchNorm2d(2 * channels), activation)
        self.apart = nn.Conv2d(2 * channels, 2 * channels, kernel, padding=kernel // 2, groups=2 * channels)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2 * channels, 4, 1), nn.ReLU())
        self.excite = nn.Sequential(nn.Conv2d(4, 2 * channels, 1), nn.Hardsigmoid())
        self.project = nn.Sequential(nn.Conv2d(2 * channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.apart(self.expand(x))
        return x + self.project(self.excite(self.squeeze(inner)) * inner)


class Shuffled(nn.Module):
    """Half of the channels pass by, then all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.body = nn.Sequential(nn.Conv2d(half, half, 3, padding=1, groups=2), nn.BatchNorm2d(half), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, dim=1)
        x = torch.cat([one, self.body(other)], dim=1)
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class Grown(nn.Module):
    """Each layer reads all before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels + 4 * i) for i in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(channels + 4 * i, 4, 3, padding=1) for i in range(3))
        self.down = nn.Sequential(nn.Conv2d(channels + 12, channels, 1), nn.AvgPool2d(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        known = [x]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            known.append(layer(F.relu(norm(torch.cat(known, 1)))))
        return self.down(torch.cat(known, 1))


class Windows(nn.Module):
    """Convolutions and pools of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, (1, 7), padding=(0, 3))
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.c = nn.Conv2d(8, 16, 5, stride=(2, 1), padding=(1, 2))
        self.d = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16)
        self.e = nn.Conv2d(16, 12, (3, 1), stride=3, groups=4)
        self.f = nn.Conv2d(12, 24, 2, groups=12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.leaky_relu(self.a(x), 0.1), 3, 1, 1)
        x = F.avg_pool2d(F.elu(self.b(x)), 3, 2, 1, ceil_mode=True, count_include_pad=False)
        x = F.pad(torch.tanh(self.c(x)), (1, 2, 0, 1))
        x = F.silu(self.e(F.gelu(self.d(x))))
        x = F.max_pool2d(F.gelu(self.f(x), approximate="tanh"), (2, 3), (1, 2), (1, 1), dilation=(1, 1), ceil_mode=True)
        return F.adaptive_avg_pool2d(x, (2, 3)).flatten(1)


class Tokens(nn.Module):
    """A small vision transformer."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.patches, self.heads = nn.Conv2d(3, width, 4, 4), heads
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 26, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.position
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        masked = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = (F.scaled_dot_product_attention(q, k, v) + masked).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(attended)
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x)[:, 0])


class ChannelsLast(nn.Module):
    """A block of ConvNeXt, and norms of groups and images."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.apart, self.norm = nn.Conv2d(channels, channels, 7, padding=3, groups=channels), nn.LayerNorm(channels, eps=1e-6)
        self.one, self.other = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.scale = nn.Parameter(torch.randn(channels))
        self.groups, self.images = nn.GroupNorm(2, channels), nn.InstanceNorm2d(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.other(F.gelu(self.one(self.norm(self.apart(x).permute(0, 2, 3, 1))))) * self.scale
        x = x + inner.permute(0, 3, 1, 2)
        return self.images(self.groups(x)).mean((2, 3))


class Several(nn.Module):
    """Two inputs, and outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.numbers = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(4, 6)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        x = self.maps(x) * self.numbers(y)[:, :, None, None]
        return {"maps": x[:, 1::2], "sums": (2 - x**3).clamp(-1, 0.5).mean((2, 3)), "same": y}


class Recurrent(nn.Module):
    """What no kernel does."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1]).softmax(-1)


def convolutional(*blocks: nn.Module, channels: int = 16) -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(channels, 5))
    return nn.Sequential(stem, nn.MaxPool2d(3, 2, 1), *blocks, *head)


IMAGES = (3, 35, 30)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "residual": (lambda: convolutional(Residual(16, 1), Residual(16, 2), Residual(16, 1)), (IMAGES,)),
    "wide": (lambda: convolutional(Residual(16, 1)), ((3, 35, 64),)),
    "excited": (lambda: convolutional(Excited(16, 3, nn.ReLU6()), Excited(16, 5, nn.Hardswish())), (IMAGES,)),
    "shuffled": (lambda: convolutional(Shuffled(16), Shuffled(16), Excited(16, 3, nn.SiLU())), (IMAGES,)),
    "grown": (lambda: convolutional(Grown(16), Grown(16)), ((3, 64, 50),)),
    "windows": (Windows, (IMAGES,)),
    "tokens": (Tokens, ((3, 20, 20),)),
    "channels last": (lambda: ChannelsLast(6), ((6, 9, 12),)),
    "several": (Several, ((3, 9, 7), (4,))),
    "layers": (lambda: nn.Sequential(nn.Linear(9, 20), nn.BatchNorm1d(20), nn.Sigmoid(), nn.Linear(20, 4)), ((9,),)),
}


def thin(model: nn.Module, density: float, dead: float = 0.2, seed: int = 1) -> nn.Module:
    """With few weights, and some channels that send or read nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                shape = module.weight.shape
                kept = torch.rand(shape, generator=generator) < density
                kept[torch.rand(len(kept), generator=generator) < dead] = False
                module.weight.copy_(torch.randn(shape, generator=generator) * kept / math.sqrt(density * kept[0].numel()))
    return model


def network(name: str, density: float = 0.3, dead: float = 0.2, seed: int = 0) -> tuple[nn.Module, list[Tensor]]:
    make, sizes = NETWORKS[name]
    torch.manual_seed(seed)
    model = thin(lively(make(), seed), density, dead, seed)
    return model, [torch.randn(3, *size) for size in sizes]


def results(model: Callable[..., object], inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        found = model(*inputs)
    if isinstance(found, Tensor):
        return [found]
    return list(found.values() if isinstance(found, dict) else found)  # type: ignore[call-overload]


def assert_near(found: list[Tensor], expected: list[Tensor], close: float = 2e-5) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert not a.numel() or float((a - b).abs().max()) <= close * max(1e-3, float(b.abs().max()))


def of_form(program: Program, sparse: bool) -> Program:
    """With all weights run one by one, or all dense."""
    nodes = [
        replace(node, instruction=replace(node.instruction, sparse=sparse))
        if isinstance(node.instruction, (Convolution, Linear)) and not getattr(node.instruction, "apart", False)
        else node
        for node in program.nodes
    ]
    return replace(program, nodes=tuple(nodes))


def program_of(model: nn.Module, inputs: list[Tensor], sparse: bool | None = None) -> Program:
    program = shrunk(captured(model, tuple(inputs)).program())
    return program if sparse is None else of_form(program, sparse)


FRONT = struct.Struct("<8sIQ32s")


def opened(whole: bytes) -> tuple[bytes, int, dict, bytes]:
    """The parts of a file: what it is, its version, its header and its arrays."""
    magic, version, length, _ = FRONT.unpack_from(whole)
    return magic, version, json.loads(whole[FRONT.size : FRONT.size + length]), whole[FRONT.size + length :]


def closed(magic: bytes, version: int, header: dict, arrays: bytes) -> bytes:
    """A file with a right checksum."""
    text = json.dumps(header).encode()
    return FRONT.pack(magic, version, len(text), hashlib.sha256(text + arrays).digest()) + text + arrays


def places_in(item: dict | list) -> Iterator[tuple[dict | list, object]]:
    for key, value in list(item.items() if isinstance(item, dict) else enumerate(item)):
        yield item, key
        if isinstance(value, (dict, list)):
            yield from places_in(value)


# --- the same outputs ---


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_models(name):
    model, inputs = network(name)
    model.train()
    found = compile(model, inputs)
    assert model.training
    model.eval()
    assert_near(results(found, inputs), results(model, inputs))
    assert_near(results(found, [x[:1] for x in inputs]), results(model, [x[:1] for x in inputs]))
    assert results(found, [x[:0] for x in inputs])[0].shape[0] == 0
    assert not found.report.way("PyTorch"), found.report
    assert found.report.error < 1e-5
    assert str(found.report).startswith("channels: ")
    if isinstance(model, Several):
        assert set(found(*inputs)) == {"maps", "sums", "same"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_program_of_all_channels_is_exact(name):
    """In double precision, and what is left of it as well: nothing but rounding to single precision is lost."""
    model, inputs = network(name)
    whole = captured(model, tuple(inputs)).program()
    expected = results(model.double(), [x.double() for x in inputs])
    assert_near(whole.run(*(x.double() for x in inputs)), expected, 1e-12)
    assert_near(shrunk(whole).run(*inputs), [x.float() for x in expected], 3e-6)


@pytest.mark.parametrize("dead", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_dead_parts_go_and_outputs_stay(name, dead):
    model, inputs = network(name, density=0.2, dead=dead)
    found = captured(model, tuple(inputs))
    whole, left = found.program(), shrunk(found.program())
    assert_near(left.run(*inputs), results(model, inputs))
    assert left.multiply_adds <= whole.multiply_adds
    if dead == 0.5 and name not in ("several", "channels last", "tokens"):
        assert left.multiply_adds < 0.9 * whole.multiply_adds
    if dead == 1.0 and name != "windows":
        assert left.multiply_adds == 0


def test_the_report_of_a_network_of_graphs_agrees_with_its_plan():
    model = thinned(lively(tiny_digits()), 3, num_edges=100)
    report, found = compile(model, torch.randn(2, 1, 8, 8)).report, dnw.compile.plan(model, (1, 8, 8))
    assert report.parameters[1] == found.kept_parameters
    assert report.multiply_adds[1] == found.kept_multiply_adds
    gone = [sum(nodes) - sum(kept) for nodes, kept in ((row.nodes, row.kept) for row in found.rows)]
    assert report.channels[0] - report.channels[1] >= sum(gone) > 0
    sums = [row for row in report.rows if row.name == "graph"]
    assert sum(row.weights for row in sums) == found.rows[0].kept_edges
    assert all(0 < row.density < 1 for row in sums)


def test_channels_that_are_pruned_shrink_a_residual_network():
    model, inputs = network("residual", density=1.0, dead=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dnw.wire(model, optimizer, rule=dnw.RandomGraph(), density=0.5, pattern=dnw.Channels(), seed=0).remove()
    found = compile(model, inputs)
    before, after = found.report.channels
    assert after < 0.75 * before
    assert_near(results(found, inputs), results(model, inputs))


class InPlace(nn.Module):
    """What is read after it was changed in place, and through another view."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        flat = x.flatten(1)
        y = x.relu_()
        x.mul_(2.0)
        return (x + y).flatten(1) + flat


def test_what_is_changed_in_place_is_seen_by_all():
    model, x = InPlace().eval(), torch.randn(2, 3, 5, 4)
    assert_near(results(compile(model, x), [x]), results(model, [x]))


def test_a_module_that_is_used_twice_and_weights_that_are_shared():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.ReLU(), layer).eval(), torch.randn(2, 3, 6, 5)
    assert_near(results(compile(model, x), [x]), results(model, [x]))


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "regnet_y_400mf"])
def test_networks_that_nobody_here_wrote(name):
    """The long list is in benchmarks/foreign_networks.py."""
    import torchvision

    torch.manual_seed(0)
    model = thin(lively(getattr(torchvision.models, name)(weights=None)), 0.1, dead=0.05)
    images = torch.randn(2, 3, 64, 64)
    found = compile(model, images)
    assert not found.report.way("PyTorch")
    assert_near(results(found, [images]), results(model, [images]), 1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_transformers_of_another_library(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "bert":
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))
    else:
        sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 16}
        tokens = {"bos_token_id": 1, "eos_token_id": 1}
        model = transformers.GPT2Model(transformers.GPT2Config(vocab_size=50, use_cache=False, **sizes, **tokens))
    words = torch.randint(50, (3, 9))
    found = compile(model.eval(), words)
    assert {row.kind for row in found.report.way("PyTorch")} == {"embedding"}
    with torch.no_grad():
        expected = model(words).last_hidden_state
    assert_near([found(words).last_hidden_state], [expected], 1e-4)


def test_what_torch_export_has_made_is_compiled_too():
    model, (x,) = network("residual")
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    found = compile(exported, x)
    assert_near(results(found, [x[:1]]), results(model, [x[:1]]))


# --- kernels ---

kernels = pytest.mark.skipif(native.kernels() is None, reason="the kernels are not built (no C compiler)")


@kernels
@pytest.mark.kernels
@pytest.mark.parametrize(("name", "sparse", "lanes"), pairs(NETWORKS, [False, True], [4, 8, 16]))
def test_kernels_agree_with_pytorch_whatever_memory_held(name, sparse, lanes, monkeypatch):
    if lanes > native.lanes():
        pytest.skip(f"this machine has no vectors of {lanes} floats")
    monkeypatch.setattr(native, "lanes", lambda: lanes)
    monkeypatch.setattr(native, "_floats", lambda *shape: torch.full(shape, math.nan))
    monkeypatch.setattr(native._Layout, "take_arena", lambda layout: native._floats(layout.lowered.arena))
    model, inputs = network(name)
    program = program_of(model, inputs, sparse)
    expected = results(model, inputs)
    for cache in (1, 60_000):
        runtime = Runtime(program)
        runtime._layouts = [native._Layout(piece.program, cache) for piece in runtime._pieces]
        assert_near(results(runtime, inputs), expected)
    for threads in (2, 3):
        runtime = Runtime(program, threads=threads)
        assert_near(results(runtime, [x[:1] for x in inputs]), [y[:1] for y in expected])
        assert_near(results(runtime, inputs), expected)


@kernels
@pytest.mark.kernels
def test_every_kernel_of_layers_runs_in_these_networks():
    kinds = set[str]()
    for name in NETWORKS:
        program = program_of(*network(name))
        for sparse in (False, True):
            kinds |= {record.kind for record in Runtime(of_form(program, sparse))._layout.lowered.records}
    assert kinds >= set(native.tables().kinds) - {"edges", "matrix", "instance_norm", "rectify", "slide"}


@kernels
@pytest.mark.kernels
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sides=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([(1, 5, 7), (2, 4, 6), (3, 3, 3), (4, 4, 8), (1, 1, 1), (1, 40, 9)]),
    sparse=st.booleans(),
    seed=st.integers(0, 5),
)
def test_convolutions_of_any_kind(sides, kernel, stride, padding, dilation, groups, sparse, seed):
    count, sources, targets = groups
    if any(side + 2 * p < d * (k - 1) + 1 for side, p, d, k in zip(sides, padding, dilation, kernel, strict=True)):
        return
    torch.manual_seed(seed)
    weight = torch.randn(targets, sources // count, *kernel)
    weight = weight * (torch.rand_like(weight) < 0.4) if sparse else weight
    convolution = Convolution(weight, None, stride, padding, count, dilation, sparse)
    relu, after = (
        _layers.Activation("relu"),
        Convolution(torch.randn(2, targets, 3, 3), None, (1, 1), (1, 1), 1, (1, 1), sparse),
    )
    program = Program.chain((convolution, relu, after), (sources, *sides))
    images = torch.randn(2, sources, *sides)
    expected = program(images)
    images[1] = math.nan
    found = Runtime(program)(images)
    assert_near([found[0]], [expected[0]])


@kernels
@pytest.mark.parametrize("kind", _layers.ACTIVATIONS)
def test_activations_over_their_whole_range(kind):
    numbers = {"clamp": (-1.5, 2.0), "leaky_relu": (0.2,), "elu": (1.3,)}.get(kind, ())
    activation = _layers.Activation(kind, *numbers)
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, 30.0, -30.0, 88.0, -88.0, 200.0, -200.0])
    x = torch.cat([torch.linspace(-12, 12, 4096), ends]).view(1, 4, 1, -1)
    program = Program.chain((activation,), (4, 1, x.shape[-1]))
    torch.testing.assert_close(Runtime(program)(x), activation(x.double()).float(), rtol=3e-6, atol=4e-7)
    assert Runtime(program)(torch.full_like(x, math.nan)).isnan().all()


# --- other forms ---


@pytest.mark.parametrize("name", NETWORKS)
def test_files_hold_all_of_it(name, tmp_path):
    model, inputs = network(name)
    found = compile(model, inputs)
    assert found.save(tmp_path / "net.dnw") == (tmp_path / "net.dnw").stat().st_size
    loaded = load_program(tmp_path / "net.dnw")
    for a, b in zip(loaded.run(*inputs), found.program.run(*inputs), strict=True):
        assert torch.equal(a, b)


@kernels
@pytest.mark.kernels
@pytest.mark.parametrize("name", ["residual", "windows", "tokens", "several"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_files_that_someone_edits_are_refused_or_run_without_harm(name, tmp_path, data):
    path = tmp_path / "net.dnw"
    if not (tmp_path / "whole").exists():
        save_program(program_of(*network(name), sparse=True), tmp_path / "whole")
    magic, version, header, arrays = opened((tmp_path / "whole").read_bytes())
    places = list(places_in(header))
    holder, key = data.draw(st.sampled_from(range(len(places))).map(places.__getitem__))
    other = data.draw(st.sampled_from(range(len(places))).map(places.__getitem__))
    values = [-1, 0, 1, 3, 7.0, 2**40, 1e300, None, "x", "relu", [], {}, [1, 2], {"array": "f4"}]
    holder[key] = data.draw(st.sampled_from([*values, *[copy.deepcopy(other[0][other[1]])] * 10]))
    path.write_bytes(closed(magic, version, header, arrays))
    try:
        changed = load_program(path)
        sizes = changed.sizes()
        runtime = Runtime(changed) if sum(map(math.prod, sizes)) < 1e7 else None
    except ValueError:
        return
    if runtime is not None:
        images = [torch.randn(1, *size) for size in changed.input_sizes]
        found = runtime._run_pieces(list(images))
        if all(bool((t.abs() < 1e3).all()) for t in tensors(changed)):  # others may overflow, in whatever order sums are made
            for a, b in zip(found, changed.run(*images), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2, equal_nan=True)


def test_weights_that_are_0_take_no_room_in_a_file(tmp_path):
    sizes = []
    for density in (1.0, 0.05):
        layer = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        with torch.no_grad():
            layer.weight.mul_(torch.rand_like(layer.weight) < density)
        sizes.append(compile(layer, torch.randn(1, 64, 8, 8)).save(tmp_path / "net.dnw"))
    assert sizes[1] < 0.15 * sizes[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_computes_the_same(name, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs = network(name)
    save_onnx(program_of(model, inputs), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    given = {end.name: x.numpy() for end, x in zip(session.get_inputs(), inputs, strict=True)}
    assert_near([torch.from_numpy(x) for x in session.run(None, given)], results(model, inputs), 1e-4)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("name", NETWORKS)
def test_c_computes_the_same(name, tmp_path):
    model, inputs = network(name)
    program = program_of(model, inputs)
    if name in ("tokens", "channels last", "windows"):
        with pytest.raises(
            ValueError, match=r"(LayerNorm|AdaptiveMean|Pad|Attention) is not written as C; compiled for it are"
        ):
            save_c(program, tmp_path / "net.c")
        return
    save_c(program, tmp_path / "net.c")
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "net.h"\n'
        "static float image[NET_INPUTS], outputs[NET_OUTPUTS];\n"
        "int main(void) {\n"
        "  while (fread(image, sizeof image, 1, stdin) == 1) {\n"
        "    net_run(image, outputs);\n"
        "    fwrite(outputs, sizeof outputs, 1, stdout);\n"
        "  }\n"
        "  return 0;\n"
        "}\n"
    )
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    subprocess.run(["cc", *flags, "-O1", "net.c", "main.c", "-lm", "-o", "net"], cwd=tmp_path, check=True)
    given = torch.cat([x.flatten(1) for x in inputs], 1).contiguous()
    ran = subprocess.run(["./net"], cwd=tmp_path, input=given.numpy().tobytes(), capture_output=True, check=True)
    found = torch.frombuffer(bytearray(ran.stdout), dtype=torch.float32).view(3, -1)
    expected = results(model, inputs)
    parts = found.split([math.prod(y.shape[1:]) for y in expected], dim=1)
    assert_near([part.reshape(y.shape) for part, y in zip(parts, expected, strict=True)], expected)


def test_every_target_has_every_instruction_or_refuses_it_by_name():
    modules = (_program, _layers)
    kinds = {kind for kind in Instruction.__subclasses__() if kind.__module__ in {module.__name__ for module in modules}}
    assert set(_tasks.EMITTERS) == kinds
    assert set(_onnx.EMITTERS) == kinds
    by_name = {"AdaptiveMean", "Attention", "Beside", "LayerNorm", "Pad"}
    assert {kind.__name__ for kind in kinds - set(_standalone.EMITTERS)} == by_name


# --- what PyTorch runs, and what is refused ---


def test_what_no_instruction_stands_for_runs_in_pytorch(tmp_path):
    torch.manual_seed(0)
    model, x = Recurrent().eval(), torch.randn(4, 5, 6)
    found = compile(model, x)
    assert_near(results(found, [x]), results(model, [x]))
    assert {row.kind for row in found.report.way("PyTorch")} == {"lstm", "softmax"}
    assert 0 < found.report.foreign <= 1
    assert "in PyTorch: 2 operators" in str(found.report)
    with pytest.raises(ValueError, match="strict=True, and this would run in PyTorch: 'lstm in lstm', 'softmax in the model'"):
        compile(model, x, strict=True)
    with pytest.raises(ValueError, match="lstm is not written as ONNX|PyTorch runs lstm"):
        save_onnx(found.program, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="lstm"):
        save_c(found.program, tmp_path / "net.c")
    with pytest.raises(ValueError, match="PyTorch runs lstm, which files do not hold"):
        save_program(found.program, tmp_path / "net.dnw")
    assert not list(tmp_path.iterdir())
    assert any(isinstance(node.instruction, Foreign) for node in found.program.nodes)


class Words(nn.Module):
    """Whole numbers in, a mask of them, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(20, 12), nn.Linear(12, 4)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) * (words > 3).unsqueeze(-1)
        zeros = torch.zeros(words.shape[0], 1, 12)
        return self.out(torch.cat([zeros, x + zeros], 1)[:, words.shape[1] // 2 :])


def test_whole_numbers_go_in():
    torch.manual_seed(0)
    model, words = Words().eval(), torch.randint(20, (5, 7))
    found = compile(model, words)
    assert_near(results(found, [words]), results(model, [words]))
    assert_near(results(found, [words[:1]]), results(model, [words[:1]]))
    in_numpy = found(words.numpy())
    assert isinstance(in_numpy, np.ndarray)
    assert_near([torch.from_numpy(in_numpy)], results(model, [words]))
    with pytest.raises(ValueError, match="input 0: expected whole numbers"):
        found(words.float())
    with pytest.raises(ValueError, match=r"up to 2\^24 are exact"):
        found(words + (1 << 24))


class OfTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean()


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class RandomNaN(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.rand_like(x) < 0.5, x, math.nan)


class AsManyAsThereAre(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: x.nonzero().shape[0]] * 2


def test_what_cannot_be_compiled_is_refused_in_one_line(capfd):
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="sizes that depend on the numbers in a tensor are not compiled"):
        compile(AsManyAsThereAre(), x)
    with pytest.raises(ValueError, match="mean.default mixes the images of a batch"):
        compile(OfTheBatch(), x)
    with pytest.raises(ValueError, match=r"cannot be exported by torch\.export, which compiling begins with \(\w+: .*\)$"):
        compile(Branches(), x)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match=r"its code fixes the number of images in a batch"):
        compile(FixedBatch(), x)
    for drawn in (Random(), RandomNaN()):
        with pytest.raises(RuntimeError, match="outputs of the compiled model differ .* draws random numbers"):
            compile(drawn, x)
    for wrong in (x + 1j, torch.tensor(1.0), x[:0], [], "x", None):
        with pytest.raises(ValueError, match="example: .*; expected a tensor"):
            compile(nn.Conv2d(3, 4, 1), wrong)
    with pytest.raises(ValueError, match="no model to compile"):
        compile(lambda y: y, x)  # type: ignore[arg-type]
    found = compile(nn.Conv2d(3, 4, 1), x)
    for wrong in (x[:, :2], x[..., :3], x[0]):
        with pytest.raises(ValueError, match=r"expected floating-point images \[batch, 3, 4, 4\]"):
            found(wrong)
    with pytest.raises(ValueError, match="2 inputs for a network of 1"):
        found(x, x)


class Written(nn.Module):
    """A forward of one line, and what it uses."""

    def __init__(self, forward: Callable[..., object], **used: nn.Module | Tensor) -> None:
        super().__init__()
        self.written = forward
        for name, thing in used.items():
            if isinstance(thing, nn.Module):
                self.add_module(name, thing)
            else:
                self.register_buffer(name, thing)

    def forward(self, *inputs: Tensor) -> object:
        return self.written(self, *inputs)


def in_place(s, x):
    h = s.l(x)
    y = h.clone()
    y[y < 0] = 0
    return h + 2 * y


def through_a_copy(s, x):
    x = s.l(x)
    y = x.transpose(1, 2).reshape(len(x), -1)
    x.relu_()
    return y


def through_a_slice(s, x):
    x = s.c(x)
    x[:, 0] *= 2
    return x


def moved_in_place(s, x):
    x = s.c(x).clone()
    x[:, 1:3] += 1
    x[:, :, 2:4] = x[:, :, :2]
    x[..., 0] = 0
    return s.d(x)


def into_zeros(s, x):
    whole = x.new_zeros(x.shape[0], 20)
    whole[:, :3] = s.l(x)
    return whole


def clears_its_input(s, x):
    x[x < 0] = 0
    return s.l(x)


def frozen(s, x):
    with torch.no_grad():
        y = s.l(x)
    return s.m(y)


def counts(s, x):
    s.n += 1
    return s.l(x) + s.n


def attends_to_places(s, x):
    x = s.c(x)
    return x * torch.sigmoid(s.d(x))


V, T, M = (12,), (6, 16), (3, 9, 9)
WRITTEN: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...] | Tensor], set[str] | None]] = {
    "a number of each image": (lambda: Written(lambda s, x: s.l(x).squeeze(-1), l=nn.Linear(12, 1)), [V], set()),
    "one of several numbers": (lambda: Written(lambda s, x: s.l(x)[:, 0], l=nn.Linear(12, 3)), [V], set()),
    "flattened to numbers": (lambda: Written(lambda s, x: s.l(x).flatten() * 2 + 1, l=nn.Linear(12, 1)), [V], set()),
    "sums of numbers": (lambda: Written(lambda s, x: s.l(x).sum(1) + s.l(x).amax(1), l=nn.Linear(12, 3)), [V], None),
    "numbers in": (lambda: Written(lambda s, x, t: s.l(x) * t[:, None], l=nn.Linear(12, 3)), [V, ()], None),
    "steps in": (
        lambda: Written(lambda s, x, t: s.l(x) + s.e(t), l=nn.Linear(12, 3), e=nn.Embedding(9, 3)),
        [V, torch.tensor([3, 8, 0, 5, 1])],
        {"embedding"},
    ),
    "truth in": (
        lambda: Written(lambda s, x, m: s.l(x).masked_fill(m, 0), l=nn.Linear(12, 3)),
        [V, torch.tensor([[True, False, False], [False, True, True], [False] * 3, [True] * 3, [True, False, True]])],
        {"masked_fill"},
    ),
    "bytes in": (
        lambda: Written(lambda s, x: s.c(x.float() / 255), c=nn.Conv2d(3, 4, 3)),
        [(torch.arange(5 * 3 * 49) * 37 % 256).to(torch.uint8).view(5, 3, 7, 7)],
        set(),
    ),
    "a place of each image": (
        lambda: Written(lambda s, x: s.l(x)[torch.arange(x.shape[0]), x[:, :, 0].argmax(1)], l=nn.Linear(16, 4)),
        [T],
        {"arange", "argmax", "index", "slice", "select"},
    ),
    "numbers that count images": (
        lambda: Written(lambda s, x: s.l(x) + torch.arange(x.shape[0]).float()[:, None], l=nn.Linear(12, 3)),
        [V],
        None,
    ),
    "by the number of images": (lambda: Written(lambda s, x: s.l(x) / x.shape[0] ** 0.5, l=nn.Linear(12, 3)), [V], {"div"}),
    "by its inverse": (lambda: Written(lambda s, x: s.l(x) * (1.0 / x.shape[0]), l=nn.Linear(12, 3)), [V], {"mul"}),
    "in place": (lambda: Written(in_place, l=nn.Linear(12, 3, bias=False)), [V], None),
    "in place after a copy": (lambda: Written(through_a_copy, l=nn.Linear(16, 8)), [T], set()),
    "in place through a slice": (lambda: Written(through_a_slice, c=nn.Conv2d(3, 4, 3, bias=False)), [M], set()),
    "places in place": (
        lambda: Written(moved_in_place, c=nn.Conv2d(3, 4, 3), d=nn.Conv2d(4, 2, 3)),
        [M],
        set(),
    ),
    "into zeros": (lambda: Written(into_zeros, l=nn.Linear(12, 3)), [V], set()),
    "its input in place": (lambda: Written(clears_its_input, l=nn.Linear(12, 3)), [V], None),
    "its buffer in place": (lambda: Written(counts, l=nn.Linear(12, 3), n=torch.zeros(())), [V], set()),
    "without gradients": (lambda: Written(frozen, l=nn.Linear(12, 4), m=nn.Linear(4, 3)), [V], set()),
    "two that never meet": (
        lambda: Written(lambda s, a, b: (s.a(a).relu(), s.b(b).relu()), a=nn.Linear(12, 3), b=nn.Linear(5, 2)),
        [V, (5,)],
        set(),
    ),
    "double": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double(), [M], set()),
    "a norm without eps": (lambda: nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8, eps=0)), [V], {"layer_norm"}),
    "a parameter and nothing": (
        lambda: Written(lambda s, x: {"a": s.l(x), "b": s.g, "c": None, "d": 3}, l=nn.Linear(12, 3), g=torch.ones(())),
        [V],
        set(),
    ),
    "the batch as second dimension": (lambda: Written(lambda s, x: s.l(x).transpose(0, 1), l=nn.Linear(16, 3)), [T], set()),
    "a choice": (lambda: Written(lambda s, x: s.l(x).argmax(-1), l=nn.Linear(12, 5)), [V], {"argmax"}),
    "many dimensions": (
        lambda: Written(lambda s, x: (x.view(-1, 2, 2, 2, 2) + s.c).relu(), c=torch.randn(2, 2, 2, 2)),
        [(16,)],
        {"rearrange of many dimensions"},
    ),
    "as large as before": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU()), [M], set()),
    "attention to places": (
        lambda: Written(attends_to_places, c=nn.Conv2d(3, 4, 3), d=nn.Conv2d(4, 1, 3, padding=1)),
        [M],
        set(),
    ),
    "rotations": (lambda: Written(lambda s, x: s.l(x) * s.c, l=nn.Linear(16, 8), c=torch.randn(6, 8)), [T], set()),
    "channels shuffled": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ChannelShuffle(2), nn.Conv2d(8, 4, 1)), [M], set()),
    "pixels shuffled": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 3, 3)), [M], set()),
    "a stack": (lambda: Written(lambda s, x: torch.stack([s.l(x), -s.l(x)], 1), l=nn.Linear(12, 3)), [V], set()),
    "chosen by a list": (lambda: Written(lambda s, x: s.l(x)[:, [2, 0, -1]], l=nn.Linear(12, 3)), [V], set()),
    "lines": (
        lambda: nn.Sequential(
            nn.Conv1d(6, 8, 3, 2, 1), nn.ReLU(), nn.Conv1d(8, 8, 3, padding="same", groups=4), nn.MaxPool1d(2)
        ),
        [T],
        None,
    ),
    "slopes": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 4, 3), nn.PReLU()), [M], set()),
    "larger again": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3)), [M], set()),
}


@pytest.mark.parametrize("zeros", [False, True], ids=["drawn", "zeros"])
@pytest.mark.parametrize("name", WRITTEN)
def test_models_as_people_write_them(name, zeros):
    """Outputs, their kinds and how they are packed, of any batch, whatever the example; inputs and model stay as they were."""
    make, sizes, foreign = WRITTEN[name]
    torch.manual_seed(0)
    model = make().eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    drawn = [size if isinstance(size, Tensor) else torch.randn(5, *size) for size in sizes]
    example = [torch.zeros_like(x) if zeros else x.clone() for x in drawn]
    found = compile(model, [x[:2] for x in example])
    if foreign is not None:
        assert {row.kind for row in found.report.way("PyTorch")} <= foreign
    for batch in (1, 2, 5):
        given = [x[:batch].clone() for x in drawn]
        outputs = found(*given)
        assert all(torch.equal(a, b[:batch]) for a, b in zip(given, drawn, strict=True))
        kind = next((p.dtype for p in model.parameters()), torch.float32)
        with torch.no_grad():
            expected = model(*(x.to(kind) if x.is_floating_point() else x for x in given))
        model.load_state_dict(state)
        mine, theirs = pytree.tree_flatten(outputs), pytree.tree_flatten(expected)
        assert mine[1] == theirs[1]
        for a, b in zip(mine[0], theirs[0], strict=True):
            if not isinstance(b, Tensor):
                assert a == b
                continue
            assert a.shape == b.shape
            assert a.dtype == (torch.float32 if b.is_floating_point() else b.dtype)
            assert_near([a.double()], [b.double()], 1e-5)


def test_maps_whose_rows_begin_anywhere_in_a_vector():
    """Convolutions of 5x5 and 3x3 pixels on the same small maps, per channel, with activations of their own."""
    torch.manual_seed(0)
    for side in (5, 7, 8):
        layers = [nn.Conv2d(4, 24, 1)]
        for kernel, act in ((5, nn.SiLU()), (3, nn.SiLU()), (3, nn.Hardswish()), (7, nn.GELU()), (3, nn.Sigmoid())):
            layers += [nn.Conv2d(24, 24, kernel, padding=kernel // 2, groups=24), act]
        model, x = nn.Sequential(*layers).eval(), torch.randn(3, 4, side, side)
        assert_near(results(compile(model, x), [x]), results(model, [x]))


def test_the_check_is_on_other_inputs_as_well():
    """A model that goes another way for zeros is found out on an example of zeros."""

    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if torch.compiler.is_compiling() or not bool(x.any()) else x

    with pytest.raises(RuntimeError, match="goes another way for other inputs"):
        compile(Padded(), torch.zeros(2, 5))


def test_whole_numbers_that_float32_does_not_hold_are_refused_inside_too():
    found = compile(
        Written(lambda s, i: s.e((i * 79_190 + 13) % 1000).mean(1), e=nn.Embedding(1000, 4)), torch.ones(2, 3).long()
    )
    with pytest.raises(ValueError, match=r"mul: whole numbers from .* handed on exactly up to 2\^24"):
        found(torch.full((2, 3), 5000))


def test_what_is_no_network_on_images_one_by_one_is_refused():
    x = torch.randn(2, 12)
    norm = nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5))
    trained = torch.export.export(norm, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    for model in (nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5, track_running_stats=False)), trained):
        with pytest.raises(ValueError, match="a norm over the images of a batch"):
            compile(model, x)
    for forward in (lambda s, a: torch.cat([a, a]), lambda s, a: torch.eye(a.shape[0]) @ a):
        with pytest.raises(ValueError, match="mixes the images of a batch"):
            compile(Written(forward), x)
    with pytest.raises(ValueError, match="makes complex numbers"):
        compile(Written(lambda s, a: torch.fft.rfft(a).abs()), x)


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(3, 3, 1, True, False), nn.MaxPool2d(2, 3, 1, ceil_mode=True), nn.MaxPool2d(3, 2, 0, 2, ceil_mode=True)],
    ids=str,
)
def test_windows_that_begin_beyond_the_end_are_the_same_in_onnx(pool, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    for sides in ((17, 15), (9, 8), (16, 16)):
        model, x = nn.Sequential(nn.Conv2d(3, 4, 1), pool).eval(), torch.randn(2, 3, *sides)
        save_onnx(compile(model, x).program, tmp_path / "net.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert_near([torch.from_numpy(found)], results(model, [x]))
    means = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, 3, 1, ceil_mode=True)).eval()
    with pytest.raises(ValueError, match="the last of which PyTorch leaves out"):
        save_onnx(compile(means, torch.randn(2, 3, 17, 15)).program, tmp_path / "net.onnx")


def test_the_docs_have_the_table_of_operators():
    docs = Path(__file__).parents[1] / "docs" / "compile.md"
    assert f"<!-- operators -->\n\n{operators_table()}\n" in docs.read_text(), f"put this there:\n\n{operators_table()}"


def test_handlers_are_named_after_operators_that_pytorch_has():
    for name in HANDLERS:
        assert hasattr(torch.ops.aten, name) or name in ("numpy_T", "lift_fresh_copy"), name


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda image: image.relu() * 2)(self.conv(x))


class Differentiated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: (y * y).sum())(x)


class Scaling(nn.Module):
    """Changes what it holds: through ``.data`` a value, or its own parameter."""

    def __init__(self, parameter: bool) -> None:
        super().__init__()
        self.conv, self.parameter = nn.Conv2d(3, 4, 3), parameter

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        with torch.no_grad():
            (self.conv.weight if self.parameter else y.data).mul_(3)
        return y * 2


def test_transforms_of_functions_are_compiled_or_refused_and_leave_torch_as_it_was():
    images = torch.randn(4, 3, 8, 8)
    model = Mapped().eval()
    assert_near(results(compile(model, (images,)), (images,)), results(model, (images,)))
    with contextlib.suppress(ValueError):
        compile(Differentiated(), images)
    torch.randn(3)  # no transform is left open


@pytest.mark.parametrize("parameter", [False, True])
def test_models_that_change_what_they_hold_stay_as_they_were(parameter):
    model = Scaling(parameter).eval()
    before = model.conv.weight.detach().clone()
    with contextlib.nullcontext() if parameter else pytest.raises(ValueError, match="cannot be exported"):
        compile(model, torch.randn(2, 3, 8, 8))
    assert torch.equal(model.conv.weight, before)


class Lambda(nn.Module):
    """A function of itself and of its inputs, with modules, parameters and buffers by name."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, (nn.Module, nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def conv(outputs: int = 3, kernel: int = 3, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(3, outputs, kernel, **settings)


SIX = (6,)
ODD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "larger by a broken factor": (lambda: Lambda(lambda m, x: F.interpolate(m.c(x), scale_factor=3.3), c=conv(4, 4)), M),
    "larger by a whole factor": (lambda: Lambda(lambda m, x: F.interpolate(m.c(x), scale_factor=3.0), c=conv(4, 4)), M),
    "minus bytes": (
        lambda: Lambda(lambda m, x: m.c(x) - m.z, c=conv(), z=torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]),
        M,
    ),
    "minus the least of int8": (
        lambda: Lambda(lambda m, x: m.c(x) - m.z, c=conv(), z=torch.tensor([-128] * 3, dtype=torch.int8)[:, None, None]),
        M,
    ),
    "bytes, scaled": (
        lambda: Lambda(
            lambda m, x: torch.add(m.c(x), m.z, alpha=3), c=conv(), z=torch.tensor([100] * 3, dtype=torch.uint8)[:, None, None]
        ),
        M,
    ),
    "a number of more dimensions": (lambda: Lambda(lambda m, x: m.l(x) * m.p, l=nn.Linear(6, 3), p=torch.ones(1, 1, 1)), SIX),
    "mean over the rows of images without channels": (
        lambda: Lambda(lambda m, x: F.adaptive_avg_pool2d(m.c(x).squeeze(1), 1), c=conv(1, padding=1)),
        M,
    ),
    "floats written as whole numbers": (
        lambda: Lambda(lambda m, x: torch.zeros(x.shape, dtype=torch.long).copy_(m.l(x) * 5).float(), l=nn.Linear(6, 6)),
        SIX,
    ),
    "every other of one": (lambda: Lambda(lambda m, x: m.c(x).mean((2, 3), keepdim=True)[:, :, ::2], c=conv()), M),
    "a power for each channel": (
        lambda: Lambda(lambda m, x: m.l(x).abs() ** m.p, l=nn.Linear(6, 3), p=torch.tensor([1.0, 2.0, 3.0])),
        SIX,
    ),
    "half a bias": (
        lambda: Lambda(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5), b=torch.randn(3), w=torch.randn(6, 3)),
        SIX,
    ),
    "grown from nothing": (lambda: Lambda(lambda m, x: torch.cat([torch.tensor([]), m.l(x)], 1), l=nn.Linear(6, 3)), SIX),
    "an empty part": (lambda: Lambda(lambda m, x: torch.cat([m.l(x)[:, :0], m.l(x)], 1), l=nn.Linear(6, 2)), SIX),
    "a query that sees no key": (
        lambda: Lambda(
            lambda m, x: (lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=m.seen))(m.l(x)[:, None]),
            l=nn.Linear(8, 8),
            seen=torch.arange(5)[:, None].expand(5, 5) != 2,
        ),
        (5, 8),
    ),
    "times a number that is read": (lambda: Lambda(lambda m, x: m.c(x) * m.z.item(), c=conv(), z=torch.tensor(2.0)), M),
    "by zero": (lambda: Lambda(lambda m, x: m.c(x) / m.z, c=conv(), z=torch.tensor([1.0, 0.0, 2.0])[:, None, None]), M),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.kernels
@pytest.mark.parametrize("name", ODD)
def test_odd_models_are_computed_as_pytorch_does(name):
    make, size = ODD[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(3, *size)
    with torch.no_grad():
        expected = model(x.clone())
    found = compile(model, x[:2].clone())(x.clone())
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.kernels
@pytest.mark.parametrize("kind", [nn.Tanh, nn.ELU])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 0.3, 1.0, 30.0])
def test_small_numbers_keep_their_digits(kind, size):
    x = size * torch.linspace(-1, 1, 4 * 36).view(1, 4, 6, 6)
    program = program_of(nn.Sequential(nn.Conv2d(4, 4, 1, groups=4, bias=False), kind()).eval(), [x])
    torch.testing.assert_close(Runtime(program)(x), program(x), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_decomposed_program_is_compiled_without_pytorch():
    parts = [conv(8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(72, 6)]
    model, x = nn.Sequential(*parts, nn.LayerNorm(6)), torch.randn(2, *M)
    lively(model)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).run_decompositions()
    found = compile(exported, x)
    assert not found.report.way("PyTorch")
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)


def test_weights_of_an_operator_with_several_results_count_once():
    report = compile(Lambda(lambda m, x: m.l(x)[0], l=nn.LSTM(8, 8, batch_first=True)), torch.randn(1, 5, 8)).report
    assert report.parameters == (576, 576)


@kernels
def test_an_interrupt_leaves_the_threads_of_an_image_ready():
    """Who waits may be interrupted at any moment; who computes must not, or the others wait for good."""
    runtime = Runtime(program_of(nn.Sequential(conv(4), nn.ReLU()), [x := torch.randn(1, *M)]), threads=2)
    expected, leader, called = runtime(x), runtime._leader, []

    class Interrupted:
        def submit(self, *work: Any) -> None:
            called.append(leader.submit(*work))
            raise KeyboardInterrupt

    for _ in range(20):
        runtime._leader = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            runtime(x)
        runtime._leader = leader
        assert torch.equal(runtime(x), expected)
    assert all(done.result() is None for done in called)
