"""Rules beside their papers, under every kind of optimizer; the momentum of edges that come in; errors of rules."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import OPTIMIZERS, small_net, train_steps
from torch import Tensor, nn

import dnw

MOMENTUMS = ["momentum", "nesterov", "adam", "adamw", *(["muon"] if "muon" in OPTIMIZERS else [])]


def linear(latent: list[list[float]], rule: dnw.Rule, optimizer: str = "momentum", **arguments: object):
    """A linear layer with the given latent weights, wired."""
    layer = nn.Linear(len(latent[0]), len(latent), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(latent))
    base = OPTIMIZERS[optimizer](layer.parameters())
    return layer, base, dnw.wire(layer, base, rule=rule, **arguments)


def random_step(layer: nn.Linear, optimizer: torch.optim.Optimizer, number: int) -> None:
    layer.weight.grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(number))
    optimizer.step()


# --- Top-KAST: what lies outside the backward set ---


def backward_set(wiring: dnw.Wiring) -> Tensor:
    """The twice as many largest latent weights, by sorting."""
    size = wiring["weight"].latent.abs().flatten()
    order = size.argsort(descending=True, stable=True)[: 2 * wiring.num_active]
    return torch.zeros_like(size, dtype=torch.bool).scatter(0, order, True).view(20, 30)


@pytest.mark.parametrize("name", MOMENTUMS)
def test_no_weight_outside_the_backward_set_moves(name):
    torch.manual_seed(0)
    layer, base, wiring = linear(torch.randn(20, 30).tolist(), dnw.TopKAST(backward=2), name, density=0.1)
    came_back = 0
    left = torch.zeros(20, 30, dtype=torch.bool)
    for number in range(12):
        before, inside = wiring["weight"].latent, backward_set(wiring)
        random_step(layer, base, number)
        after = wiring["weight"].latent
        assert torch.equal(after[~inside], before[~inside])
        assert (after != before)[inside].all()
        came_back += int((inside & left).sum())
        left |= ~inside
    assert came_back  # else nothing was seen of weights that have momentum and leave the set


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_what_comes_back_into_the_backward_set_has_no_momentum(name):
    torch.manual_seed(0)
    layer, base, wiring = linear(torch.randn(20, 30).tolist(), dnw.TopKAST(backward=2), name, density=0.1)
    for number in range(6):
        inside = backward_set(wiring)
        random_step(layer, base, number)
        state = base.state[layer.weight]
        momentum = state["momentum_buffer" if name == "momentum" else "exp_avg"]
        assert not momentum[~inside].any()
        assert momentum[inside].all()


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_training_with_a_backward_set_resumes_bit_for_bit(name):
    def make():
        model = small_net()
        base = OPTIMIZERS[name](model.parameters())
        return model, base, dnw.wire(model, base, density=0.2, rule=dnw.TopKAST(backward=2))

    whole, broken, resumed = make(), make(), make()
    train_steps(*whole[:2], range(8))
    train_steps(*broken[:2], range(4))
    resumed[0].load_state_dict(broken[0].state_dict())
    resumed[1].load_state_dict(copy.deepcopy(broken[1].state_dict()))
    train_steps(*resumed[:2], range(4, 8))
    for n in whole[2]:
        assert torch.equal(whole[2][n].latent, resumed[2][n].latent)
        assert torch.equal(whole[2][n].active, resumed[2][n].active)


# --- the momentum of edges that come in ---

TABLE = (Path(__file__).parents[1] / "docs/rules.md").read_text()
MOMENTUM = {
    name: re.search(rf"^\| `{rule.__name__}` \|.*\| ([^|]*) \|$", TABLE, re.MULTILINE) for name, rule in dnw.RULES.items()
}
PARTLY = {"what is left from when it was active", "its own, of the steps in which it was kept"}
KINDS = {"its own", "none", "nothing comes in"} | PARTLY


def entering(rule: dnw.Rule, optimizer: str) -> list[tuple[float, bool]]:
    """The momentum of each edge that came in over some steps, and whether the model had used it before."""
    torch.manual_seed(0)
    layer = nn.Linear(30, 20, bias=False)
    make = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, lr=0.05)}
    base = make[optimizer](layer.parameters())
    masks = {"weight": torch.rand(20, 30) < 0.3}
    rule = dnw.Frozen(masks) if isinstance(rule, dnw.Frozen) else rule
    budget = {} if isinstance(rule, (dnw.Frozen, dnw.Complete)) else {"density": 0.3}
    wiring = dnw.wire(layer, base, rule=rule, **budget)
    used, found = torch.zeros(20, 30, dtype=torch.bool), []
    for number in range(12):
        used |= layer.weight.detach() != 0
        random_step(layer, base, number)
        momentum = base.state[layer.weight]["momentum_buffer" if optimizer == "sgd" else "exp_avg"]
        entered = wiring["weight"].entered
        found += list(zip(momentum[entered].tolist(), used[entered].tolist(), strict=True))
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", list(dnw.RULES))
def test_the_momentum_of_an_entering_edge_is_as_the_table_says(name, optimizer):
    assert MOMENTUM[name] is not None, f"docs/rules.md says nothing of {name}"
    kind = MOMENTUM[name][1]
    rule = dnw.RULES[name]
    every = {"every": 2} if issubclass(rule, dnw.PruneAndGrow) else {}
    found = entering(rule(**every), optimizer)
    assert kind in KINDS
    assert bool(found) == (kind != "nothing comes in")
    if kind == "none":
        assert all(momentum == 0 for momentum, _ in found)
    elif kind == "its own":
        assert all(momentum != 0 for momentum, _ in found)
    elif kind in PARTLY:
        assert {used for _, used in found} == {True, False}
        assert all((momentum != 0) == used for momentum, used in found)


# --- SET ---


@pytest.mark.parametrize(("by_sign", "stay"), [(True, [4.0, 3.0, -10.0, -9.0]), (False, [-10.0, -9.0, -8.0, -7.0])])
def test_set_prunes_by_sign_as_in_the_paper_or_by_magnitude(by_sign, stay):
    """Half of four positive and of four negative edges go; or the four smallest of all, which are the positive ones."""
    edges = [1.0, 2.0, 3.0, 4.0, -7.0, -8.0, -9.0, -10.0]
    mask = torch.tensor([[True] * 8 + [False] * 400])
    pool = dnw.Pool([dnw.Layer("weight", torch.tensor([edges + [0.0] * 400]), None, 0, mask, step=1)], 8, stepped=True)
    ((chosen,),) = dnw.SET(every=1, fraction=0.5, by_sign=by_sign).select([pool])
    latent = pool.layers[0].latent[chosen & mask].tolist()
    assert set(stay) <= set(latent)
    assert int(chosen.sum()) == 8
    assert len(latent) == 4  # with this seed none of the pruned is drawn again


def test_set_by_sign_prunes_the_same_share_of_each_sign():
    torch.manual_seed(0)
    latent = (torch.randn(20, 30) + 0.5).tolist()  # more positive than negative ones
    layer, base, wiring = linear(latent, dnw.SET(every=1, fraction=0.4, by_sign=True), density=0.3)
    with torch.no_grad():
        layer.weight[wiring["weight"].active] = torch.randn(180, generator=torch.Generator().manual_seed(1)) + 0.5
    wiring.project()
    before = wiring["weight"].latent
    layer.weight.grad = torch.zeros(20, 30)
    base.param_groups[0].update(lr=0.0)
    layer.weight.grad[0, 0] = 1e-30
    base.step()
    for sign in (1, -1):
        of_sign = before * sign > 0
        gone = of_sign & (wiring["weight"].latent == 0)
        kept = of_sign & (wiring["weight"].latent != 0)
        assert int(gone.sum()) == pytest.approx(0.4 * int(of_sign.sum()), abs=0.1 * int(of_sign.sum()))  # a few drawn again
        assert int(kept.sum()) >= int(0.6 * int(of_sign.sum()))


def test_set_by_sign_takes_no_pattern():
    layer = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="cannot choose edges of the pattern"):
        dnw.wire(
            layer,
            torch.optim.SGD(layer.parameters(), lr=0.1),
            density=0.5,
            rule=dnw.SET(by_sign=True),
            pattern=dnw.Channels(),
        )


# --- edges that do not change ---


@pytest.mark.parametrize("rule", [dnw.RigL(every=3), dnw.SET(every=3), dnw.MagnitudePruning(), dnw.L1Anneal()])
@pytest.mark.parametrize("name", ["momentum", *(["muon"] if "muon" in OPTIMIZERS else [])])
def test_between_exchanges_the_edges_stay_and_dormant_weights_are_zero(rule, name):
    torch.manual_seed(0)
    layer, base, wiring = linear(torch.randn(20, 30).tolist(), rule, name, density=0.2)
    for number in range(1, 7):
        before = wiring["weight"].active
        random_step(layer, base, number)
        after = wiring["weight"].active
        exchanged = isinstance(rule, dnw.PruneAndGrow) and number % 3 == 0
        assert torch.equal(before, after) != exchanged
        assert not wiring["weight"].latent[~after].any()
        assert wiring["weight"].latent[after].count_nonzero() > 60


@pytest.mark.parametrize("rule", [dnw.MagnitudePruning(), dnw.RigL(every=2), dnw.SparseMomentum(every=2)])
def test_a_pruned_wiring_that_goes_back_to_a_denser_state_is_pruned_again(rule):
    def make():
        model = small_net()
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = dnw.DensitySchedule(end=3, initial=0.8, power=1)
        return model, base, dnw.wire(model, base, density=0.2, rule=rule, schedule=schedule)

    model, base, wiring = make()
    counts = [wiring.num_active]
    for step in range(4):
        train_steps(model, base, range(step, step + 1))
        counts.append(wiring.num_active)
        if step == 1:
            dense = copy.deepcopy((model.state_dict(), base.state_dict()))
    model.load_state_dict(dense[0])
    base.load_state_dict(dense[1])
    assert wiring.num_active == counts[2] > counts[3]
    for step in (2, 3):
        train_steps(model, base, range(step, step + 1))
        assert wiring.num_active == counts[step + 1]


# --- sparse momentum ---


def test_sparse_momentum_ranks_adams_momentum_by_its_size_beside_the_gradients():
    """As the authors do: a small gradient that always points one way is more than a large one that does not."""
    layer, base, wiring = linear([[0.0] * 6], dnw.SparseMomentum(every=4, fraction=0.5), "adam", num_edges=2)
    active = wiring["weight"].active[0]
    steady, noisy = (~active).nonzero().flatten()[:2].tolist()
    for number in range(4):
        layer.weight.grad = torch.zeros(1, 6)
        layer.weight.grad[0, steady] = 0.001
        layer.weight.grad[0, noisy] = 10.0 * (-1) ** number
        base.step()
    state = base.state[layer.weight]
    assert state["exp_avg"][0, noisy].abs() > state["exp_avg"][0, steady].abs()
    assert wiring["weight"].active[0, steady]
    assert not wiring["weight"].active[0, noisy]


# --- Feather ---


@pytest.mark.parametrize(
    ("density", "given", "factor"), [(0.05, None, 1.0), (0.04, None, 0.5), (0.3, None, 1.0), (0.3, 0.25, 0.25), (0.02, 1, 1.0)]
)
def test_feather_scales_dormant_gradients_by_the_density_unless_told(density, given, factor):
    torch.manual_seed(0)
    layer = nn.Linear(20, 20, bias=False)
    base = torch.optim.SGD(layer.parameters(), lr=1.0)
    wiring = dnw.wire(layer, base, density=density, rule=dnw.Feather(dormant_gradient=given))
    before, active = wiring["weight"].latent, wiring["weight"].active
    layer.weight.grad = torch.full((20, 20), 0.125)
    base.step()
    change = before - wiring["weight"].latent
    torch.testing.assert_close(change[~active], torch.full_like(change[~active], 0.125 * factor))
    torch.testing.assert_close(change[active], torch.full_like(change[active], 0.125))


def test_feather_goes_by_the_density_that_a_schedule_ends_at():
    torch.manual_seed(0)
    layer = nn.Linear(20, 20, bias=False)
    base = torch.optim.SGD(layer.parameters(), lr=1.0)
    wiring = dnw.wire(layer, base, density=0.02, rule=dnw.Feather(), schedule=dnw.DensitySchedule(end=100, initial=0.5))
    before, active = wiring["weight"].latent, wiring["weight"].active
    layer.weight.grad = torch.full((20, 20), 0.125)
    base.step()
    torch.testing.assert_close((before - wiring["weight"].latent)[~active], torch.full((200,), 0.0625))


# --- ST-3: what is written to the model ---


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("density", [0.3, dnw.Global(0.3), 1.0])
def test_weights_written_under_soft_thresholds_stay_as_written(rescale, density):
    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    wiring = dnw.wire(model, base, density=density, rule=dnw.ST3(rescale=rescale))
    with torch.no_grad():
        model[0].weight.clamp_(-0.08, 0.08)
        model[5].weight[:3] *= 0.5
        model[7].weight[1, model[7].weight[1].nonzero()[0]] = 0.25
    held = {n: model.get_parameter(n).detach().clone() for n in wiring}
    latent = {n: p.latent for n, p in wiring.items()}
    train_steps(model, base, range(2))
    for n, p in wiring.items():
        torch.testing.assert_close(model.get_parameter(n).detach(), held[n], rtol=1e-5, atol=1e-7)
        assert torch.equal(p.latent[~p.active], latent[n][~p.active])
    assert model[0].weight.abs().max() <= 0.08 * (1 + 1e-5)


def test_targets_that_nobody_wrote_to_keep_their_latent_weights():
    torch.manual_seed(0)
    layer = nn.Linear(20, 20, bias=False)
    wiring = dnw.wire(layer, torch.optim.SGD(layer.parameters(), lr=0.1), density=0.3, rule=dnw.ST3())
    before = wiring["weight"].latent
    with torch.no_grad():
        layer.weight[4] *= 1.5
    wiring.project()
    same = (wiring["weight"].latent == before).all(1)
    assert same.tolist() == [i != 4 for i in range(20)]


# --- N of M ---


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (4, 8), (5, 16), (3, 32), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 96), (5, 32, 3, 2)])
def test_the_largest_of_each_group_are_chosen_and_the_first_among_equals(n, m, dtype, shape):
    generator = torch.Generator().manual_seed(m)
    score = torch.randn(shape, generator=generator).to(dtype)
    score = torch.where(torch.rand(shape, generator=generator) < 0.4, (score * 2).round() / 2, score)  # with ties and zeros
    score[0] = 1.0
    score[1, ::3] = float("nan")  # which ranks highest
    rows = score.float().abs().movedim(1, -1)
    groups = rows.reshape(*rows.shape[:-1], -1, m)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    expected = torch.zeros(groups.shape, dtype=torch.bool).scatter(-1, order[..., :n], True).reshape(rows.shape).movedim(-1, 1)
    pattern = dnw.NOfM(n, m)
    assert torch.equal(pattern.choose(score), expected)
    place = pattern.scores(score).movedim(1, -1).reshape(groups.shape).gather(-1, order)
    assert torch.equal(place, torch.arange(m, 0, -1).float().expand_as(place))


# --- errors of rules ---


@dataclass(frozen=True)
class Scored(dnw.Rule):
    kind: str = ""

    def score(self, layer):
        nan = layer.latent.clone()
        nan.view(-1)[3] = torch.nan
        return {
            "shape": layer.latent[:1],
            "dtype": layer.latent > 0,
            "device": layer.latent.to("meta"),
            "none": None,
            "nan": nan,
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "error", "given"),
    [
        ("shape", TypeError, r"torch.float32 of shape \(1, 5\) on cpu"),
        ("dtype", TypeError, r"torch.bool of shape \(4, 5\)"),
        ("device", TypeError, r"torch.float32 of shape \(4, 5\) on meta"),
        ("none", TypeError, r"None"),
        ("nan", ValueError, r"NaN"),
    ],
)
def test_a_score_that_cannot_be_ranked_is_named(kind, error, given):
    layer = nn.Linear(5, 4)
    with pytest.raises(error, match=rf"Scored.score gave {given}.* for 'weight'"):
        dnw.wire(layer, torch.optim.SGD(layer.parameters(), lr=0.1), density=0.2, rule=Scored(kind))


def test_growth_that_cannot_be_ranked_is_named():
    class Grown(dnw.PruneAndGrow):
        def growth(self, layer):
            return layer.latent[:, 0]

    layer = nn.Linear(5, 4)
    base = torch.optim.SGD(layer.parameters(), lr=0.1)
    dnw.wire(layer, base, density=0.5, rule=Grown(every=1, fraction=0.5))
    layer(torch.ones(1, 5)).sum().backward()
    with pytest.raises(TypeError, match=r"Grown.growth gave torch.float32 of shape \(4,\) on cpu for 'weight'"):
        base.step()


@pytest.mark.parametrize(
    ("base", "name", "meant"),
    [
        (dnw.Rule, "gradients", "gradient"),
        (dnw.Rule, "projet", "project"),
        (dnw.DNW, "select_by_gradient", "selects_by_gradient"),
        (dnw.PruneAndGrow, "growht", "growth"),
    ],
)
def test_a_misspelt_hook_is_named_when_the_class_is_made(base, name, meant):
    with pytest.raises(TypeError, match=rf"Mine.{name} is no hook of a rule.*'{meant}'.*_{name}"):
        type("Mine", (base,), {name: lambda self, layer: None})


def test_helpers_and_settings_of_a_rule_may_be_called_anything_else():
    @dataclass(frozen=True)
    class Mine(dnw.Rule):
        gradients: bool = True
        dormant_rate: float = 0.5

        def dropped(self, layer):
            return layer.active

        def _scored(self, layer):
            return layer.latent

    assert Mine().gradients


@pytest.mark.parametrize(("base", "name"), [(dnw.ST3, "rescaled"), (dnw.SET, "by_signs")])
def test_helpers_may_be_called_nearly_as_the_settings_of_a_rule(base, name):
    assert type("Mine", (base,), {name: lambda self, layer: None})()
