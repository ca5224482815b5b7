"""Budgets and exact selection."""

import math

import pytest
import torch
from helpers import slow_top_k
from hypothesis import given, settings
from hypothesis import strategies as st

import dnw
from dnw._selection import top_k as _select
from dnw._selection.budgets import ByName, LayerShape


@pytest.mark.parametrize(
    ("density", "candidates", "k"),
    [
        (0.1, 100, 10),
        (0.145, 100, 15),  # 14.5 as written, although 0.145 is stored as a little less
        (0.005, 100, 1),  # 0.5 rounds up
        (0.004, 100, 1),  # never fewer than one
        (0.25, 10, 3),  # 2.5 rounds up, not to even
        (0.35, 10, 4),
        (1, 7, 7),
        (1e-9, 3, 1),
    ],
)
def test_number_of_edges_is_rounded_half_up(density, candidates, k):
    assert dnw.num_edges(density, candidates) == k


@pytest.mark.parametrize("density", [0, -0.1, 1.01, math.nan, math.inf, "0.1", True, None])
def test_density_outside_the_range_is_one_clear_error(density):
    with pytest.raises(ValueError, match=r"density=.*\(0, 1\]"):
        dnw.num_edges(density, 10)


def test_literal_scores_to_literal_mask():
    scores = torch.tensor([[0.1, -3.0, 0.2], [2.0, -0.2, 0.0]])
    (mask,) = dnw.top_k([scores], 3, [None])
    assert mask.tolist() == [[False, True, True], [True, False, False]]  # of the two 0.2 the lower index


def test_candidates_only():
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0])
    candidates = torch.tensor([False, True, False, True])
    (mask,) = dnw.top_k([scores], 2, [candidates])
    assert mask.tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 5e-324])
def test_all_equal_weights_take_the_lowest_indices(dtype, value):
    scores = torch.full((7, 11), value, dtype=torch.float64).to(dtype)
    (mask,) = dnw.top_k([scores], 13, [None])
    assert mask.flatten().nonzero().squeeze(1).tolist() == list(range(13))


def test_denormals_are_told_apart():
    scores = torch.tensor([1e-45, 3e-45, 0.0, 4e-45])
    (mask,) = dnw.top_k([scores], 2, [None])
    assert mask.tolist() == [False, True, False, True]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_equals_sorting_with_ties_and_candidates_over_several_tensors(data):
    values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1e-40, 2.0, 0.25])
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    scores = [data.draw(st.lists(values, min_size=n, max_size=n)) for n in sizes]
    allowed = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in sizes]
    flat_allowed = [a for part in allowed for a in part]
    if not any(flat_allowed):
        return
    k = data.draw(st.integers(1, sum(flat_allowed)))
    masks = dnw.top_k([torch.tensor(s) for s in scores], k, [torch.tensor(a) for a in allowed])
    assert torch.cat(masks).tolist() == slow_top_k([s for part in scores for s in part], k, flat_allowed)


@pytest.mark.parametrize("k", [1, 17, 5_000, 150_000, 399_999, 400_000])
@pytest.mark.parametrize("kind", ["normal", "ties", "sorted", "periodic", "one_large"])
def test_large_tensors_equal_a_stable_sort(kind, k):
    n = 400_000
    generator = torch.Generator().manual_seed(k)
    scores = {
        "normal": torch.randn(n, generator=generator),
        "ties": torch.randint(-50, 50, (n,), generator=generator).float(),
        "sorted": torch.arange(n).float(),
        "periodic": (torch.arange(n) % 7).float(),  # a strided sample sees a biased part of it
        "one_large": torch.zeros(n).index_fill_(0, torch.tensor([n - 1]), 3.0),
    }[kind]
    expected = torch.zeros(n, dtype=torch.bool)
    expected[scores.abs().sort(descending=True, stable=True).indices[:k]] = True
    (mask,) = dnw.top_k([scores], k, [None])
    assert torch.equal(mask, expected)


# --- many pools at once, as on accelerators ---


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_histograms_choose_what_ranking_chooses(data):
    values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1e-40, 2.0, 0.25, 3e38])
    rankings = []
    for _ in range(data.draw(st.integers(1, 4))):
        sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=2))
        scores = [torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n))) for n in sizes]
        candidates = [torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in sizes]
        candidates[0][0] = True
        k = data.draw(st.integers(1, sum(int(c.sum()) for c in candidates)))
        rankings.append(_select.Ranking(scores, k, candidates))
    piece = data.draw(st.sampled_from([1, 7, 1 << 23]))
    wide = data.draw(st.booleans())
    if wide:
        rankings = [_select.Ranking([s.double() for s in r.scores], r.k, r.candidates) for r in rankings]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_select, "_PIECE", piece)
        masks = _select._rank_by_histograms(rankings)
    for ranking, mask in zip(rankings, masks, strict=True):
        expected = dnw.top_k(ranking.scores, ranking.k, ranking.candidates)
        assert torch.equal(mask, torch.cat(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_histograms_on_large_tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    rankings = [
        _select.Ranking([torch.randn(n, generator=generator).to(dtype)], k, [None])
        for n, k in ((300_000, 3_000), (70_000, 69_999), (1, 1), (5_000, 2_500))
    ]
    for ranking, mask in zip(rankings, _select._rank_by_histograms(rankings), strict=True):
        assert int(mask.sum()) == ranking.k
        assert torch.equal(mask, _select.largest(ranking.bits(), ranking.k))


def test_on_an_accelerator_nothing_waits_for_the_device_and_shapes_are_fixed():
    """Tensors without values stand for a device: whatever asked them for a value or a count would raise."""
    shapes = [(64, 3, 7, 7), (64, 64, 3, 3), (10, 64)]
    layers = [dnw.Layer("w", torch.empty(shape, device="meta"), None, 0) for shape in shapes]
    with pytest.raises(RuntimeError, match="meta"):
        bool(layers[0].latent.any())
    masks = dnw.top_k_each([dnw.Pool([layer], 100).ranking([layer.latent]) for layer in layers])
    assert [tuple(mask.shape) for (mask,) in masks] == shapes
    assert all(mask.device.type == "meta" and mask.dtype == torch.bool for (mask,) in masks)


def layers(*sizes: tuple[tuple[int, ...], int]) -> list[LayerShape]:
    return [LayerShape(f"l{i}.weight", f"l{i}", shape, candidates) for i, (shape, candidates) in enumerate(sizes)]


def test_uniform_rounds_each_layer():
    assert dnw.Uniform(0.25).allot(layers(((10, 1), 10), ((3, 2), 6))) == [([0], 3), ([1], 2)]


def test_global_is_one_pool():
    assert dnw.Global(0.5).allot(layers(((10, 1), 10), ((3, 2), 5))) == [([0, 1], 8)]


def test_erdos_renyi_kernel_literal():
    # scales (64+64+3+3)/(64*64*9) and (10+64)/(10*64): the small layer is denser
    shares = dnw.ErdosRenyiKernel(0.1).allot(layers(((64, 64, 3, 3), 36864), ((10, 64), 640)))
    assert sum(k for _, k in shares) == dnw.num_edges(0.1, 37504) == 3750
    assert shares == [([0], 3110), ([1], 640)]  # the small layer is capped at its size


def test_erdos_renyi_kernel_is_proportional_where_nothing_is_capped():
    shares = dnw.ErdosRenyiKernel(0.05).allot(layers(((100, 100), 10_000), ((200, 50), 10_000)))
    first, second = (k for _, k in shares)
    assert first + second == 1000
    assert first / second == pytest.approx(200 / 250, rel=2e-3)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 1.0), st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6))
def test_erdos_renyi_kernel_keeps_the_total_and_fits_every_layer(density, shapes):
    found = layers(*((shape, shape[0] * shape[1]) for shape in shapes))
    total = dnw.num_edges(density, sum(x.candidates for x in found))
    if total < len(found):
        with pytest.raises(ValueError, match="cannot give each"):
            dnw.ErdosRenyiKernel(density).allot(found)
        return
    shares = [k for _, k in dnw.ErdosRenyiKernel(density).allot(found)]
    assert sum(shares) == total
    assert all(1 <= k <= x.candidates for k, x in zip(shares, found, strict=True))


def test_budget_by_name_takes_the_first_pattern_that_fits():
    budget = ByName({"l0": 0.5, "*": 0.1}, {"l2.*": 3})
    found = layers(((10, 1), 10), ((20, 1), 20), ((30, 1), 30))
    assert budget.allot(found) == [([0], 5), ([1], 2), ([2], 3)]


def test_budget_pattern_errors():
    found = layers(((10, 1), 10), ((20, 1), 20))
    with pytest.raises(ValueError, match=r"'conv\*' fits no wired parameter; there are 'l0.weight', 'l1.weight'"):
        ByName({"conv*": 0.5, "*": 0.1}, {}).allot(found)
    with pytest.raises(ValueError, match=r"no budget pattern fits the wired parameter 'l1.weight'"):
        ByName({"l0": 0.5}, {}).allot(found)
    with pytest.raises(ValueError, match=r"'l1' never counts: patterns before it \('\*'\) take every parameter"):
        ByName({"*": 0.5, "l1": 0.1}, {}).allot(found)
    with pytest.raises(ValueError, match=r"num_edges=11 for 'l0.weight'.*from 1 to 10"):
        ByName({"*": 0.5}, {"l0": 11}).allot(found)
