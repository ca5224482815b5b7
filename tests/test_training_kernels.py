"""The parts that graphs on kernels are made of: sparse products, layouts, memory that is used again, shared threads."""

import contextlib
import copy
import gc
import signal
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnw.graphs import INSTANCE_NORM, StaticGraph, set_graph_kernels
from dnw.graphs._innermost import images_innermost
from dnw.kernels import _graph, _room, _team
from dnw.kernels._graph import Rows, pooled, turned
from dnw.kernels._room import room

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(_graph.library() is None, reason="the package was built without a C compiler"),
]


@pytest.fixture(params=[4, 8, 16])
def lanes(request, monkeypatch):
    """Vectors of so many floats, as on a machine that has no wider ones."""
    if request.param > _graph.lanes():
        pytest.skip(f"this machine has no vectors of {request.param} floats")
    monkeypatch.setattr(_graph, "lanes", lambda: request.param)
    return request.param


def matrix(rows: int, width: int, density: float) -> tuple[Tensor, Tensor, Rows]:
    active, weight = torch.rand(rows, width) < density, torch.randn(rows, width)
    return active, weight * active, Rows.of(active, weight, torch.arange(rows), torch.full((rows,), width))


def near(found: Tensor, exact: Tensor) -> bool:
    return float((found - exact).abs().max()) <= 1e-5 * max(1.0, float(exact.abs().max())) if exact.numel() else True


# --- sparse products ---


@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([1, 7, 40]),
    width=st.sampled_from([1, 9, 63, 64, 65, 200]),
    n=st.sampled_from([1, 3, 16, 100, 128, 129, 1000, 1300]),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 100),
)
def test_products_and_their_gradients_are_the_dense_ones(rows, width, n, density, seed):
    torch.manual_seed(seed)
    hold_products(rows, width, n, density)


@pytest.mark.parametrize("n", [129, 700])
def test_products_of_matrices_whose_rows_lie_far_apart(n):
    torch.manual_seed(0)
    hold_products(600, 550, n, 0.02)


def hold_products(rows: int, width: int, n: int, density: float) -> None:
    active, dense, sparse = matrix(rows, width, density)
    x, grads = torch.randn(width, n), torch.randn(rows, n)
    out, back = torch.full((rows, n), torch.nan), torch.full((width, n), torch.nan)
    sparse.times(x, out)
    assert near(out, dense.double() @ x.double())
    turned_ = sparse.transposed()
    turned_.times(grads, back)
    assert near(back, dense.double().T @ grads.double())
    values = turned_.times_and_products(grads, x, back.fill_(torch.nan))
    assert near(back, dense.double().T @ grads.double())
    of_weight = torch.zeros(rows, width)
    turned_.scatter(values, torch.arange(rows), of_weight)
    assert near(of_weight, (grads.double() @ x.double().T) * active)


def test_rows_are_those_entries_of_a_weight_that_are_asked_for():
    active, weight = torch.rand(5, 130) < 0.4, torch.randn(5, 130)
    order, limits = torch.tensor([3, 0, 3]), torch.tensor([130, 70, 1])
    sparse = Rows.of(active, weight, order, limits)
    entries = [active[r, :limit].nonzero().squeeze(1) for r, limit in zip(order.tolist(), limits.tolist(), strict=True)]
    assert sparse.columns.tolist() == torch.cat(entries).tolist()
    assert torch.equal(sparse.values, torch.cat([weight[r, e] for r, e in zip(order.tolist(), entries, strict=True)]))
    assert sparse.starts.tolist() == [0, *torch.tensor([len(e) for e in entries]).cumsum(0).tolist()]


def test_rows_below_the_first_that_counts_are_not_read():
    _, dense, sparse = matrix(600, 550, 0.02)
    x = torch.randn(600, 300)
    x[:100] = torch.nan
    later = Rows.of(dense[100:] != 0, dense[100:], torch.arange(500), torch.full((500,), 550)).transposed()
    back = Rows(later.starts, later.columns + 100, later.values, 600)
    out = torch.empty(550, 300)
    back.times(x, out, 100)
    assert near(out, dense[100:].double().T @ x[100:].double())


def test_offsets_that_do_not_fit_are_refused():
    code = _graph.library()
    zeros = torch.zeros(64, dtype=torch.int64)
    one = zeros.data_ptr()
    for sizes in ((2**31, one, one, one, 0, 0), (-1, one, one, one, 0, 0), (4, one, one, one, 1, 0)):
        with pytest.raises(RuntimeError, match="dnw_compress refuses .*a size is negative, or does not fit"):
            code.dnw_compress(one, one, *sizes, one, one)
    with pytest.raises(RuntimeError, match="dnw_edges refuses .*a size"):
        code.dnw_edges(one, one, one, 1, 3, 2, one, one, 8, 0, 8, None, 0, 4)
    with pytest.raises(RuntimeError, match="dnw_edges_back refuses .*no vectors of so many"):
        code.dnw_edges_back(one, one, one, 1, 0, 2, one, one, one, one, 8, 0, 8, None, 0, 5)
    with pytest.raises(RuntimeError, match="dnw_turned refuses .*a size"):
        code.dnw_turned(one, one, 2, 2, 0, 3)


def test_a_graph_gives_the_same_on_vectors_of_any_width(lanes):
    def results(graph: StaticGraph, x: Tensor) -> list[Tensor]:
        out = graph(x)
        out.square().sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in graph.parameters())]

    torch.manual_seed(0)
    for images, norm, stride in ((37, nn.BatchNorm2d, 1), (16, INSTANCE_NORM, 2), (3, None, 2)):
        graph = StaticGraph((5, 9, 7), 4, norm=norm, stride=stride)
        with torch.no_grad():
            graph.weight *= torch.rand(graph.weight.shape) < 0.4
        exact = copy.deepcopy(graph).double()
        x = torch.randn(images, 5, 9, 7)
        set_graph_kernels("always")
        found = results(graph, x.clone().requires_grad_())
        set_graph_kernels("auto")
        for one, other in zip(found, results(exact, x.double().requires_grad_()), strict=True):
            assert near(one, other)


@pytest.mark.parametrize("n", [5, 128, 1300])
def test_products_on_vectors_of_any_width(lanes, n):
    torch.manual_seed(0)
    hold_products(30, 70, n, 0.1)


# --- layouts ---


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 64), (17, 65), (128, 200), (200, 128)])
def test_a_matrix_is_turned(shape):
    x = torch.randn(shape)
    out = torch.empty(shape[::-1])
    turned(x, out)
    assert torch.equal(out, x.T)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_way_into_the_layout_of_kernels_and_back(layout):
    x = torch.randn(5, 3, 4, 6).contiguous(memory_format=layout).requires_grad_()
    inside = images_innermost(x)
    assert torch.equal(inside, x)
    assert inside.movedim(0, -1).is_contiguous()
    inside.backward(grad := torch.randn(5, 3, 4, 6))
    assert torch.equal(x.grad, grad)
    assert x.grad.is_contiguous(memory_format=layout)
    assert images_innermost(inside) is inside
    torch.library.opcheck(torch.ops.dnw.images_innermost.default, (x.detach().requires_grad_(),))
    is_last = layout is torch.channels_last
    torch.library.opcheck(torch.ops.dnw.images_outermost.default, (x.detach().requires_grad_(), is_last))


@pytest.mark.parametrize("images", [1, 5, 16, 37])
def test_what_is_pooled_to_bfloat16_is_rounded_as_in_pytorch(images, lanes):
    x = torch.randn(3, 5, 4, images) * torch.logspace(-20, 20, images)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = torch.nan, torch.inf
    for mean in (False, True):
        found, exact = pooled(x, mean=mean, dtype=torch.bfloat16), pooled(x, mean=mean).bfloat16()
        assert torch.equal(found.isnan(), exact.isnan())
        assert torch.equal(found.nan_to_num(7.0), exact.nan_to_num(7.0))


# --- memory ---


@pytest.mark.skipif(_room._IS_FRESH, reason="all memory is PyTorch's")
def test_memory_is_used_again_once_no_tensor_holds_it():
    x = room(300, 1000)
    place, view = x.data_ptr(), x[10:]
    del x
    assert room(300, 1000).data_ptr() != place
    del view
    gc.collect()
    others = [room(300, 1000) for _ in range(len(_room._pool._free) + 1)]
    assert place in {other.data_ptr() for other in others}


def test_tensors_that_live_have_memory_of_their_own():
    tensors = [room(1 << 15).fill_(i) for i in range(40)]
    del tensors[::3]
    tensors += [room(1 << 15).fill_(100 + i) for i in range(40)]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    assert all(float(t.min()) == float(t.max()) for t in tensors)


def test_free_memory_is_bounded_by_what_was_in_use_of_late():
    pool = _room._Pool()

    def free() -> int:
        return sum(map(len, pool._free))

    for size in (1 << 24, 1 << 25, 1 << 23, 3 << 22, 5 << 22, 7 << 22):
        pool.lend(size)
    assert free() + (7 << 22) <= 1.5 * (1 << 25)
    for _ in range(2 * _room._OF_LATE):
        pool.lend(1 << 16)
    assert free() <= 1 << 16
    with pytest.raises((OSError, OverflowError, ValueError)):
        pool.lend(1 << 60)
    pool.lend(1 << 16)
    assert free() <= 1 << 16


def test_memory_is_lent_to_several_threads():
    wrong = []

    def work(number: int) -> None:
        for i in range(200):
            one, other = room(1 << 15).fill_(number), room(1 << (14 + i % 3)).fill_(-number)
            if one.min() != number or other.max() != -number:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- threads ---


def test_kernels_run_without_openmp(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(_team, "openmp", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    hold_products(60, 70, 1300, 0.1)


def test_a_signal_finds_the_interpreter_in_the_midst_of_kernels(monkeypatch):
    class Rung(Exception):
        pass

    def ring(*_: object) -> None:
        raise Rung

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, out = torch.randn(500, 600), torch.empty(600, 500)
    before, heard = signal.signal(signal.SIGALRM, ring), 0
    gc.disable()  # in whose callbacks an exception is lost, whoever made it
    try:
        for i in range(40):
            with contextlib.suppress(Rung):
                signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.0001 * i)
                for _ in range(20_000):
                    turned(x, out)
                continue
            heard += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    assert heard == 40
    turned(x, out)
    assert torch.equal(out, x.T)
