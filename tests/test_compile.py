"""Compiling: the plan, and a compacted network that equals the trained one."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compiled import lively, small_program, thinned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dnw
from dnw.cli import main
from dnw.compile import Plan, Program, Runtime, code_size, load_program, measured, plan, save_c, save_onnx, save_program
from dnw.compile import _native as native
from dnw.compile._plan import planned
from dnw.compile._program import Convolution, Restore, tensors
from dnw.graphs import INSTANCE_NORM, ContinuousTimeGraph, DiscreteTimeGraph, StaticGraph
from dnw.models import (
    GraphChain,
    Stage,
    mobilenet_v1,
    tiny_cifar10,
    tiny_cifar10_continuous,
    tiny_cifar10_discrete,
    tiny_digits,
    tiny_mnist,
)
from dnw.recipes import digits
from dnw.train import load_trained, override, train
from dnw.train._checkpoint import read_checkpoint, write_checkpoint


def assert_equal_to_the_trained(model: nn.Module, size: tuple[int, int, int], batch: int = 3) -> Plan:
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(5))
    before = copy.deepcopy(model.state_dict())
    found, program = planned(model, size)
    with torch.no_grad():
        expected = model(images)
    scale = expected.abs().max().clamp_min(1e-3)
    for run in (program, Runtime(program), Runtime(program, native=False)):
        assert ((run(images) - expected).abs().max() / scale).item() < 1e-4
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert program.output_size == tuple(expected.shape[1:])
    assert found.kept_multiply_adds == program.multiply_adds
    shared = any(isinstance(m, StaticGraph) and m.levels.shared_outputs for m in model.modules())  # one weight serves twice
    assert program.multiply_adds <= found.multiply_adds or shared
    return found


# --- exact ---


@pytest.mark.kernels
@pytest.mark.parametrize("edges", [1, 8, 30, 60, 100, 400, None])
@pytest.mark.filterwarnings("ignore:no path of active edges")
def test_the_digits_net(edges):
    model = lively(tiny_digits())
    assert_equal_to_the_trained(model if edges is None else thinned(model, 3, num_edges=edges), (1, 8, 8))


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("make", "size", "budget"),
    [
        (tiny_mnist, (1, 28, 28), {"num_edges": 150}),
        (tiny_cifar10, (3, 32, 32), {"num_edges": 2_000}),
        (tiny_cifar10, (3, 32, 32), {"num_edges": 32_000}),
        (lambda: tiny_cifar10(rank_all_entries=True), (3, 32, 32), {"num_edges": 2_000}),
        (tiny_cifar10_discrete, (3, 32, 32), {"num_edges": 1_000}),
    ],
)
def test_the_tiny_classifiers(make, size, budget):
    found = assert_equal_to_the_trained(thinned(lively(make()), 1, **budget), size)
    assert len(found.rows) == (make is not tiny_cifar10_discrete)  # which is one matrix, and stays whole
    assert all(0 < row.kept_edges < row.edges for row in found.rows)


@pytest.mark.parametrize(("side", "width"), [(32, 0.06), (32, 0.225), (64, 0.1)])
@pytest.mark.parametrize("learned", [False, True])
def test_mobilenet_as_a_chain(side, width, learned):
    model = GraphChain(10, image_stride=1 if side == 32 else 2, learned_classifier=learned)
    include = {"classifier.weight": 0.1} if learned else None
    budget = model.num_edges(width)
    names = [*budget, "classifier.weight"] if learned else list(budget)
    thinned(lively(model), 2, num_edges=budget, density=include, include=names)
    found = assert_equal_to_the_trained(model, (3, side, side))
    kept, constants = (sum(getattr(row, what) for row in found.rows) for what in ("kept_edges", "constants"))
    if width == 0.06:
        assert (kept, constants) == (0, 0)  # no path leads through
    else:
        assert min(kept, constants) > 0


@pytest.mark.kernels
def test_plain_mobilenet_with_channels_that_are_gone():
    model = lively(mobilenet_v1(10, width=0.25, image_stride=1))
    whole = assert_equal_to_the_trained(model, (3, 32, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dnw.wire(model, optimizer, density=0.5, pattern=dnw.Channels(), exclude=nn.Linear).remove()
    half = assert_equal_to_the_trained(model, (3, 32, 32))
    assert half.kept_multiply_adds < 0.4 * whole.kept_multiply_adds


def test_constant_nodes_differ_at_the_border():
    """One node without inputs sends to an output: what it sends is not the same at the border as inside."""
    graph = lively(StaticGraph((1, 1), 1))
    with torch.no_grad():
        graph.nodes[1].norm.bias.fill_(1.0)
        graph.nodes[1].norm.running_mean.zero_()
        graph.weight.copy_(torch.tensor([[0.0, 0], [0.7, 1.3]]))  # the inner node gets nothing; the output reads both
    model = nn.Sequential(graph).eval()
    found = assert_equal_to_the_trained(model, (1, 6, 5))
    assert (found.rows[0].constants, found.rows[0].kept, found.rows[0].kept_edges) == (1, (1, 0, 1), 1)
    outputs = found.apply(model).instructions[-1]
    constant = outputs.constant.maps()[0]
    assert not torch.allclose(constant[0, 0], constant[2, 2])
    assert torch.equal(constant[2, 2], constant[3, 3])


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Picture(Tensor):
    """Images of a class of their own, as libraries of transforms make them."""


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def hooked_graph() -> nn.Module:
    graph = DiscreteTimeGraph(4, 1, 1)
    graph.conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    return graph


def test_modules_that_are_used_twice():
    relu, norm, conv = nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
    block = nn.Sequential(conv, norm, relu)
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), relu, block, nn.Identity(), block, relu, conv))
    assert_equal_to_the_trained(model, (3, 9, 8))


def test_pooled_and_flattened_maps():
    pooled = (nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d((1, 1)), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5, 4))
    assert_equal_to_the_trained(lively(nn.Sequential(nn.Conv2d(3, 5, 3), *pooled)), (3, 9, 8))
    assert_equal_to_the_trained(lively(nn.Sequential(nn.Conv2d(3, 5, 8), nn.ReLU(), nn.Flatten(), nn.Linear(5, 4))), (3, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_another_precision(dtype):
    """Compiled networks compute in float32 with the very weights of the model."""
    model = thinned(lively(tiny_cifar10()), 3, num_edges=2_000).to(dtype)
    found = plan(model, (3, 32, 32))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = copy.deepcopy(model).float()(images)
    torch.testing.assert_close(Runtime(found.apply(model))(images), expected, rtol=1e-4, atol=1e-4)


def test_outputs_that_nothing_reaches_and_inputs_that_nothing_reads():
    model = lively(GraphChain(5, image_stride=1, stages=(Stage(6, 8, 1, 1), Stage(8, 8, 2, 2))))
    with torch.no_grad():
        model.graphs[0].weight[3] = 0  # an output of the first graph that gets nothing, so a constant input of the second
        model.graphs[1].weight[:, 2] = 0  # an input of the second graph that nothing reads
        model.graphs[0].weight[:, 4] = 0  # so that a channel of the first convolution goes
        model.graphs[1].weight[-2] = 0  # an output of the last graph that gets nothing
    found = assert_equal_to_the_trained(model, (3, 12, 12))
    assert found.channels[2] == (0, 1, 2, 3, 5)  # after the choice of channels of images comes the first convolution
    assert (0, 1, 4, 5, 6, 7) in found.channels
    assert found.channels[-2] == (0, 1, 2, 3, 4, 5, 7)
    assert found.channels[-1] == (0, 1, 2, 3, 4)


def test_nothing_reaches_the_end():
    model = lively(tiny_digits())
    with torch.no_grad():
        model.graph.weight[-16:] = 0
    found = assert_equal_to_the_trained(model, (1, 8, 8))
    assert found.kept_multiply_adds == 0


@st.composite
def graphs(draw):
    levels = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    shared = len(levels) > 1 and draw(st.booleans())
    outputs = draw(st.integers(1, levels[-1] if shared else 4))
    norm = draw(st.sampled_from([nn.BatchNorm2d, INSTANCE_NORM, None]))
    stride = draw(st.sampled_from([1, 2]))
    seed, density = draw(st.integers(0, 10_000)), draw(st.sampled_from([0.0, 0.15, 0.3, 0.6, 1.0]))
    torch.manual_seed(seed)
    graph = StaticGraph(levels, outputs, norm=norm, stride=stride, shared_outputs=shared)
    with torch.no_grad():
        graph.weight.mul_(torch.rand(graph.weight.shape) < density)
        for node in graph.nodes:
            if draw(st.booleans()):
                node.conv.weight[torch.rand(len(node.conv.weight)) < 0.3] = 0  # nodes that send nothing
            if norm is not None and draw(st.booleans()):
                node.norm.weight[torch.rand(len(node.norm.weight)) < 0.3] = 0  # nodes that send the same whatever they get
    return lively(graph, seed)


@pytest.mark.kernels
@given(graph=graphs(), side=st.integers(5, 9))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_graphs(graph, side):
    for module in graph.modules():  # lively gives every norm a weight; some are to be 0 again
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            with torch.no_grad():
                module.weight[::3] = 0
    assert_equal_to_the_trained(nn.Sequential(graph), (graph.num_inputs, side, side + 1), batch=2)


@pytest.mark.kernels
@given(st.integers(2, 9), st.integers(1, 4), st.sampled_from([0.1, 0.3, 1.0]), st.integers(0, 1000), st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_graphs_in_discrete_time(nodes, steps, density, seed, normed):
    torch.manual_seed(seed)
    graph = DiscreteTimeGraph(nodes, 1, 1, steps=steps, norm=INSTANCE_NORM if normed else None)
    with torch.no_grad():
        graph.weight.mul_(torch.rand(nodes, nodes) < density)
    assert_equal_to_the_trained(nn.Sequential(lively(graph, seed)), (1, 6, 7), batch=2)


def test_a_network_that_was_trained():
    torch.manual_seed(0)
    model = tiny_digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wiring = dnw.wire(model, optimizer, num_edges=60)
    train, _ = dnw.data.load("digits", "", 8)
    images, labels = train.images.float() / 255, train.labels
    for i in range(0, 1000, 50):
        optimizer.zero_grad()
        F.cross_entropy(model(images[i : i + 50]), labels[i : i + 50]).backward()
        optimizer.step()
    found = plan(model, (1, 8, 8))
    live = dnw.count.live_by_graph(model, {name: wiring[name].active for name in wiring})["graph"]
    assert sum(found.rows[0].kept) == int(live.count_nonzero())
    model.eval()
    with torch.no_grad():
        expected = model(images[:64])
    torch.testing.assert_close(found.apply(model)(images[:64]), expected, rtol=1e-4, atol=1e-5)


# --- the plan ---


def test_the_plan_is_printed_stored_and_refuses_other_weights():
    model = thinned(lively(tiny_mnist()), 0, num_edges=150)
    found = plan(model, (1, 28, 28))
    assert Plan.from_json(found.to_json()) == found
    text = str(found)
    assert f"edges {found.rows[0].edges:,} -> {found.rows[0].kept_edges:,}" in text
    assert f"multiply-adds: {found.multiply_adds:,} -> {found.kept_multiply_adds:,}" in text
    assert found.rows[0].edges == 150
    with torch.no_grad():
        model.graph.weight.mul_(2)
    with pytest.raises(ValueError, match="the plan was made for other weights"):
        found.apply(model)
    newer = json.loads(found.to_json()) | {"format": 99}
    with pytest.raises(ValueError, match="a plan of format 99"):
        Plan.from_json(json.dumps(newer))
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json("[]")


def test_the_plan_counts_weights_that_are_not_0_before_and_after():
    """Also where they are among zeros that are computed: in convolutions of 3x3 pixels and in linear layers."""
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4, bias=False)
    )
    with torch.no_grad():
        model[0].weight.zero_()[:, 0, 1] = 1.0
        model[3].weight.copy_(torch.tensor([[1.0, 1], [0, 1], [0, 1], [0, 0]]))
    found = plan(model, (2, 5, 4))
    assert (found.parameters, found.kept_parameters) == (10, 10)
    assert (found.multiply_adds, found.kept_multiply_adds) == (6 * 20 + 4, 6 * 20 + 4)
    assert found.zeros == 4  # of the matrix; the convolution, of which a third is there, is run weight by weight
    assert "besides 4 multiply-adds with weights that are 0" in str(found)
    graph = plan(model := lively(tiny_digits()), (1, 8, 8))  # entries that the graph does not read have weights, too
    assert graph.multiply_adds == graph.kept_multiply_adds
    assert int(model.graph.weight.count_nonzero()) > graph.rows[0].edges
    assert 0.9 * graph.parameters < graph.kept_parameters <= graph.parameters
    assert "besides" not in str(graph)


def test_the_plan_says_why_something_is_larger():
    text = str(plan(tiny_digits().half(), (1, 8, 8)))
    assert re.search(r"bytes: .* \(1\d\d\.\d%\): all numbers in float32", text)
    assert text.count("%): ") == 1
    shared = nn.Sequential(StaticGraph((2, 3), 3, shared_outputs=True))
    assert "%): a weight that serves several sums, an edge each, counts for each" in str(plan(shared, (2, 6, 6)))


def test_a_plan_that_was_stored_before_zeros_were_counted():
    found = plan(tiny_digits(), (1, 8, 8))
    older = json.loads(found.to_json())
    del older["zeros"]
    assert Plan.from_json(json.dumps(older)) == found


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3), Odd()), (3, 8, 8)),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), (4, 8, 8)),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2)), (4, 8, 8)),
        (lambda: DiscreteTimeGraph(4, 1, 1, activation=torch.tanh), (1, 8, 8)),
        (lambda: nn.Sequential(Scaled(3, 4, 3)), (3, 8, 8)),
        (lambda: nn.Sequential(Residual(StaticGraph((3, 4), 3))), (3, 8, 8)),
        (lambda: nn.Sequential(StaticGraph((3, 4), 3), nn.AvgPool2d(2)), (3, 8, 8)),
        (hooked, (3, 8, 8)),
        (hooked_graph, (1, 8, 8)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), (3, 8, 8)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(8, 5)), (3, 8, 8)),
        (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Linear(1, 5)), (3, 8, 8)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1)), (3, 8, 8)),
        (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1)), (3, 8, 8)),
        (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2)), (3, 8, 8)),
        (lambda: twice(StaticGraph((2, 3), 2)), (2, 6, 7)),
    ],
)
def test_modules_of_all_kinds_beside_graphs(make, size):
    assert_equal_to_the_trained(lively(make()), size)


def recurrent() -> nn.Module:
    return nn.Sequential(nn.Flatten(2), nn.GRU(16, 4, batch_first=True))


def twice(graph: nn.Module) -> nn.Module:
    return nn.Sequential(graph, nn.ReLU(), graph)


def test_a_graph_that_runs_twice_has_two_rows():
    graph = StaticGraph((2, 3), 2)
    with torch.no_grad():
        graph.weight[-1] = 0  # an output that gets nothing: a constant for whoever reads it
    first, second = assert_equal_to_the_trained(lively(twice(graph)), (2, 6, 7)).rows
    assert first.nodes == second.nodes == (2, 3, 2)
    assert (first.kept[-1], second.kept[0]) == (1, 1)
    assert first.edges == second.edges
    assert first.kept_edges > second.kept_edges


def test_a_graph_with_a_forward_of_its_own_is_traced_as_it_is():
    class Doubled(StaticGraph):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert not assert_equal_to_the_trained(lively(nn.Sequential(Doubled((2, 3), 2))), (2, 6, 7)).rows


class Fed(nn.Module):
    """A graph without a node function at its inputs, which are a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.graph = StaticGraph((9, 4), 3, norm=None)
        self.graph.nodes[0] = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(torch.cat([x, self.one(x), self.other(x)], 1))


def test_the_levels_of_a_graph_end_where_its_inputs_begin():
    (row,) = assert_equal_to_the_trained(lively(Fed()), (3, 6, 7)).rows
    assert (row.nodes, row.edges) == ((9, 4, 3), 9 * 4 + 13 * 3)


def test_a_graph_whose_weight_is_parametrized():
    graph = lively(nn.Sequential(StaticGraph((2, 3), 2)))
    nn.utils.parametrizations.weight_norm(graph[0], "weight")
    assert_equal_to_the_trained(graph, (2, 6, 7))


class CatTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.last(torch.cat([y, y], 1))


def test_a_value_beside_itself():
    found = assert_equal_to_the_trained(CatTwice(), (3, 6, 7))
    assert found.multiply_adds == found.kept_multiply_adds == (4 * 27 + 16) * 4 * 5


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (tiny_cifar10_continuous, (3, 32, 32), "graph is a graph in continuous time, of as many steps"),
        (lambda: ContinuousTimeGraph(4, 1, 1), (1, 8, 8), "the model is a graph in continuous time"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), (3, 8, 8), "0: a norm over the images"),
        (tiny_digits, (3, 8, 8), "the model does not take inputs of 3x8x8"),
        (lambda: nn.Sequential(nn.BatchNorm2d(4)), (3, 8, 8), "the model does not take inputs of 3x8x8"),
        (lambda: "net.dnw", (1, 8, 8), "a str is no model to compile"),
        (lambda: tiny_digits().to("meta"), (1, 8, 8), "a model on the meta device has no weights to compile"),
        (recurrent, (3, 4, 4), "PyTorch would run 'gru in 1', which a plan has no place for"),
        (lambda: nn.Sequential(nn.Flatten(0)), (3, 1, 1), "the batch is merged with other dimensions"),
        (tiny_digits, (1, -8, 8), "expected channels, height and width, whole numbers from 1 on"),
        (tiny_digits, (8, 8), "expected channels, height and width, whole numbers from 1 on"),
        (tiny_digits, 32, "expected channels, height and width, whole numbers from 1 on"),
    ],
)
def test_what_is_not_compiled(make, size, message):
    with pytest.raises(ValueError, match=message):
        plan(make(), size)


# --- running, and the file ---


def test_inputs_of_another_shape_or_type_are_refused():
    program = plan(model := lively(tiny_digits()), (1, 8, 8)).apply(model)
    assert program(torch.randn(0, 1, 8, 8)).shape == (0, 10)
    assert re.fullmatch(r"Program\(1x8x8 to 10: \d+ instructions, [\d,]+ parameters, [\d,]+ multiply-adds\)", repr(program))
    for wrong in (torch.randn(2, 1, 8, 9), torch.randn(1, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"expected floating-point images \[batch, 1, 8, 8\]"):
            program(wrong)


@pytest.fixture
def stored(tmp_path):
    model = thinned(lively(tiny_digits()), 3, num_edges=100)
    program = plan(model, (1, 8, 8)).apply(model)
    path = tmp_path / "net.dnw"
    assert save_program(program, path) == path.stat().st_size
    return program, path


def test_a_stored_network_is_the_same(stored):
    program, path = stored
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(load_program(path)(images), program(images))
    assert all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors(load_program(path)), tensors(program), strict=True)
    )


def test_every_cut_and_every_changed_byte_is_refused(stored):
    _, path = stored
    whole = path.read_bytes()
    for length in [*range(60), *range(60, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"net\.dnw: "):
            load_program(path)
    for at in [*range(60), *range(60, len(whole), 997)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"net\.dnw: "):
            load_program(path)


def test_a_newer_file_says_so(stored):
    _, path = stored
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + struct.pack("<I", 3) + whole[12:])
    with pytest.raises(ValueError, match="another version of dnw"):
        load_program(path)


@pytest.mark.kernels
@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_files_with_a_right_checksum_and_wrong_content_are_refused_or_run(stored, data):
    """Someone who edits a file can renew its checksum; what comes of it is one error, or a network that runs without harm."""
    import hashlib

    program, path = stored
    save_program(program, path)
    whole = path.read_bytes()
    front = struct.Struct("<8sIQ32s")
    magic, version, length, _ = front.unpack_from(whole)
    header = json.loads(whole[front.size : front.size + length])
    places: list[tuple[object, object]] = []

    def collect(item: object) -> None:
        for key, value in item.items() if isinstance(item, dict) else enumerate(item):
            places.append((item, key))
            if isinstance(value, (dict, list)):
                collect(value)

    collect(header)
    holder, key = data.draw(st.sampled_from(range(len(places))).map(places.__getitem__))
    other = data.draw(st.sampled_from(range(len(places))).map(places.__getitem__))
    values = [-1, 0, 1, 7, 7.0, 2**40, 2**70, 1e300, None, "x", [], {}, [1, 2], {"array": "f4"}]
    holder[key] = data.draw(st.sampled_from([*values, *[copy.deepcopy(other[0][other[1]])] * 10]))
    text = json.dumps(header).encode()
    rest = text + whole[front.size + length :]
    path.write_bytes(front.pack(magic, version, len(text), hashlib.sha256(rest).digest()) + rest)
    try:
        changed = load_program(path)
    except ValueError:
        return
    size = changed.input_size
    if max(size) < 1000:
        images = torch.randn(1, *size)
        torch.testing.assert_close(Runtime(changed)(images), changed(images), rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.kernels
def test_a_file_that_would_read_elsewhere_is_refused(tmp_path):
    conv = Convolution(torch.randn(2, 1, 3, 3), None, (1, 1), (1, 1), 2)
    wrong = [
        (replace(conv, groups=2, weight=torch.randn(3, 1, 3, 3)), "a convolution of 2 groups"),
        (replace(conv, stride=(1 << 40, 1)), "1099511627776 is no int"),
        (Restore(torch.tensor([0, 1]), torch.zeros(2, 6, 7, 1)), r"2 of channels \(2, 6, 7, 1\), given \(2, 6, 7\)"),
    ]
    for instruction, reason in wrong:
        save_program(Program.chain((instruction,), (2, 6, 7)), tmp_path / "net.dnw")
        with pytest.raises(ValueError, match=rf"net\.dnw: not a valid compiled network \(.{reason}.\)$"):
            load_program(str(tmp_path / "net.dnw"))


# --- as ONNX and as C ---

NETWORKS = {
    "digits": (tiny_digits, (1, 8, 8), {"num_edges": 60}),
    "digits, nearly nothing": (tiny_digits, (1, 8, 8), {"num_edges": 3}),
    "cifar10": (tiny_cifar10, (3, 32, 32), {"num_edges": 2_000}),
    "discrete": (tiny_cifar10_discrete, (3, 32, 32), {"num_edges": 1_000}),
    "chain": (lambda: GraphChain(10, image_stride=2), (3, 41, 38), {"density": 0.005}),
    "plain": (lambda: mobilenet_v1(10, width=0.25), (3, 40, 40), {"density": 0.3}),
    "outputs that nothing reaches": (lambda: nn.Sequential(StaticGraph((2, 3, 4), 5)), (2, 6, 7), {"num_edges": 9}),
    "nothing": (lambda: nn.Sequential(StaticGraph((2, 3), 3)), (2, 6, 7), {"num_edges": 0}),
}


def network(name: str) -> tuple[nn.Module, Program]:
    make, size, budget = NETWORKS[name]
    model = lively(make())
    if budget == {"num_edges": 0}:
        with torch.no_grad():
            model[0].weight.zero_()
    else:
        thinned(model, 3, **budget)
    return model, plan(model, size).apply(model)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:no path of active edges")
def test_onnx_of_the_compacted_network(name, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, program = network(name)
    file = tmp_path / "net.onnx"
    assert save_onnx(program, file) == file.stat().st_size
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    images = torch.randn(3, *program.input_size)
    with torch.no_grad():
        expected = model(images)
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    sums = {"Conv", "Relu", "Concat", "Add", "Identity", "ReduceMean", "Gemm", "InstanceNormalization", "Slice"}
    assert kinds <= sums | {"Gather", "Expand", "Mul", "Shape"}
    assert ("Expand" in kinds) == (name in ("digits, nearly nothing", "nothing"))  # what is the same for every image
    assert ("Conv" in kinds) == (name not in ("digits, nearly nothing", "nothing"))


def test_onnx_without_its_package(program, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install dnw\[onnx\]"):
        save_onnx(program, tmp_path / "net.onnx")


compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@compiler
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:no path of active edges")
def test_c_of_the_compacted_network(name, tmp_path):
    """Without a warning as C99, nothing beyond its arrays (the sanitizers watch), and the same outputs call after call."""
    model, program = network(name)
    needs = save_c(program, tmp_path / "net.c")
    inputs, outputs = math.prod(program.input_size), math.prod(program.output_size)
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
    strict = ["cc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O3"]
    for watched in (["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1"], []):
        command = [*strict, *watched, "net.c", "main.c", "-o", "net", "-lm"]
        built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        if watched and built.returncode:  # a compiler without sanitizers
            continue
        assert built.returncode == 0, built.stderr
        images = torch.randn(3, *program.input_size)
        with torch.no_grad():
            expected = model(images)
        ran = subprocess.run(["./net"], cwd=tmp_path, input=images.numpy().tobytes(), capture_output=True, check=True)
        found = torch.frombuffer(bytearray(ran.stdout), dtype=torch.float32).view(expected.shape)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    header = (tmp_path / "net.h").read_text()
    for line in (f"NET_INPUTS {inputs}", f"NET_OUTPUTS {outputs}", f"NET_ARENA {max(1, needs.ram // 4)}"):
        assert f"#define {line}\n" in header
    sizes = subprocess.run(["size", "-A", "net"], cwd=tmp_path, capture_output=True, text=True)
    if sizes.returncode == 0:
        section = {line.split()[0]: int(line.split()[1]) for line in sizes.stdout.splitlines() if line.startswith(".")}
        assert needs.flash <= section[".rodata"] < 1.1 * needs.flash + 1_000
        assert needs.ram <= section[".bss"] <= needs.ram + 4 * (inputs + outputs) + 200


def test_the_tiny_classifiers_fit_microcontrollers(tmp_path):
    for make, size, edges, flash, ram in (
        (tiny_digits, (1, 8, 8), 100, 2_000, 6_000),
        (tiny_mnist, (1, 28, 28), 600, 16_000, 40_000),
        (tiny_cifar10, (3, 32, 32), 32_000, 300_000, 270_000),
    ):
        model = thinned(lively(make()), 1, num_edges=edges)
        needs = save_c(plan(model, size).apply(model), tmp_path / "net.c")
        assert needs.flash < flash
        assert needs.ram < ram


@compiler
def test_the_size_of_code_is_measured_and_pixels_are_explained(program, tmp_path, monkeypatch):
    needs = save_c(program, tmp_path / "net.c", mean=(0.5, 0.25, 1), std=(0.5, 2, 0.125))
    header = (tmp_path / "net.h").read_text()
    assert "#define NET_MEAN {0.5f, 0.25f, 1.0f}" in header
    assert "#define NET_STD {0.5f, 2.0f, 0.125f}" in header
    size = code_size(tmp_path / "net.c")
    assert 500 < size["-Os"] < size["-O3"] < 100_000
    for flag, code in size.items():
        subprocess.run(["cc", "-std=c99", flag, "-c", tmp_path / "net.c", "-o", tmp_path / "net.o"], check=True)
        text = subprocess.run(["size", tmp_path / "net.o"], check=True, capture_output=True, text=True).stdout.split()[6]
        assert code <= int(text) - needs.flash < code + 2_000, "numbers and code, and a little for tables that unwind the stack"
    monkeypatch.setenv("CC", "cc -DNOTHING")
    assert code_size(tmp_path / "net.c") == size
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    assert code_size(tmp_path / "net.c") == {}
    with pytest.raises(FileNotFoundError):
        code_size(tmp_path / "nothing.c")
    good, wrong = (0.5, 0.5, 0.5), ((0.5,), (0.5, 0.5, 0), (0.5, 0.5, float("nan")), None)
    for std in wrong:
        with pytest.raises(ValueError, match=r"give both, finite, std above 0, one for every channel of the images, 3"):
            save_c(program, tmp_path / "net.c", mean=good, std=std)


def test_what_c_refuses(program, tmp_path):
    with pytest.raises(ValueError, match=r"net\.h: its name must end with \.c"):
        save_c(program, tmp_path / "net.h")
    with pytest.raises(ValueError, match=r"my-net\.c: its stem becomes the prefix"):
        save_c(program, tmp_path / "my-net.c")
    with torch.no_grad():
        program.instructions[0].weight[0] = float("nan")
    with pytest.raises(ValueError, match="not a finite number"):
        save_c(program, tmp_path / "net.c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("use", [save_program, save_onnx, save_c, lambda x, _: measured(x), lambda x, _: Runtime(x)])
def test_what_is_not_compacted_yet_is_neither_written_nor_run(use, tmp_path):
    model = lively(tiny_digits())
    for thing in (model, plan(model, (1, 8, 8)), str(tmp_path)):
        message = rf"a {type(thing).__name__} is not a compacted network; plan\(model, input_size\)\.apply\(model\) makes one"
        with pytest.raises(ValueError, match=message):
            use(thing, tmp_path / "net.c")
    assert not list(tmp_path.iterdir())


# --- from a run ---


def test_weights_that_a_rule_only_trains_with_are_not_compiled():
    """As they are not evaluated, whatever the mode; a copy of the model is not wired."""
    model = tiny_digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, optimizer, rule=dnw.TargetedDropout(), num_edges=60)
    with wiring.settled():
        found = plan(model, (1, 8, 8))
        expected = found.apply(model)(images := torch.randn(2, 1, 8, 8))
        settled = copy.deepcopy(model).eval()
    for _ in range(2):
        for compiled in (plan, lambda model, _: found.apply(model), lambda model, size: plan(nn.Sequential(model), size)):
            with pytest.raises(RuntimeError, match=r"inside `with wiring\.settled\(\):`, and compile there"):
                compiled(model, (1, 8, 8))
        model.eval()
    assert torch.equal(found.apply(settled)(images), expected)
    wiring.remove()
    plan(model, (1, 8, 8))


@pytest.mark.parametrize("rule", ["dnw", "targeted_dropout"])
def test_a_run_is_compiled_with_the_weights_it_is_evaluated_with(rule, tmp_path, capsys):
    config = override(digits(), ["epochs=2", "baseline=null", f"rule={rule}"])
    run = train(config, data_dir=tmp_path, out=tmp_path / "run")
    best = read_checkpoint(run / "best.pt")
    best["model"]["classifier.weight"].neg_()  # so that the two checkpoints are told apart
    write_checkpoint(run / "best.pt", best)
    file, images, expected = tmp_path / "net.dnw", torch.randn(5, 1, 8, 8), {}
    for checkpoint in ("last", "best"):
        trained = load_trained(run, checkpoint)
        with torch.no_grad(), trained.wiring.settled():
            expected[checkpoint] = trained.model(images)
    assert not torch.allclose(*expected.values(), rtol=0.1, atol=0.1)
    for checkpoint, arguments in (
        ("last", [str(run)]),
        ("best", [str(run), "--checkpoint", "best"]),
        ("best", [str(run / "best.pt")]),
    ):
        assert main(["compile", *arguments, "--out", str(file)]) == 0
        torch.testing.assert_close(load_program(file)(images), expected[checkpoint], rtol=1e-4, atol=1e-5)
    printed = capsys.readouterr().out
    assert "graph: nodes kept by level" in printed
    assert "run as a matrix on this machine" in printed
    assert main(["compile", str(run), "--out", str(tmp_path / "net.onxx")]) == 1
    assert "allowed is a name that ends with .dnw, .onnx or .c" in capsys.readouterr().err
    assert main(["compile", str(run), "--input", "1x12x12", "--checkpoint", "best"]) == 0
    assert "inputs of 1x12x12" in capsys.readouterr().out
    assert main(["compile", str(run / "best.pt"), "--out", str(tmp_path / "net.onnx")]) == 0
    assert main(["compile", str(run), "--out", str(tmp_path / "net.c")]) == 0
    assert "flash" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("net.*")} == {"net.dnw", "net.onnx", "net.c", "net.h"}
    assert main(["compile", str(tmp_path)]) == 1
    assert "not a run directory" in capsys.readouterr().err
    assert main(["compile", str(run / "best.pt"), "--checkpoint", "last"]) == 1
    assert "best.pt is the best checkpoint; leave --checkpoint last out" in capsys.readouterr().err


# --- the runtime ---


@pytest.fixture
def program() -> Program:
    return small_program()


@pytest.mark.parametrize("native_kernels", [None, False])
def test_runtimes_are_pickled_and_copied(program, native_kernels):
    runtime, images = Runtime(program, threads=2, native=native_kernels), torch.randn(3, 3, 21, 18)
    for other in (pickle.loads(pickle.dumps(runtime)), copy.deepcopy(runtime)):
        assert (other.kind, other.threads) == (runtime.kind, 2)
        assert torch.equal(other(images), runtime(images))


@pytest.mark.kernels
def test_numpy_in_numpy_out_and_other_memory_layouts(program):
    images = torch.randn(3, 3, 21, 18)
    runtime = Runtime(program)
    expected = runtime(images)
    array = images.numpy()
    backwards, readonly = array[:, :, ::-1].copy()[:, :, ::-1], array.copy()
    readonly.setflags(write=False)
    for other in (array, images.double().numpy(), backwards, array.astype(">f4"), array.astype("longdouble"), readonly):
        assert torch.equal(torch.from_numpy(runtime(other)), expected)
    assert torch.equal(runtime(images.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(runtime(torch._neg_view(-images)), expected)
    assert torch.equal(runtime(torch.complex(images, -images).conj().imag), expected)
    assert torch.equal(runtime(images.as_subclass(Picture)), expected)
    assert torch.equal(runtime(images.requires_grad_()), expected)
    assert torch.equal(runtime(torch._efficientzerotensor(3, 3, 21, 18)), runtime(torch.zeros(3, 3, 21, 18)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_the_runtime_refuses(program):
    whole = torch.zeros(1, 3, 21, 18, dtype=torch.int64)
    for wrong in (torch.randn(1, 3, 21, 19), torch.randn(3, 21, 18), whole, whole.numpy(), None, "images"):
        with pytest.raises(ValueError, match="expected floating-point images"):
            Runtime(program)(wrong)
    for run in (program, Runtime(program, native=False)):
        with pytest.raises(ValueError, match="expected floating-point images"):
            run("images")
    dense = torch.randn(2, 3, 21, 18)
    with FakeTensorMode() as mode:
        traced = mode.from_tensor(dense)
    no_images = {
        "nested": torch.nested.nested_tensor([dense[0], dense[1]]),
        "meta": dense.to("meta"),
        r"torch\.sparse_coo": dense.to_sparse(),
        r"torch\._mkldnn": dense.to_mkldnn(),
    }
    for kind, wrong in no_images.items():
        for run in (program, Runtime(program), Runtime(program, native=False)):
            with pytest.raises(ValueError, match=f"a tensor that is {kind} gives no images"):
                run(wrong)
    if native.kernels() is not None:
        with pytest.raises(ValueError, match="a FakeTensor that holds no numbers of its own"):
            Runtime(program)(traced)
        with pytest.raises(ValueError, match="holds no numbers of its own"):
            torch.func.vmap(Runtime(program))(dense[:, None])
    with pytest.raises(ValueError, match="a str is not a compacted network"):
        Runtime("net.dnw")
    with pytest.raises(ValueError, match="threads=0"):
        Runtime(program, threads=0)


def test_without_kernels_pytorch_runs_the_program_and_says_so(program, monkeypatch):
    images = torch.randn(2, 3, 21, 18)
    expected = Runtime(program)(images)
    monkeypatch.setattr(native, "kernels", lambda: None)
    runtime = Runtime(program)
    assert runtime.kind == "torch"
    torch.testing.assert_close(runtime(images), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the kernels are not built"):
        Runtime(program, native=True)
