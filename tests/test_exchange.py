"""What surrounds a step in one pass over memory: the same with and without native code, and as ranking has it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dnw
from dnw._selection.top_k import magnitude_bits
from dnw._wiring import one_pass
from dnw.kernels import _exchange, _team

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(_exchange.library() is None, reason="the kernels are not built (no C compiler)"),
]
SIZES = [1, 2, 7, 15, 16, 17, 127, 128, 129, 1000]
VALUES = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1e-40, 2.0, 3e38])


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exchange, "library", lambda: None)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_masked_and_finite(size, bad):
    values, mask = torch.randn(size), torch.rand(size) < 0.5
    out, spare = torch.full((size,), math.nan), torch.randn(size)
    assert _exchange.is_finite(values)
    if bad is not None:
        values[size // 2] = bad
    expected = torch.where(mask, values, 0.0)
    finite = _exchange.masked(values, mask, out)
    assert torch.equal(out.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0))
    assert finite == bool(expected.isfinite().all())
    assert _exchange.is_finite(values) == (bad is None)
    assert _exchange.is_finite(spare)


def test_large_finite_numbers_are_finite():
    values = torch.full((300,), 3e38)
    assert _exchange.is_finite(values)
    assert _exchange.is_finite(values.double() * 1e200)
    assert not _exchange.is_finite(torch.full((3,), math.nan, dtype=torch.bfloat16))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_take_is_the_same_without_native_code(data):
    size = data.draw(st.integers(1, 300))
    held = torch.tensor(data.draw(st.lists(VALUES, min_size=size, max_size=size)))
    candidates = data.draw(st.sampled_from([None, torch.rand(size) < 0.7]))
    low = int(magnitude_bits(torch.tensor(data.draw(st.sampled_from([1e-40, 0.5, 1.0])))))
    high = low + data.draw(st.integers(0, 1 << 24))
    results = []
    for native in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not native:
                without_native(patch)
                patch.setattr(_exchange, "_PIECE", 64)
            parameter, latent = held.clone(), torch.full((size,), math.nan)
            active, taken = torch.rand(size) < 0.5, torch.zeros(1, dtype=torch.int64)
            above, places = _exchange.take(parameter, latent, active, candidates, low, high, taken)
            results.append((above, places.tolist(), parameter.tolist(), latent.tolist(), active.tolist(), int(taken)))
    assert results[0] == results[1]
    assert results[0][3] == held.tolist()


@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (2, 8, 3), (5, 8, 3, 3), (2, 16, 1), (1, 8, 127)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 4), (1, 2), (3, 8)])
def test_n_of_m_is_what_the_pattern_chooses(shape, n, m):
    for seed in range(5):
        held = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        held = held if seed else held.round()  # with many equals
        parameter, latent = held.clone(), torch.full(shape, math.nan)
        active, taken = torch.zeros(shape, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
        assert _exchange.takes_n_of_m(parameter, latent, active, m)
        _exchange.take_n_of_m(parameter, latent, active, n, m, taken)
        wanted = dnw.NOfM(n, m).choose(held)
        assert torch.equal(active, wanted)
        assert torch.equal(parameter, torch.where(wanted, held, 0.0))
        assert torch.equal(latent, held)
        assert int(taken) == held.numel()


def test_a_group_larger_than_is_compared_at_once_is_left_to_others():
    tensors = torch.zeros(1, 4, 600), torch.zeros(1, 4, 600)
    assert not _exchange.takes_n_of_m(*tensors, torch.zeros(1, 4, 600, dtype=torch.bool), 4)


class Wide(nn.Module):
    """Large enough for pieces, threads and brackets, with a graph's candidates besides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(300, 700, bias=False)
        self.graph = dnw.graphs.StaticGraph((8, 60, 60), 20)
        self.last = nn.Linear(512, 256, bias=False)


BUDGETS = {
    "dnw": {"density": 0.1, "include": "*.weight"},
    "no_update": {"density": 0.3, "rule": dnw.NoUpdate(), "include": "*.weight"},
    "random": {"density": 0.1, "rule": dnw.RandomGraph(), "include": "*.weight"},
    "rigl": {"density": 0.1, "rule": dnw.RigL(every=3), "include": "*.weight"},
    "falling": {"density": 0.1, "schedule": dnw.DensitySchedule(end=6), "include": "*.weight"},
    "floor": {"density": 0.03, "floor": dnw.Floor(per_target=1), "include": "*.weight"},
    "floor of 3": {"density": 0.07, "floor": dnw.Floor(per_target=3), "rule": dnw.NormSTE(), "include": "*.weight"},
    "2 of 4": {"pattern": dnw.NOfM(2, 4), "include": ["first", "last"]},
}


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("lr", [0.001, 0.01, 3.0])
def test_steps_are_the_same_without_native_code_and_by_ranking(name, lr, monkeypatch):
    in_one_pass = []
    take_over = one_pass.take_over
    monkeypatch.setattr("dnw._wiring.one_pass.take_over", lambda *args: in_one_pass.append(take_over(*args)) or in_one_pass[-1])

    def train() -> tuple[dict, list]:
        torch.manual_seed(0)
        net = Wide()
        optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
        wiring = dnw.wire(net, optimizer, **BUDGETS[name])
        for step in range(8):
            generator = torch.Generator().manual_seed(step)
            for parameter in net.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        return copy.deepcopy(net.state_dict()), [(p.latent, p.active, p.entered) for p in wiring.values()]

    native = train()
    assert any(in_one_pass) or lr > 0.001 or name in ("random", "rigl")
    without_native(monkeypatch)
    plain = train()
    monkeypatch.setattr("dnw._wiring.one_pass.fits", lambda layer: False)
    ranked = train()
    for other in (plain, ranked):
        assert all(torch.equal(a, b) for a, b in zip(native[0].values(), other[0].values(), strict=True))
        for ours, theirs in zip(native[1], other[1], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 200])
def test_packed_masks_and_what_they_count(size, monkeypatch):
    masks = [torch.rand(size) < share for share in (0.3, 0.5, 0.2)]
    results = []
    for _ in range(2):
        now, then, ever = map(_exchange.packed, masks)
        results.append((_exchange.tally(now, then, ever), now.tolist(), ever.tolist()))
        without_native(monkeypatch)
    assert results[0] == results[1]
    now, then, ever = masks
    assert results[0][0] == [int(x.sum()) for x in (now, ever | now, now & ~then, then & ~now)]


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 1, 3, 3), (2, 70, 1)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
def test_dead_targets_and_sources(shape, groups, density, monkeypatch):
    mask = torch.rand(shape) < density
    native = _exchange.dead(mask, groups)
    without_native(monkeypatch)
    assert native == _exchange.dead(mask, groups)


def test_jobs_give_their_results_in_order_and_raise_what_they_raise(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    jobs = [(1 << 17, lambda i=i: i * i) for i in range(9)]
    assert _team.each(jobs) == [i * i for i in range(9)]

    def fail() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        _team.each([*jobs, (1 << 17, fail)])
