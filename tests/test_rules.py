"""What each rule does in one step, by hand; schedules, patterns, and what does not go together."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal

import pytest
import torch
import torch.nn.functional as F
from helpers import rule_cases, small_net, train_steps
from torch import Tensor, nn

import dnw

CASES = rule_cases(small_net())


def edges(latent: list[float], rule: dnw.Rule, lr: float = 1.0, momentum: float = 0.0, **budget: object):
    """One target with some sources, whose latent weights are as given."""
    layer = nn.Linear(len(latent), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([latent], dtype=torch.float32))
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=momentum)
    wiring = dnw.wire(layer, optimizer, rule=rule, **(budget or {"num_edges": 2}))
    wiring["weight"].latent = torch.tensor([latent], dtype=torch.float32)
    return layer, optimizer, wiring


def step(layer: nn.Module, optimizer: torch.optim.Optimizer, gradient: list[float]) -> None:
    """One step in which the weights have this gradient."""
    optimizer.zero_grad()
    layer(torch.tensor([gradient], dtype=torch.float32)).sum().backward()
    optimizer.step()


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.detach().flatten(), torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6)


# --- one step of each ---


def test_no_update_rule():
    layer, optimizer, wiring = edges([3, -2, 1], dnw.NoUpdate())
    step(layer, optimizer, [1, 1, 2.5])
    close(wiring["weight"].latent, [2, -3, 1])
    step(layer, optimizer, [1.5, 0, 7])  # the first shrinks to 0.5, below the third, which comes in without having learned
    close(layer.weight, [0, -3, 1])


def test_targeted_dropout_keeps_signs_drops_at_its_rate_and_evaluates_on_the_largest():
    torch.manual_seed(0)
    layer = nn.Linear(200, 100, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    wiring = dnw.wire(layer, optimizer, density=0.1, rule=dnw.TargetedDropout(rate=0.9))
    before, active = wiring["weight"].latent, wiring["weight"].active
    kept = layer.weight.detach() != 0
    assert kept[active].all()
    share = kept[~active].double().mean().item()
    assert share == pytest.approx(0.1, abs=0.01)
    assert torch.equal(layer.weight[kept], before[kept])  # with their signs
    layer(torch.ones(1, 200)).sum().backward()
    optimizer.step()
    changed = wiring["weight"].latent != before
    assert torch.equal(changed, kept)  # a dropped edge gets no gradient in that step
    assert not torch.equal(layer.weight.detach() != 0, kept)  # and the next step drops others
    layer.eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="wiring.settled"):
        layer(torch.ones(1, 200))
    with torch.no_grad(), wiring.settled():
        assert torch.equal(layer.weight != 0, wiring["weight"].active)
        assert torch.equal(
            layer(torch.ones(1, 200)), F.linear(torch.ones(1, 200), wiring["weight"].latent * (layer.weight != 0))
        )


def test_magnitude_pruning_prunes_for_good():
    layer, optimizer, wiring = edges([3, -2, 1], dnw.MagnitudePruning(), momentum=0.9)
    close(wiring["weight"].latent, [3, -2, 0])
    for _ in range(3):
        step(layer, optimizer, [0, 0, 50])
    close(layer.weight, [3, -2, 0])
    step(layer, optimizer, [3, 0, 50])  # an active edge at 0 stays active
    close(layer.weight, [0, -2, 0])
    assert wiring["weight"].active.tolist() == [[True, True, False]]


def test_magnitude_pruning_is_not_undone_by_what_an_optimizer_does_to_zeros():
    """Muon mixes the entries of a gradient, so that zeros get an update too."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.Muon(layer.parameters(), lr=0.5) if hasattr(torch.optim, "Muon") else None
    if optimizer is None:
        pytest.skip("this torch has no Muon")
    wiring = dnw.wire(layer, optimizer, density=0.25, rule=dnw.MagnitudePruning())
    active = wiring["weight"].active
    for _ in range(5):
        layer(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    assert torch.equal(wiring["weight"].active, active)
    assert not wiring["weight"].latent[~active].any()


def test_l1_and_anneal():
    schedule = dnw.DensitySchedule(end=2, power=1)
    layer, optimizer, wiring = edges([3, -2, 1], dnw.L1Anneal(penalty=0.5), lr=0.1, num_edges=1, schedule=schedule)
    assert wiring.num_active == 3  # it starts complete
    step(layer, optimizer, [1, 1, 1])
    close(layer.weight, [3 - 0.15, -2 - 0.05, 0])
    step(layer, optimizer, [0, 0, 0])
    close(layer.weight, [2.85 - 0.05, 0, 0])
    step(layer, optimizer, [0, 5, 5])
    close(layer.weight, [2.75, 0, 0])


def test_rigl_grows_where_the_gradient_is_largest():
    layer, optimizer, wiring = edges([4, -3, 0, 0], dnw.RigL(every=2, fraction=0.5), lr=0.1)
    step(layer, optimizer, [0, 0, 7, 0])
    close(layer.weight, [4, -3, 0, 0])
    step(layer, optimizer, [1, 1, 5, -6])  # the smaller of the two goes, the fourth comes, from 0
    close(layer.weight, [3.9, 0, 0, 0])
    assert wiring["weight"].active.tolist() == [[True, False, False, True]]
    step(layer, optimizer, [0, 9, 9, 1])
    close(wiring["weight"].latent, [3.9, 0, 0, -0.1])


def test_set_grows_at_random():
    grown = set()
    for seed in range(20):
        layer, optimizer, _ = edges([4, -3, 0, 0, 0], dnw.SET(every=1, fraction=0.5), num_edges=2, seed=seed)
        step(layer, optimizer, [0, 0, 100, 0, 0])
        active = optimizer.state_dict()["state"][0]["active"].flatten()
        assert active[0]
        assert int(active.sum()) == 2
        close(layer.weight[0, :1], [4])
        grown.add(int(active[1:].nonzero()) + 1)
    assert grown == {1, 2, 3, 4}  # the pruned one may come back at once


def test_the_share_that_is_exchanged_falls_as_a_cosine():
    rule = dnw.RigL(every=10, fraction=0.4, until=100)
    assert [rule.fraction_at(s) for s in (10, 50, 100, 110, 55)] == pytest.approx(
        [0.4 / 2 * (1 + math.cos(math.pi / 10)), 0.2, 0, 0, 0]
    )
    assert dnw.SET(every=10, fraction=0.4).fraction_at(1000) == 0.4


def test_an_exchanged_edge_begins_without_momentum():
    layer, optimizer, _ = edges([4, -3, 0], dnw.RigL(every=2, fraction=0.5), lr=0.1, momentum=0.9)
    step(layer, optimizer, [0, 0, 0])
    step(layer, optimizer, [0, 0.1, 9])  # the second goes and has momentum; the third comes
    step(layer, optimizer, [0, 0, 0])
    close(layer.weight, [4, 0, 0])
    step(layer, optimizer, [0, 8, 0])  # the second comes back
    step(layer, optimizer, [0, 0, 0])
    close(layer.weight, [4, 0, 0])


def test_sparse_momentum_grows_by_momentum_and_moves_edges_to_where_it_is():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    wiring = dnw.wire(model, optimizer, density=0.2, rule=dnw.SparseMomentum(every=3, fraction=0.5))
    assert [p.num_active for p in wiring.values()] == [20, 20]
    before = {n: p.active for n, p in wiring.items()}
    for number in range(3):
        assert all(torch.equal(before[n], p.active) for n, p in wiring.items())
        optimizer.zero_grad()
        for layer, size in zip(model, (3.0, 1.0), strict=True):
            generator = torch.Generator().manual_seed(number)
            layer.weight.grad = size * (1 + 0.1 * torch.rand(10, 10, generator=generator))
        optimizer.step()
    # half of each layer goes, and the 20 that come are shared out 3 : 1, up to the noise of the gradient
    assert [p.num_active for p in wiring.values()] == [25, 15]
    for (n, p), layer in zip(wiring.items(), model, strict=True):
        momentum = optimizer.state[layer.weight]["momentum_buffer"]
        stayed = before[n] & p.active
        come = p.active & ~before[n]
        if come.any():
            assert momentum[come].min() >= momentum[~p.active & ~before[n]].max()
        assert not layer.weight[come].any()
        assert stayed.any()


def test_sr_ste_refines_dormant_edges():
    layer, optimizer, wiring = edges([3, -2, 1], dnw.SRSTE(decay=0.1))
    step(layer, optimizer, [1, 1, 0.5])
    close(wiring["weight"].latent, [2, -3, 1 - 0.5 - 0.1])


def test_iterative_hard_thresholding_forgets_what_it_does_not_select():
    layer, optimizer, wiring = edges([3, -2, 1], dnw.IHT())
    close(wiring["weight"].latent, [3, -2, 0])
    step(layer, optimizer, [0.5, 0, -1.5])  # the third reaches 1.5, where it would be 2.5 with a latent weight
    close(layer.weight, [2.5, -2, 0])
    step(layer, optimizer, [0, 0, 0.5])
    close(layer.weight, [2.5, -2, 0])
    step(layer, optimizer, [0, 0, -2.25])
    close(layer.weight, [2.5, 0, 2.25])
    close(wiring["weight"].latent, [2.5, 0, 2.25])


def test_iterative_hard_thresholding_is_projected_gradient_descent():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    twin = layer.weight.detach().clone().requires_grad_()
    plain = torch.optim.Adam([twin], lr=0.05)
    dnw.wire(layer, optimizer, num_edges=8, rule=dnw.IHT())

    def project() -> None:
        with torch.no_grad():
            kept = twin.abs().flatten().topk(8).indices
            twin.copy_(torch.zeros(24).scatter(0, kept, twin.flatten()[kept]).view(4, 6))

    project()
    for _ in range(30):
        torch.testing.assert_close(layer.weight.detach(), twin.detach(), rtol=0, atol=0)
        gradient = torch.randn(4, 6)
        layer.weight.grad, twin.grad = gradient.clone(), gradient
        optimizer.step()
        plain.step()
        project()


def test_norm_ste_hears_every_target_by_the_same_measure():
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 0.5, 0.0], [2.0, 0.25, 0.0], [0.1, 0.0, 0.0]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    wiring = dnw.wire(layer, optimizer, num_edges=2, rule=dnw.NormSTE(rate=0.3))
    layer.weight.grad = torch.full((3, 3), 0.1)
    optimizer.step()  # norms 4, 2 and none; their mean is 3
    dormant = [0.3 * 0.1, 0.3 * 0.1 * 2 / 3, 0.0]
    rows = [[4.0 - 0.1, 0.5 - dormant[0], -dormant[0]], [2.0 - 0.1, 0.25 - dormant[1], -dormant[1]], [0.1, 0.0, 0.0]]
    torch.testing.assert_close(wiring["weight"].latent, torch.tensor(rows))


def test_norm_ste_of_a_layer_of_zeros():
    layer = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    wiring = dnw.wire(layer, optimizer, num_edges=1, rule=dnw.NormSTE())
    layer.weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(wiring["weight"].latent, torch.tensor([[-1.0, 0.0], [0.0, 0.0]]))


def test_st3_shrinks_by_the_threshold_and_scales_up():
    layer, optimizer, wiring = edges([3, -2, 1], dnw.ST3(rescale=False))
    close(layer.weight, [2, -1, 0])
    step(layer, optimizer, [1, 1, 1])
    close(wiring["weight"].latent, [2, -3, 0])
    close(layer.weight, [2, -3, 0])
    layer, _, _ = edges([3, -2, 1], dnw.ST3())
    scale = 1.01 / (5 / 6 + 0.01)
    close(layer.weight, [2 * scale, -scale, 0])


def test_st3_has_one_threshold_for_a_global_budget():
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[5.0, 4, 1]]))
        model[1].weight.copy_(torch.tensor([[3.0], [2]]))
    dnw.wire(model, torch.optim.SGD(model.parameters(), lr=1.0), dnw.Global(0.6), rule=dnw.ST3(rescale=False))
    close(model[0].weight, [3, 2, 0])
    close(model[1].weight, [1, 0])


def test_feather():
    layer, optimizer, wiring = edges([3, -2, 1], dnw.Feather(power=3, dormant_gradient=0.5))
    close(layer.weight, [26 ** (1 / 3), -(7 ** (1 / 3)), 0])
    step(layer, optimizer, [1, 1, 1])
    close(wiring["weight"].latent, [2, -3, 0.5])


def test_thresholds_of_weights_without_a_gap():
    for rule in (dnw.ST3(), dnw.Feather()):
        layer, _, _ = edges([0, 0, 0], rule)
        close(layer.weight, [0, 0, 0])
        layer, _, _ = edges([1, -1, 1], rule)
        close(layer.weight, [0, 0, 0])  # what is no larger than the threshold is 0
        layer, _, _ = edges([1e-30, -2e-30, 1e-31], rule, num_edges=3)  # nothing is dormant: the threshold is 0
        assert torch.isfinite(layer.weight).all()
        assert layer.weight.all()


def test_top_kast_updates_the_backward_set_alone():
    layer, optimizer, wiring = edges([4, 3, 2, 1], dnw.TopKAST(backward=2, penalty=0.1), num_edges=1)
    close(layer.weight, [4, 0, 0, 0])
    step(layer, optimizer, [1, 1, 1, 1])
    close(wiring["weight"].latent, [4 - 1 - 0.1 * 4, 3 - 1 - 0.4 * 3, 2, 1])


# --- schedules ---


def test_the_cubic_schedule():
    schedule = dnw.DensitySchedule(end=110, begin=10, every=10, initial=0.9)
    k, n = 100, 1000
    assert schedule.num_edges(0, k, n) == schedule.num_edges(10, k, n) == 900
    assert schedule.num_edges(60, k, n) == schedule.num_edges(69, k, n) == round(100 + 800 * 0.5**3)
    assert schedule.num_edges(110, k, n) == schedule.num_edges(10**9, k, n) == 100
    falling = [schedule.num_edges(step, k, n) for step in range(130)]
    assert falling == sorted(falling, reverse=True)
    assert dnw.DensitySchedule(end=10, power=1).num_edges(5, 10, 20) == 15
    assert dnw.DensitySchedule(end=10, initial=0.1).num_edges(0, 10, 20) == 10  # never below the budget


def test_a_schedule_follows_completed_steps_and_skips_layers_that_do_not_step():
    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, base, density=0.1, schedule=dnw.DensitySchedule(end=4, power=1))
    model[7].weight.requires_grad_(False)  # it gets no gradient from here on
    counts = []
    for number in range(5):
        counts.append((wiring["0.weight"].num_active, wiring["7.weight"].num_active))
        train_steps(model, base, range(number, number + 1))
    assert counts == [(216, 64), (168, 64), (119, 64), (71, 64), (22, 64)]
    state = base.state_dict()
    other = small_net(3)
    other_base = torch.optim.SGD(other.parameters(), lr=0.1)
    other_wiring = dnw.wire(other, other_base, density=0.1, schedule=dnw.DensitySchedule(end=4, power=1))
    other_base.load_state_dict(state)
    assert [p.num_active for p in other_wiring.values()] == [p.num_active for p in wiring.values()]
    plain = small_net()
    plain_base = torch.optim.SGD(plain.parameters(), lr=0.1)
    dnw.wire(plain, plain_base, density=0.1)
    with pytest.raises(ValueError, match=r"'7.weight': it has 64 active edges, this wiring keeps 6"):
        plain_base.load_state_dict(state)


# --- patterns ---


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 3)])
def test_n_of_m(n, m):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(24, 5, bias=False), nn.Conv2d(24, 6, 3, bias=False)])
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), pattern=dnw.NOfM(n, m))
    for parameter in wiring.values():
        groups = parameter.active.movedim(1, -1).reshape(-1, m)
        sizes = parameter.latent.abs().movedim(1, -1).reshape(-1, m)
        assert (groups.sum(1) == n).all()
        assert (sizes.masked_fill(~groups, math.inf).amin(1) >= sizes.masked_fill(groups, 0).amax(1)).all()


def test_ties_within_a_group_go_to_the_first():
    layer, _, wiring = edges([1, -1, 1, 1, 0, 0, 0, 0], dnw.DNW(), pattern=dnw.NOfM(2, 4))
    assert wiring["weight"].active.int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    close(layer.weight, [1, -1, 0, 0, 0, 0, 0, 0])


def test_blocks_and_channels():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, bias=False)
    wiring = dnw.wire(conv, torch.optim.SGD(conv.parameters(), lr=0.1), density=0.25, pattern=dnw.Blocks(4, 2))
    active, latent = wiring["weight"].active, wiring["weight"].latent
    blocks = active.reshape(2, 4, 3, 2, 3, 3).movedim((1, 3), (-2, -1)).flatten(-2)
    means = latent.abs().reshape(2, 4, 3, 2, 3, 3).movedim((1, 3), (-2, -1)).flatten(-2).mean(-1)
    assert torch.equal(blocks.any(-1), blocks.all(-1))
    chosen = blocks.all(-1)
    assert int(chosen.sum()) == dnw.num_edges(0.25, 54) == wiring.num_active // 8
    assert means[chosen].min() > means[~chosen].max()
    conv = nn.Conv2d(6, 8, 3, bias=False)
    wiring = dnw.wire(conv, torch.optim.SGD(conv.parameters(), lr=0.1), density=0.5, pattern=dnw.Channels())
    rows = wiring["weight"].active.flatten(1)
    assert torch.equal(rows.any(1), rows.all(1))
    assert int(rows.all(1).sum()) == 4


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        (dnw.NOfM(2, 4), (6, 5), r"'weight' has shape \(5, 6\): the pattern 2:4 needs a number of sources .* that 4 divides"),
        (dnw.Blocks(4, 4), (8, 6), r"'weight' has shape \(6, 8\): it does not divide into blocks of 4 targets"),
    ],
)
def test_shapes_that_a_pattern_does_not_divide(pattern, shape, message):
    layer = nn.Linear(*shape)
    budget = {} if isinstance(pattern, dnw.NOfM) else {"density": 0.5}
    with pytest.raises(ValueError, match=message):
        dnw.wire(layer, torch.optim.SGD(layer.parameters(), lr=0.1), pattern=pattern, **budget)


# --- what does not go together ---


def sgd(model: nn.Module, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


FALLING = dnw.DensitySchedule(end=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"density": 0.1, "rule": dnw.SparseMomentum()},
            "by the optimizer's momentum, and this SGD keeps none; give it momentum",
        ),
        ({"density": 0.1, "rule": dnw.RandomGraph(), "schedule": FALLING}, "RandomGraph never changes its edges"),
        (
            {"pattern": dnw.NOfM(), "exclude": nn.Conv2d, "schedule": FALLING},
            "fixes the number of edges, so it cannot follow a",
        ),
        ({"pattern": dnw.NOfM(), "exclude": nn.Conv2d, "density": 0.5}, "fixes the number of edges; leave density"),
        ({"pattern": dnw.NOfM(), "exclude": nn.Conv2d, "rule": dnw.RigL()}, "RigL cannot choose edges of the pattern NOfM"),
        ({"pattern": dnw.Channels(), "density": 0.5, "rule": dnw.ST3()}, "ST3 cannot choose edges of the pattern Channels"),
        ({"pattern": dnw.Channels(), "num_edges": 5}, "give density instead of num_edges"),
        ({"pattern": dnw.Channels(), "density": dnw.Global(0.5)}, "units of different sizes in '0.weight', '5.weight'"),
        ({"pattern": "2:4", "density": 0.5}, "expected a pattern such as dnw.NOfM"),
        ({"schedule": 0.5, "density": 0.5}, "schedule: expected dnw.DensitySchedule"),
    ],
)
def test_what_does_not_go_together(arguments, message):
    model = small_net()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        dnw.wire(model, sgd(model), **arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_rules_that_go_by_gradients_refuse_parameters_that_get_none():
    model = small_net()
    model[5].weight.requires_grad_(False)
    assert "5.weight" not in dnw.wire(model, sgd(model), density=0.2, rule=dnw.RigL())  # left out by itself
    layer = nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=False"):
        dnw.wire(layer, sgd(layer), density=0.2, rule=dnw.RigL())


@pytest.mark.filterwarnings("ignore:no path of active edges")
def test_patterns_are_for_parameters_all_of_whose_entries_are_candidates():
    graph = dnw.graphs.DiscreteTimeGraph(8, 2, 2, maps=False)
    assert dnw.wire(graph, sgd(graph), density=0.25, pattern=dnw.Blocks(2, 2)).num_active == 16
    graph = dnw.graphs.StaticGraph([4, 4], 4)
    with pytest.raises(ValueError, match="entries that are no candidate edges"):
        dnw.wire(graph, sgd(graph), density=0.25, pattern=dnw.Blocks(4, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dnw.TargetedDropout(rate=1.5), r"TargetedDropout: rate=1.5: allowed is a number from 0 to 1"),
        (lambda: dnw.RigL(every=0), r"RigL: every=0: allowed is a whole number from 1 on"),
        (lambda: dnw.RigL(every=2.5), r"RigL: every=2.5"),
        (lambda: dnw.SET(fraction=-0.1), r"SET: fraction=-0.1"),
        (lambda: dnw.SET(until=0), r"SET: until=0"),
        (lambda: dnw.SRSTE(decay=-1), r"SRSTE: decay=-1"),
        (lambda: dnw.Feather(power=0.5), r"Feather: power=0.5"),
        (lambda: dnw.TopKAST(backward=0.5), r"TopKAST: backward=0.5"),
        (lambda: dnw.L1Anneal(penalty=float("nan")), r"L1Anneal: penalty=nan"),
        (lambda: dnw.DensitySchedule(end=0), r"DensitySchedule: end=0"),
        (lambda: dnw.DensitySchedule(end=5, begin=5), r"begin=5 is not before end=5"),
        (lambda: dnw.DensitySchedule(end=5, initial=2.0), r"initial=2.0: a density"),
        (lambda: dnw.DensitySchedule(end=5, power=0), r"power=0"),
        (lambda: dnw.NOfM(5, 4), r"NOfM\(5, 4\)"),
        (lambda: dnw.Blocks(0, 4), r"Blocks\(0, 4\)"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_whose_masks_have_another_shape_is_named():
    class Wrong(dnw.DNW):
        def select(self, pools):
            return [[torch.ones(2, 2) for _ in pool.layers] for pool in pools]

    model = small_net()
    with pytest.raises(TypeError, match=r"Wrong.select gave edges of '0.weight' as torch.float32 of shape \(2, 2\)"):
        dnw.wire(model, sgd(model), density=0.2, rule=Wrong())


@pytest.mark.parametrize("name", list(CASES))
def test_training_by_every_rule_learns(name):
    """On a few batches seen again and again the loss falls."""
    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dnw.wire(model, base, rule=CASES[name].rule, **CASES[name].budget)
    losses = [loss for _ in range(20) for loss in train_steps(model, base, range(3))]
    assert sum(losses[-6:]) < 0.97 * sum(losses[:6])


@pytest.mark.parametrize("rule", [dnw.ST3(), dnw.ST3(rescale=False), dnw.Feather(), dnw.Feather(power=1)])
def test_writes_to_a_model_of_thresholded_weights_are_effective_values(rule):
    torch.manual_seed(0)
    layer = nn.Linear(20, 20)
    wiring = dnw.wire(layer, sgd(layer), density=0.3, rule=rule)
    before, active = layer.weight.detach().clone(), wiring["weight"].active
    with torch.no_grad():
        layer.weight[0] *= 0.9
        layer.weight[3, active[3].nonzero()[0]] = 0.25
    expected = layer.weight.detach().clone()
    wiring.project()
    kept = wiring["weight"].active & active
    assert int((wiring["weight"].active ^ active).sum()) <= 2
    if rule != dnw.ST3():  # its scale depends on all weights of a target
        torch.testing.assert_close(layer.weight[kept], expected[kept], rtol=1e-3, atol=5e-3)
    torch.testing.assert_close(layer.weight[5:][kept[5:]], before[5:][kept[5:]], rtol=1e-3, atol=5e-3)


def test_rules_that_move_edges_between_layers_need_units_of_one_size():
    model = small_net()
    with pytest.raises(
        ValueError, match="SparseMomentum moves edges between layers, and Channels.* has units of different sizes"
    ):
        dnw.wire(model, sgd(model, 0.9), density=0.5, rule=dnw.SparseMomentum(), pattern=dnw.Channels())


def test_a_copied_optimizer_adopts_the_step_of_layers_that_stepped():
    def make(model, optimizer):
        return dnw.wire(model, optimizer, density=0.1, schedule=dnw.DensitySchedule(end=6, power=1))

    model = small_net()
    base = sgd(model, 0.9)
    wiring = make(model, base)
    train_steps(model, base, range(1))
    model[7].weight.requires_grad_(False)
    train_steps(model, base, range(1, 6))
    other, other_base = copy.deepcopy((model, base))
    other[7].weight.requires_grad_(True)  # else it would be left out
    other_wiring = make(other, other_base)
    assert other_wiring.step == wiring.step == 6
    assert [p.num_active for p in other_wiring.values()] == [p.num_active for p in wiring.values()]


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("where", ["write", "activate"])
def test_a_step_that_is_interrupted_while_selecting_is_finished_to_the_same(name, where, monkeypatch):
    from dnw._wiring.wired_layer import WiredLayer

    def make():
        model = small_net()
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, base, dnw.wire(model, base, rule=CASES[name].rule, **CASES[name].budget)

    whole, broken = make(), make()
    for model, base, _ in (whole, broken):
        train_steps(model, base, range(3))
    train_steps(*whole[:2], range(3, 4))
    original, calls = getattr(WiredLayer, where), 0

    def interrupted(self, value):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        original(self, value)

    with monkeypatch.context() as patched:
        patched.setattr(WiredLayer, where, interrupted)
        with suppress(KeyboardInterrupt):
            train_steps(*broken[:2], range(3, 4))
    broken[1].state_dict()
    for n in whole[2]:
        for what in ("latent", "active", "entered", "weight"):
            assert torch.equal(getattr(whole[2][n], what), getattr(broken[2][n], what)), (n, what)
    assert whole[2].step == broken[2].step == 4


def two_layers(**budget: object):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)])
    optimizer = sgd(model, 0.9)
    return model, optimizer, dnw.wire(model, optimizer, rule=dnw.SparseMomentum(every=3), **budget)


def test_sparse_momentum_reads_the_momentum_of_layers_that_did_not_step():
    def step_with(model: nn.ModuleList, optimizer: torch.optim.Optimizer, number: int, both: bool) -> None:
        optimizer.zero_grad()
        for layer, size in zip(model, (1.0, 3.0), strict=True):
            layer.weight.grad = size * torch.randn(10, 10, generator=torch.Generator().manual_seed(number))
        if not both:
            model[1].weight.grad = None
        optimizer.step()

    model, optimizer, wiring = two_layers(density=0.2)
    other, other_optimizer, other_wiring = two_layers(density=0.2)
    for number in range(2):
        step_with(model, optimizer, number, both=True)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        step_with(each, its_optimizer, 2, both=False)
    assert [p.num_active for p in wiring.values()] == [p.num_active for p in other_wiring.values()]
    assert wiring["1.weight"].num_active > 20


def test_sparse_momentum_with_a_schedule_is_copied_and_loaded_before_its_first_step():
    budget = {"density": dnw.ErdosRenyiKernel(0.2), "schedule": dnw.DensitySchedule(end=5, initial=0.3)}
    model, optimizer, wiring = two_layers(**budget)
    assert wiring.num_active == 60
    assert copy.deepcopy((model, optimizer, wiring))[2].num_active == 60
    two_layers(**budget)[1].load_state_dict(optimizer.state_dict())


def test_gradients_that_are_not_finite_do_not_break_the_wiring():
    model, optimizer, wiring = two_layers(density=0.2, check_finite=False)
    for _ in range(4):
        for layer in model:
            layer.weight.grad = torch.full((10, 10), math.nan)
        optimizer.step()
    assert wiring.num_active == 40


def test_removing_a_rule_that_settles_leaves_the_weights_to_evaluate_with():
    model = small_net()
    base = sgd(model)
    wiring = dnw.wire(model, base, density=0.1, rule=dnw.TargetedDropout(rate=0.5))
    train_steps(model, base, range(2))
    total = wiring.num_active
    wiring.remove()
    assert sum(int(model[i].weight.count_nonzero()) for i in (0, 5, 7)) <= total


def test_rigl_clears_the_momentum_of_edges_that_a_layer_without_gradient_lost():
    model = nn.ModuleList([nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)])
    optimizer = sgd(model, 0.9)
    wiring = dnw.wire(model, optimizer, dnw.Global(0.3), rule=dnw.RigL(every=1, fraction=0.5))
    for both in (True, False):
        optimizer.zero_grad()
        for layer in model[: 2 if both else 1]:
            layer.weight.grad = torch.randn(10, 10)
        optimizer.step()
    momentum = optimizer.state[model[1].weight]["momentum_buffer"]
    assert not momentum[~wiring["1.weight"].active].any()


@pytest.mark.parametrize("rule", [dnw.Complete(), dnw.Frozen({"weight": torch.eye(4, dtype=torch.bool)})])
def test_rules_whose_edges_are_given_take_no_pattern(rule):
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="cannot choose edges of the pattern"):
        dnw.wire(layer, sgd(layer), rule=rule, pattern=dnw.NOfM(2, 4))


def test_infinite_settings_and_decimal_densities():
    for make in (
        lambda: dnw.TopKAST(backward=math.inf),
        lambda: dnw.SRSTE(decay=math.inf),
        lambda: dnw.L1Anneal(penalty=math.inf),
    ):
        with pytest.raises(ValueError, match="allowed is a number"):
            make()
    assert dnw.DensitySchedule(end=5, initial=Decimal("0.5")).num_edges(0, 1, 10) == 5
    layer = nn.Linear(4, 4)
    dnw.wire(layer, sgd(layer), density=0.5, rule=dnw.ST3(), include=["bias", "weight"])


@pytest.mark.parametrize("rule", [dnw.SRSTE(decay=1.0), dnw.L1Anneal(penalty=1.0), dnw.TopKAST(penalty=1.0), dnw.NormSTE()])
def test_an_optimizer_that_maximizes_steps_as_one_that_minimizes_the_negative(rule):
    latents = []
    for sign in (1, -1):
        model = nn.Linear(8, 8, bias=False)
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, maximize=sign < 0)
        wiring = dnw.wire(model, base, density=0.5, rule=rule)
        for step in range(3):
            base.zero_grad()
            inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            (sign * model(inputs).square().mean()).backward()
            base.step()
        latents.append(wiring["weight"].latent)
    assert torch.equal(*latents)


def test_norm_ste_hears_small_weights_in_half_precision():
    gradients = []
    for dtype in (torch.float32, torch.float16):
        model = nn.Linear(16, 16, bias=False)
        nn.init.uniform_(model.weight, 1e-4, 2e-4, generator=torch.Generator().manual_seed(0))
        model = model.to(dtype)
        base = torch.optim.SGD(model.parameters(), lr=1.0)
        wiring = dnw.wire(model, base, density=0.5, rule=dnw.NormSTE(rate=1.0))
        dormant, before = ~wiring["weight"].active, wiring["weight"].latent
        model.weight.grad = torch.full_like(model.weight, 2**-6)
        base.step()
        gradients.append((before - wiring["weight"].latent)[dormant].float() * 2**6)
    assert gradients[0].mean() > 0.9
    assert torch.allclose(*gradients, atol=0.02)


@dataclass(frozen=True)
class Seldom(dnw.DNW):
    """DNW that gives other edges at every third step."""

    def is_due(self, step: int) -> bool:
        return step % 3 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", [None, dnw.NOfM(2, 4)])
def test_edges_stay_between_the_steps_at_which_a_rule_gives_others(dtype, pattern):
    model = nn.Linear(64, 64, bias=False).to(dtype)
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    wiring = dnw.wire(model, base, None if pattern else 0.5, pattern=pattern, rule=Seldom())
    changed = []
    for _ in range(6):
        before = wiring["weight"].active
        base.zero_grad()
        model(torch.randn(8, 64, dtype=dtype)).square().mean().backward()
        base.step()
        assert torch.equal(model.weight != 0, wiring["weight"].active)
        changed.append(not torch.equal(wiring["weight"].active, before))
    assert changed == [False, False, True] * 2
