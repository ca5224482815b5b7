"""Compacted networks in files: every class of a program comes back as it was, and what older versions wrote is read."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dnw.compile import Program, Runtime, load_program, save_program
from dnw.compile import _older as older
from dnw.compile._file import _NAMES, _STORED, _plain_tensor
from dnw.compile._layers import (
    Activation,
    AdaptiveMean,
    Attention,
    Concat,
    Crop,
    LayerNorm,
    Pad,
    PlaceMean,
    Pool,
    Product,
    Rearrange,
    Shift,
    Sum,
)
from dnw.compile._program import (
    Affine,
    Beside,
    Constant,
    Convolution,
    InstanceNorm,
    Instruction,
    Linear,
    Node,
    Pick,
    Restore,
)

SIZE = (2, 5, 4)


def examples() -> list[tuple[Instruction, tuple[int, int, int]]]:
    """Every instruction, with the size of what it takes."""
    torch.manual_seed(0)
    sparse = Convolution(torch.eye(6).view(6, 6, 1, 1)[:, :2].repeat(1, 1, 3, 3), None, (1, 1), (1, 1), 1)
    return [
        (Affine(torch.randn(2), torch.randn(2)), SIZE),
        (InstanceNorm(torch.randn(2), torch.randn(2), 1e-3), SIZE),
        (Convolution(torch.randn(3, 2, 3, 1), Constant.of(torch.ones(3, 2, 4)), (2, 1), (0, 0), 1), SIZE),
        (Linear(torch.randn(3, 2), torch.randn(3)), SIZE),
        (Pick(torch.tensor([1])), SIZE),
        (Restore(torch.tensor([2, 0]), torch.randn(3, 5, 4)), SIZE),
        (replace(sparse, sparse=True), SIZE),
        (Activation("clamp", -1.0, 2.5), SIZE),
        (AdaptiveMean(2, 3), SIZE),
        (Pad(1, 0, 2, 3), SIZE),
        (Pool(False, (2, 3), (1, 2), (0, 1), (1, 1), True, False), SIZE),
        (PlaceMean(), SIZE),
        (Crop(1, 0, 5, 2), SIZE),
        (Rearrange((2, 20), (1, 0), (20, 2)), SIZE),
        (Shift(torch.randn(2, 5, 4)), SIZE),
        (LayerNorm(torch.randn(2), torch.randn(2), 1e-3, 2, True), SIZE),
        (Beside(Linear(torch.randn(3, 2), torch.randn(3), True), torch.randn(3, 5, 4)), SIZE),
        (Sum(), SIZE),
        (Product(), SIZE),
        (Concat(1), SIZE),
        (Attention(2, 0.5, torch.randn(20, 20)), SIZE),
    ]


def assert_same(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, (Instruction, Constant)):
        for field in fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    else:
        assert a == b


def test_every_class_of_a_program_comes_back_as_it_was(tmp_path):
    modules = ("dnw.compile._program", "dnw.compile._layers")
    missing = {kind for kind in Instruction.__subclasses__() if kind.__module__ in modules} - set(_NAMES)
    assert not missing, f"give {missing} a name in _STORED of dnw/compile/_file.py, and an example here"
    assert {type(instruction) for instruction, _ in examples()} | {Constant} == set(_NAMES)
    for instruction, size in examples():
        first = {Linear: PlaceMean(), Attention: Rearrange((2, 5, 4), (0, 1, 2), (2, 20))}.get(
            type(instruction), Pick(torch.arange(2))
        )
        reads = {Sum: 2, Product: 2, Concat: 2, Attention: 3}.get(type(instruction), 1)
        program = Program((Node(first, (0,)), Node(instruction, (1,) * reads)), (size,), (2,))
        save_program(program, tmp_path / "net.dnw")
        found = load_program(tmp_path / "net.dnw")
        assert_same(found.instructions, program.instructions)
        assert found.input_size == size


@dataclass(frozen=True, eq=False)
class Twice(Instruction):
    """An instruction that files do not know."""

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * x

    def check(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return size


@dataclass(frozen=True, eq=False)
class Named(Affine):
    name: str = "x"


def test_what_files_have_no_words_for_is_not_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"a Twice has no name in files; give it one in _STORED"):
        save_program(Program.chain((Twice(),), SIZE), tmp_path / "net.dnw")
    monkeypatch.setitem(_STORED, "Named", Named)
    monkeypatch.setattr("dnw.compile._file._NAMES", {Named: "Named"})
    with pytest.raises(ValueError, match=r"a str in a compacted network is not stored"):
        save_program(Program.chain((Named(torch.ones(2), torch.ones(2)),), SIZE), tmp_path / "net.dnw")
    assert not list(tmp_path.iterdir())


def written(header: object, arrays: bytes, path: Path) -> Path:
    """A file with such a header, made by hand."""
    text = json.dumps(header).encode()
    digest = hashlib.sha256(text + arrays).digest()
    path.write_bytes(struct.pack("<8sIQ32s", b"dnw-prog", 1, len(text), digest) + text + arrays)
    return path


EDGES = {
    "instruction": "Edges",
    "starts": {"array": "u2", "shape": [2], "at": 0},
    "sources": {"array": "u2", "shape": [1], "at": 8},
    "weight": {"array": "f4", "shape": [1], "at": 16},
    "num_sources": 2,
    "constant": None,
}
ARRAYS = struct.pack("<2H4xH6xf", 0, 1, 1, 0.5)


def test_a_file_of_the_first_version_is_read(tmp_path):
    """Its edges did not say yet whether they are run as a matrix."""
    program = load_program(written({"input_size": [2, 1, 1], "instructions": [EDGES]}, ARRAYS, tmp_path / "net.dnw"))
    assert program.instructions[0].sparse
    assert program(torch.tensor([[[[3.0]], [[4.0]]]])).tolist() == [[[[2.0]]]]


def plain(value: object, arrays: bytearray) -> object:
    """An older instruction as its files have it."""
    if isinstance(value, Tensor):
        return _plain_tensor(value, arrays)
    if isinstance(value, tuple):
        return [plain(item, arrays) for item in value]
    if isinstance(value, (older.Older, Instruction, Constant)):
        return {"instruction": type(value).__name__, **{f.name: plain(getattr(value, f.name), arrays) for f in fields(value)}}
    return value


def edges_of(matrix: Tensor, constant: Tensor | None = None, dense: bool = False) -> older.Edges:
    targets, sources = matrix.nonzero(as_tuple=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), targets.bincount(minlength=len(matrix)).cumsum(0)])
    added = None if constant is None else Constant.of(constant)
    return older.Edges(starts, sources, matrix[targets, sources], matrix.shape[1], added, dense)


@pytest.mark.parametrize("dense", [False, True])
def test_a_graph_that_was_one_instruction_is_read_as_what_it_computes(dense, tmp_path):
    torch.manual_seed(1)
    first, second, last = (
        torch.randn(2, 1, 3, 3),
        torch.randn(2, 1, 3, 3),
        torch.tensor([[0.0, 0.5, 0.25, 0.0], [1.0, 0, 0, -2]]),
    )
    scale, shift, constant = torch.randn(2), torch.randn(2), torch.randn(2, 5, 4)
    matrix = torch.tensor([[0.0, 0.5], [1.5, -1.0]])
    inputs = Affine(scale, shift), older.Rectify(), Convolution(first, None, (1, 1), (1, 1), 2)
    node = older.Rectify(), Convolution(second, None, (1, 1), (1, 1), 2)
    graph = older.Graph(inputs, ((edges_of(matrix, constant, dense), node),), edges_of(last))
    arrays = bytearray()
    instructions = [plain(one, arrays) for one in (graph, older.Rectify(), older.Mean(1, 4))]
    header = {"input_size": SIZE, "instructions": instructions}
    program = load_program(written(header, bytes(arrays), tmp_path / "net.dnw"))
    images = torch.randn(3, *SIZE)
    states = F.conv2d((images * scale[:, None, None] + shift[:, None, None]).relu(), first, padding=1, groups=2)
    sums = torch.einsum("ts,bshw->bthw", matrix, states) + constant
    states = torch.cat([states, F.conv2d(sums.relu(), second, padding=1, groups=2)], 1)
    expected = torch.einsum("ts,bshw->bthw", last, states).relu()[:, :, 1:4, 1:4].mean((2, 3))
    for run in (program, Runtime(program)):
        torch.testing.assert_close(run(images), expected, rtol=1e-5, atol=1e-5)
    save_program(program, tmp_path / "again.dnw")
    assert torch.equal(load_program(tmp_path / "again.dnw")(images), program(images))


def test_older_instructions_that_would_read_elsewhere_are_refused(tmp_path):
    conv = Convolution(torch.randn(2, 1, 3, 3), None, (1, 1), (1, 1), 2)
    edges = edges_of(torch.tensor([[0.0, 0.5], [1.5, -1.0]]))
    graph = older.Graph((conv,), ((edges, (conv,)),), edges_of(torch.ones(1, 4)))
    small = replace(conv, weight=torch.randn(1, 2, 3, 3), groups=1)
    for wrong, reason in (
        (replace(graph, inputs=()), "nodes that do not end with a convolution"),
        (replace(graph, levels=((edges, (Pick(torch.tensor([0])), conv)),)), "nodes with Pick"),
        (replace(graph, levels=((edges, (small,)),)), "nodes with Convolution"),
        (replace(graph, levels=((edges, (graph,)),)), "nodes that do not end with a convolution"),
        (replace(graph, levels=((conv, (conv,)),)), "'Convolution' where Edges belongs"),
        (replace(graph, outputs=replace(graph.outputs, constant=edges)), "'Edges' where Constant belongs"),
        (replace(graph, outputs=edges), "edges from 2 maps, given"),
        (replace(edges, sources=edges.sources + 1), "edges from no node"),
        (replace(edges, starts=edges.starts.flip(0)), "edges that begin or end where they must not"),
        (replace(edges, starts=edges.starts + 1), "edges that begin or end where they must not"),
        (older.Mean(6, 9), "a mean from 6 of maps"),
    ):
        arrays = bytearray()
        header = {"input_size": SIZE, "instructions": [plain(wrong, arrays)]}
        with pytest.raises(ValueError, match=rf"net\.dnw: not a valid compiled network \(.*{reason}"):
            load_program(written(header, bytes(arrays), tmp_path / "net.dnw"))


def test_a_number_beyond_single_precision_is_refused(tmp_path):
    program = Program.chain((Activation("clamp", -1e300, float("inf")),), SIZE)
    save_program(program, tmp_path / "net.dnw")
    with pytest.raises(ValueError, match=r"-1e\+300 is beyond single precision"):
        load_program(tmp_path / "net.dnw")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"instruction": "Constant"}, "'Constant' where an instruction belongs"),
        ({"instruction": "Sums"}, "'Sums' where an instruction belongs"),
        ({"constant": EDGES}, "'Edges' where Constant belongs"),
        ({"weight": EDGES["sources"]}, "an array of u2 where weights belong"),
        ({"sources": EDGES["weight"]}, "an array of f4 where whole numbers belong"),
        ({"num_sources": 2.0}, "2.0 is no int"),
        ({"num_sources": True}, "True is no int"),
        ({"num_sources": 1 << 40}, "1099511627776 is no int"),
        ({"dense": 1}, "1 is no bool"),
        ({"dense": [True]}, r"\[True\] is no bool"),
        ({"more": 1}, "Edges has no 'more'"),
    ],
)
def test_fields_of_another_kind_are_refused(changed, message, tmp_path):
    file = written({"input_size": [2, 1, 1], "instructions": [{**EDGES, **changed}]}, ARRAYS, tmp_path / "net.dnw")
    with pytest.raises(ValueError, match=rf"net\.dnw: not a valid compiled network \(.*{message}"):
        load_program(file)
