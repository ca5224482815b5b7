"""Native code: how it is loaded, what its functions refuse, what is written in it alone, and how its sources look."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from compiled import small_program

import dnw
from dnw.compile import Program, Runtime, _lower
from dnw.compile import _native as native
from dnw.compile._layers import Attention, LayerNorm, Pool, Rearrange, Sum
from dnw.compile._program import Affine, Convolution, Node
from dnw.kernels import _exchange
from dnw.kernels._library import INT64, load

ROOT = Path(dnw.__file__).parent
SOURCES = sorted(path for pattern in ("*.c", "*.h") for path in ROOT.rglob(pattern))
built = pytest.mark.skipif(
    native.kernels() is None or _exchange.library() is None, reason="the kernels are not built (no C compiler)"
)


# --- the sources ---


def test_there_are_sources():
    compiled, kernels = (
        {"_kernels.c", "_kernels_vector.h", "_kernels_layers.h", "_standalone.h"},
        {"exchange.c", "graph.c", "graph_vector.h"},
    )
    assert {path.name for path in SOURCES} >= compiled | kernels | {"errors.h", "widths.h", "vector.h"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_c_sources_keep_the_rules_that_need_no_formatter(path):
    text = path.read_text()
    for number, line in enumerate(text.split("\n"), 1):
        assert len(line) <= 128, f"{path.name}:{number}: {len(line)} columns; .clang-format allows 128"
        assert "\t" not in line, f"{path.name}:{number}: a tab"
        assert line == line.rstrip(), f"{path.name}:{number}: blanks at its end"
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


# --- the loader ---


@built
def test_a_library_of_another_version_or_of_nothing_is_left_alone(tmp_path):
    (there,) = (ROOT / "kernels").glob("_exchange_native*.so")
    functions, version = {"finite": _exchange._FUNCTIONS["finite"]}, _exchange._VERSION
    assert load(tmp_path, "lib", version, functions) is None
    (tmp_path / "lib.1.so").write_bytes(b"no library")
    assert load(tmp_path, "lib", version, functions) is None
    shutil.copy(there, tmp_path / "lib.2.so")
    assert load(tmp_path, "lib", version, {"nothing": (INT64,)}) is None
    assert load(tmp_path, "lib", version + 1, functions) is None
    found = load(tmp_path, "lib", version, functions)
    assert found is not None
    assert found.dnw_finite(None, 0) == 1


# --- what functions refuse ---


KEPT: list[torch.Tensor] = []


def numbers(count: int = 8) -> int:
    """Memory for some numbers, kept as long as the tests run."""
    KEPT.append(torch.zeros(count, dtype=torch.int64))
    return KEPT[-1].data_ptr()


NULL, SIZE = "a pointer is null", "a size is negative, or does not fit the others"
P = numbers()
REFUSED = [
    ("masked", (P, P, numbers(), -1), SIZE),
    ("masked", (P, None, numbers(), 4), NULL),
    ("finite", (P, -4), SIZE),
    ("finite", (None, 4), NULL),
    ("take", (P, numbers(), numbers(), None, 4, 0, 1, numbers(), -1, numbers(), numbers()), SIZE),
    ("take", (P, numbers(), numbers(), None, 4, 0, 1, None, 8, numbers(), numbers()), NULL),
    ("take", (P, numbers(), numbers(), None, 4, 0, 1, numbers(), 8, None, numbers()), NULL),
    ("take", (P, None, numbers(), None, 4, 0, 1, numbers(), 8, numbers(), numbers()), NULL),
    ("take_n_of_m", (P, numbers(), numbers(), 8, 1, 5, 4, numbers()), SIZE),
    ("take_n_of_m", (P, numbers(), numbers(), 6, 1, 2, 4, numbers()), SIZE),
    ("take_n_of_m", (P, numbers(), numbers(), 4096, 1024, 2, 4, numbers()), SIZE),
    ("take_n_of_m", (P, numbers(), numbers(), 8, 0, 2, 4, numbers()), SIZE),
    ("take_n_of_m", (P, numbers(), None, 8, 1, 2, 4, numbers()), NULL),
    ("pack", (P, -1, numbers()), SIZE),
    ("pack", (P, 4, None), NULL),
    ("tally", (P, P, numbers(), -1, numbers()), SIZE),
    ("tally", (P, P, numbers(), 1, None), NULL),
    ("dead", (P, 1, 2, -2, 1, numbers(), numbers()), SIZE),
    ("dead", (P, 1, 2, 2, 1, None, numbers()), NULL),
    ("dead", (P, 1, 2, 2, 1, numbers(), None), NULL),
]


@built
@pytest.mark.kernels
@pytest.mark.parametrize(("name", "arguments", "why"), REFUSED)
def test_what_the_exchange_refuses_is_raised_before_anything_is_written(name, arguments, why):
    with pytest.raises(RuntimeError, match=rf"dnw_{name} refuses its arguments .*: {why}; nothing was computed"):
        getattr(_exchange.library(), f"dnw_{name}")(*arguments)
    assert not any(tensor.any() for tensor in KEPT)


def test_every_function_that_takes_memory_is_tried():
    assert {name for name, *_ in REFUSED} == {name for name, types in _exchange._FUNCTIONS.items() if types}


GRAPHS = ("node", "mean", "linear", "zero", "dense")


def layers_program() -> Program:
    """One instruction of nearly each kind that graphs do not have."""
    torch.manual_seed(0)
    weight = torch.randn(6, 3, 3, 3)
    one, norm = torch.ones(6), LayerNorm(torch.ones(6), torch.zeros(6), 1e-5)
    nodes = (
        Node(Convolution(weight, None, (2, 2), (1, 1), 1, sparse=True), (0,)),
        Node(Pool(True, (3, 3), (2, 2), (1, 1)), (1,)),
        Node(norm, (2,)),
        Node(Sum(), (2, 3)),
        Node(Rearrange((6, 5, 5), (0, 2, 1), (6, 25)), (4,)),
        Node(Attention(2, 1.0), (5, 5, 5)),
        Node(Affine(one, one), (6,)),
    )
    return Program(nodes, ((3, 20, 18),), (7,))


@pytest.fixture
def layout():
    return Runtime(small_program())._layout


def check(layout: native._Layout, **other: int) -> None:
    """Looks at the tasks and calls of a layout once more, with some arguments changed."""
    tables = native.tables()
    arguments = {
        "tasks": layout._tasks,
        "num_tasks": len(layout._tasks),
        "task_bytes": len(bytes(tables.task())),
        "calls": layout._calls,
        "num_calls": len(layout._calls),
        "call_bytes": len(bytes(tables.call())),
        "image_size": layout._sizes[0],
        "output_size": layout._sizes[1],
        "arena_size": layout.lowered.arena,
        "scratch_size": layout.lowered.scratch,
    }
    native.kernels().dnw_check(*(arguments | other).values())


@built
@pytest.mark.kernels
@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"tasks": None}, NULL),
        ({"calls": None}, NULL),
        ({"num_tasks": -1}, SIZE),
        ({"num_calls": -1}, SIZE),
        ({"arena_size": -1}, SIZE),
        ({"num_tasks": 1}, "a call is of a task that is not there"),
        ({"task_bytes": 8}, "records are laid out in another way"),
        ({"call_bytes": 8}, "records are laid out in another way"),
        ({"image_size": 3 * 21 * 18 - 1}, "beyond the memory"),
        ({"output_size": 9}, "beyond the memory"),
    ],
)
def test_what_is_said_of_records_is_checked(other, why, layout):
    check(layout)
    with pytest.raises(RuntimeError, match=rf"dnw_check refuses its arguments .*{why}"):
        check(layout, **other)


@built
@pytest.mark.kernels
@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        ("sparse", {"kind": 99}, "there is no such kernel"),
        ("sparse", {"kind": -1}, SIZE),
        ("sparse", {"targets": -1}, SIZE),
        ("sparse", {"weight": None}, NULL),
        ("sparse", {"second_sources": 1 << 20}, "beyond the memory"),
        ("sparse", {"out_plane": 1 << 20}, "beyond the memory"),
        ("node", {"plane": 1 << 20}, "beyond the memory"),
        ("node", {"stride_y": 3, "stride_x": 3}, SIZE),
        ("phases", {"starts": None}, NULL),
        ("phases", {"stride_x": 0}, SIZE),
        ("phases", {"blocks": 3}, SIZE),
        ("phases", {"plane": 1 << 20}, "beyond the memory"),
        ("sparse", {"starts": None}, NULL),
        ("sparse", {"blocks": 0}, NULL),
        ("sparse", {"taps": 1}, SIZE),
        ("sparse", {"pitch": 1}, SIZE),
        ("pool", {"stride_x": 0}, SIZE),
        ("pool", {"kernel_width": 1 << 20}, "beyond the memory"),
        ("sum", {"sources": 1}, SIZE),
        ("layer_norm", {"scale": None}, NULL),
        ("layer_norm", {"groups": 0}, SIZE),
        ("attention", {"groups": 7}, SIZE),
        ("attention", {"third_plane": 1 << 20}, "beyond the memory"),
        ("rearrange", {"offsets": None}, NULL),
        ("dense", {"weight": None}, NULL),
        ("dense", {"added_maps": P}, NULL),
        ("dense", {"activation": 99}, "there is no such kernel"),
        ("mean", {"mask": None}, NULL),
        ("linear", {"shift": None}, NULL),
        ("zero", {"out_pitch": 1 << 20}, "beyond the memory"),
    ],
)
def test_tasks_that_would_read_or_write_elsewhere_are_refused(kind, fields, why):
    layout = Runtime(small_program() if kind in GRAPHS else layers_program())._layout
    (task, *_) = (task for task in layout._tasks if task.kind == native.tables().kinds[kind])
    for name, value in fields.items():
        setattr(task, name, value)
    with pytest.raises(RuntimeError, match=rf"dnw_check refuses its arguments .*{why}"):
        check(layout)


@built
@pytest.mark.kernels
@pytest.mark.parametrize(
    ("field", "value"), [("rows", 1 << 20), ("out_offset", -1000), ("in_offset", 1 << 60), ("first", 1 << 20)]
)
def test_calls_that_would_read_or_write_elsewhere_are_refused(field, value, layout):
    writes_alone = native.tables().kinds["zero"]
    for call in layout._calls:
        if field == "in_offset" and layout._tasks[call.task].kind == writes_alone:
            continue
        before = getattr(call, field)
        setattr(call, field, value)
        with pytest.raises(RuntimeError, match="dnw_check refuses its arguments"):
            check(layout)
        setattr(call, field, before)
    check(layout)


@built
@pytest.mark.kernels
@pytest.mark.parametrize(
    ("position", "value", "why"),
    [
        (0, None, NULL),
        (3, None, NULL),
        (5, None, NULL),
        (2, -1, SIZE),
        (7, -1, SIZE),
        (10, 1, SIZE),
        (10, -1, SIZE),
        (11, 2, NULL),
        (13, 5, "this machine has no vectors of so many floats"),
        (13, 0, "this machine has no vectors of so many floats"),
    ],
)
def test_what_a_run_refuses(position, value, why, layout):
    images, outputs, arena = torch.zeros(layout._sizes[0]), torch.zeros(layout._sizes[1]), layout.take_arena()
    memory = [images.data_ptr(), outputs.data_ptr(), arena.data_ptr(), None]
    arguments = [layout._tasks, layout._calls, len(layout._calls), *memory, 1, *layout._sizes, 0, 1, None, native.lanes()]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=rf"dnw_run refuses its arguments .*{why}"):
        native.kernels().dnw_run(*arguments)
    assert not outputs.any()


@built
@pytest.mark.kernels
def test_an_arena_without_room_for_whole_vectors_is_refused(monkeypatch):
    """Kernels that over-read need floats of nobody behind the last maps; the allocation that leaves none is noticed."""
    monkeypatch.setattr(_lower, "_SLACK", 0)
    with pytest.raises(RuntimeError, match="a call reads or writes beyond the memory that it is for"):
        Runtime(small_program())


# --- one table ---


@built
def test_records_are_laid_out_as_the_library_says():
    tables = native.tables()
    assert list(tables.kinds.values()) == list(range(len(tables.kinds)))
    names = [name for name, *_ in tables.task._fields_]
    assert names[0] == "kind"
    assert len(set(names)) == len(names)
    assert set(tables.float_arrays) < set(names)
    assert native.kernels().dnw_names(-1) is None
    assert tuple(native.kernels().dnw_names(7).decode().split()) == tuple(_lower.ACTIVATION_NUMBERS)
    assert native.kernels().dnw_names(8) is None


@built
def test_a_field_that_c_does_not_have_is_noticed():
    with pytest.raises(AssertionError, match=r"struct call of _kernels\.c has no from_"):
        native._filled(native.tables().call, {"from_": 1})


@built
def test_every_error_has_a_text():
    message = native.kernels().dnw_message
    texts = [message(-number) for number in range(1, 8)]
    assert None not in texts
    assert message(0) is None
    assert message(-8) is None
    assert message(5) is None
