"""The wiring lives with the optimizer: its edges under every rule and budget, taken off again, and clear when misused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIMIZERS, RULES, batch, case, same, saved, small_net, train_steps, wired
from torch import nn

import dnw

# --- the algorithm ---


def test_literal_step():
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, -2.0, 1.0]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    wiring = dnw.wire(layer, optimizer, num_edges=2)
    assert layer.weight.tolist() == [[3.0, -2.0, 0.0]]
    out = layer(torch.tensor([[1.0, 1.0, 2.5]]))
    assert out.item() == 1.0  # the dormant edge sends nothing
    out.sum().backward()  # the gradient of each weight is what its source sends: 1, 1, 2.5
    optimizer.step()
    assert wiring["weight"].latent.tolist() == [[2.0, -3.0, -1.5]]
    assert layer.weight.tolist() == [[2.0, -3.0, 0.0]]
    assert not wiring["weight"].entered.any()
    layer.zero_grad()
    layer(torch.tensor([[1.5, -1.0, 0.0]])).sum().backward()
    optimizer.step()  # latents become 0.5, -2, -1.5: the third edge takes the place of the first
    assert wiring["weight"].active.tolist() == [[False, True, True]]
    assert wiring["weight"].entered.tolist() == [[False, False, True]]


# --- every rule ---


@pytest.mark.parametrize("rule", RULES)
def test_rule_keeps_exactly_k_edges_and_zeros_elsewhere(rule):
    model, base, wiring = wired(rule)
    given = case(rule).budget
    density, schedule = given.get("density"), given.get("schedule")
    pattern = given.get("pattern")
    soft, moves = isinstance(wiring.rule, (dnw.ST3, dnw.Feather)), isinstance(wiring.rule, dnw.SparseMomentum)
    fixed = {name: wiring[name].num_active for name in wiring}

    def budget(name: str, step: int) -> int:
        total = wiring[name].num_candidates if name else wiring.num_candidates
        if density is None:
            return fixed[name] if name else sum(fixed.values())
        unit = 1 if pattern is None else pattern.unit(tuple(wiring[name].latent.shape))
        total //= unit
        k = dnw.num_edges(density.density if isinstance(density, dnw.Global) else density, total)
        if name == "" and not isinstance(density, dnw.Global):
            k = sum(dnw.num_edges(density, p.num_candidates) for p in wiring.values())
        return (k if schedule is None else schedule.num_edges(step, k, total)) * unit

    for step in range(1, 8):
        train_steps(model, base, range(step, step + 1))
        for name in wiring:
            active, weight = wiring[name].active, model.get_parameter(name)
            assert int(active.sum()) == wiring[name].num_active
            if not isinstance(density, dnw.Global) and not moves:
                assert wiring[name].num_active == budget(name, step)
            if not wiring.rule.settles:
                assert not weight[~active].any()
            with wiring.settled():
                assert soft or torch.equal(weight[active], wiring[name].latent[active])
                assert not weight[~active].any()
        if isinstance(density, dnw.Global) or moves:
            assert wiring.num_active == budget("", step)


def test_every_case_changes_its_edges_and_every_schedule_ends():
    for rule in RULES:
        model, base, wiring = wired(rule)
        before = {name: wiring[name].active for name in wiring}
        train_steps(model, base, range(8))
        changed = any(not torch.equal(wiring[name].active, before[name]) for name in wiring)
        assert changed is not wiring.rule.fixed, rule


@pytest.mark.parametrize("rule", ["random", "frozen", "complete"])
def test_fixed_rules_never_change_their_edges(rule):
    model, base, wiring = wired(rule)
    before = {name: wiring[name].active for name in wiring}
    train_steps(model, base, range(5))
    assert all(torch.equal(before[name], wiring[name].active) for name in wiring)


def test_dormant_edges_of_a_fixed_graph_get_no_gradient():
    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, base, density=0.2, rule=dnw.RandomGraph())
    before = {n: wiring[n].latent for n in wiring}
    train_steps(model, base, range(3))
    for n in wiring:
        assert torch.equal(wiring[n].latent[~wiring[n].active], before[n][~wiring[n].active])


def test_random_graph_depends_on_the_seed_alone():
    def edges(seed: int, init: int) -> list[bool]:
        model = small_net(init)
        wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.2, rule=dnw.RandomGraph(), seed=seed)
        return wiring["5.weight"].active.flatten().tolist()

    assert edges(0, 0) == edges(0, 1)
    assert edges(0, 0) != edges(1, 0)


def test_random_graph_is_uniform():
    counts = torch.zeros(10)
    for seed in range(2000):
        layer = nn.Linear(10, 1)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        counts += dnw.wire(layer, optimizer, num_edges=3, rule=dnw.RandomGraph(), seed=seed)["weight"].active[0]
    assert (counts - 600).abs().max() < 5 * (2000 * 0.3 * 0.7) ** 0.5


def test_complete_is_dense_training():
    model, base, _ = wired("complete", "adamw")
    plain = small_net()
    other = OPTIMIZERS["adamw"](plain.parameters())
    assert train_steps(model, base, range(6)) == train_steps(plain, other, range(6))


def test_draws_depend_on_seed_step_and_name():
    def draws(**changes):
        values = {"name": "a", "latent": torch.zeros(4), "candidates": None, "seed": 0, "step": 0} | changes
        return tuple(dnw.Layer(**values).uniform().tolist())

    assert draws() == draws()
    assert len({draws(), draws(seed=1), draws(step=1), draws(name="b")}) == 4


def test_rules_see_the_state_and_the_gradient_of_their_step():
    seen = []

    class Watching(dnw.DNW):
        @property
        def selects_by_gradient(self):
            return True

        def score(self, layer):
            seen.append((sorted(layer.state), None if layer.grad is None else layer.grad.clone()))
            return layer.latent

    model = nn.Linear(4, 2, bias=False)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    dnw.wire(model, base, density=0.5, rule=Watching())
    model(torch.ones(1, 4)).sum().backward()
    base.step()
    assert seen[0] == ([], None)
    assert "momentum_buffer" in seen[1][0]
    assert torch.equal(seen[1][1], torch.ones(2, 4))


def test_asking_does_not_project():
    projected = []

    class Counting(dnw.DNW):
        def project(self, layer):
            projected.append(layer.name)
            return super().project(layer)

    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, base, density=0.2, rule=Counting())
    projected.clear()
    assert wiring.num_active == 158
    str(wiring.summary())
    assert projected == []
    train_steps(model, base, range(1))
    assert sorted(projected) == ["0.weight", "5.weight", "7.weight"]


# --- budgets ---


def test_global_budget_is_exact_over_all_layers():
    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    wiring = dnw.wire(model, base, dnw.Global(0.1))
    total = dnw.num_edges(0.1, wiring.num_candidates)
    shares = []
    for step in range(10):
        train_steps(model, base, range(step, step + 1))
        shares.append([wiring[name].num_active for name in wiring])
        assert sum(shares[-1]) == total
    assert shares[0] != shares[-1]  # layers trade edges
    weights, state = saved(model, base)
    other = small_net(3)
    other_base = torch.optim.SGD(other.parameters(), lr=0.5)
    other_wiring = dnw.wire(other, other_base, dnw.Global(0.1))
    other.load_state_dict(weights)
    other_base.load_state_dict(state)
    assert same(wiring, other_wiring)


def test_global_budget_when_one_layer_gets_no_gradient():
    model = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)])
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    wiring = dnw.wire(model, base, dnw.Global(0.25))
    for _ in range(3):
        base.zero_grad()
        model[0](torch.randn(4, 6)).square().sum().mul(-0.1).backward()  # grows: takes edges from the other layer
        base.step()
    assert wiring.num_active == 18
    for name in wiring:
        assert torch.equal(model.get_parameter(name) != 0, wiring[name].active)


def test_budgets_by_name():
    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, base, {"0": 0.5, "*": 0.1}, num_edges={"7.weight": 7})
    assert [wiring[n].num_active for n in wiring] == [108, 51, 7]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_k_is_exact_when_all_weights_are_equal(value):
    model = nn.Linear(20, 20, bias=False)
    nn.init.constant_(model.weight, value)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    wiring = dnw.wire(model, base, density=0.1)
    assert wiring["weight"].num_active == 40
    assert wiring["weight"].active.flatten()[:40].all()
    model(torch.ones(1, 20)).sum().backward()
    base.step()
    assert wiring["weight"].num_active == 40


# --- what a wiring says ---


def test_unknown_name():
    _, _, wiring = wired()
    with pytest.raises(KeyError, match=r"no wired parameter '5.wight'; did you mean '5.weight'\?"):
        wiring["5.wight"]


def test_summary_says_everything():
    _, _, wiring = wired()
    text = str(wiring.summary())
    assert "0.weight  8x3x3x3         216      43   19.91%" in text
    assert "total                     792     158   19.95%" in text
    assert re.search(r"norm +2 +16  1.weight, 1.bias\n", text)
    assert re.search(r"bias +3 +28  0.bias, 5.bias, ...\n", text)


def test_wirings_are_themselves():
    _, _, wiring = wired()
    _, _, other = wired()
    assert wiring == wiring
    assert wiring != other
    assert len({wiring, other}) == 2


def test_a_graph_with_every_entry_a_candidate_is_still_a_graph():
    graph = dnw.graphs.StaticGraph((4,), 4)
    wiring = dnw.wire(graph, torch.optim.SGD(graph.parameters(), lr=0.1), density=0.5)
    assert wiring["weight"].num_candidates == 16
    edges = wiring["weight"].edges()
    assert (edges.is_graph, edges.shape) == (True, (8, 8))


# --- taking it off ---


@pytest.mark.parametrize("keep", ["sparse", "latent"])
def test_remove(keep):
    model, base, wiring = wired("dnw", "adamw_amsgrad")
    train_steps(model, base, range(2))
    expected = {n: wiring[n].weight if keep == "sparse" else wiring[n].latent for n in wiring}
    wiring.remove(keep)
    assert all(torch.equal(model.get_parameter(n), w) for n, w in expected.items())
    assert set(base.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    train_steps(model, base, range(2, 4))
    assert int((model[5].weight != 0).sum()) > 102  # dense again
    dnw.wire(model, base, density=0.1)
    with pytest.raises(ValueError, match="allowed are 'sparse' and 'latent'"):
        wiring.remove("dense")  # type: ignore[arg-type]


def test_a_wiring_that_was_taken_off_still_says_what_it_was_made_with():
    model, schedule = small_net(), dnw.DensitySchedule(9)
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.1, rule=dnw.NoUpdate(), schedule=schedule)
    wiring.remove()
    assert (wiring.rule, wiring.schedule, wiring.dormant) == (dnw.NoUpdate(), schedule, dnw.Dormant())
    assert len(wiring) == 0


def test_a_model_can_be_wired_again_when_its_optimizer_is_gone():
    model, base, wiring = wired()
    del base, wiring
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.1)
    assert wiring["5.weight"].num_active == 51


def test_a_wiring_comes_off_after_the_model_changed_its_dtype():
    model, base, wiring = wired()
    model.half()
    wiring.remove("latent")
    assert int((model[5].weight != 0).sum()) == 512
    assert "latent" not in base.state_dict()["state"].get(0, {})


def test_a_removed_parameter_cannot_be_written():
    _, _, wiring = wired()
    parameter = wiring["5.weight"]
    wiring.remove()
    with pytest.raises(ValueError, match="is not wired any more"):
        parameter.latent = torch.zeros(16, 32)


# --- misuse ---


def test_wiring_twice_is_refused():
    model, base, _ = wired()
    with pytest.raises(ValueError, match=r"'0.weight' is wired already; take that wiring off"):
        dnw.wire(model, base, density=0.2)
    with pytest.raises(ValueError, match="is wired already"):
        dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.2)


def test_an_optimizer_that_does_not_hold_the_parameter():
    model = small_net()
    with pytest.raises(ValueError, match=r"does not hold '0.weight', '5.weight'; give it these parameters"):
        dnw.wire(model, torch.optim.SGD(model[7].parameters(), lr=0.1), density=0.2)


def test_a_parameter_that_left_its_optimizer():
    model, base, _ = wired()
    base.param_groups[0]["params"] = base.param_groups[0]["params"][1:]
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    with pytest.raises(RuntimeError, match=r"'0.weight' is no longer in its optimizer"):
        base.step()


def test_a_parameter_that_changed_its_dtype():
    model, base, _ = wired()
    model.double()
    F.cross_entropy(model(batch(0)[0].double()), batch(0)[1]).backward()
    with pytest.raises(RuntimeError, match=r"'0.weight' was torch.float32 .* is torch.float64"):
        base.step()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite(bad):
    model = small_net()
    with torch.no_grad():
        model[5].weight[0, 0] = bad
    with pytest.raises(ValueError, match="'5.weight' has weights that are not finite"):
        dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a wiring needs a budget"),
        ({"density": 0.0}, r"density=0.0: .* \(0, 1\]"),
        ({"density": 1.5}, r"density=1.5: .* \(0, 1\]"),
        ({"density": {"*": 2}}, r"density\['\*'\]=2: .* \(0, 1\]"),
        ({"num_edges": 0}, "num_edges=0 for '0.weight'"),
        ({"num_edges": 100_000}, "from 1 to 216"),
        ({"density": 0.1, "num_edges": 3}, "both given for every layer"),
        ({"density": 0.1, "rule": "dnw"}, "expected a rule such as dnw.DNW()"),
        ({"density": 0.1, "rule": dnw.Complete()}, "Complete fixes its own number of edges"),
        ({"rule": dnw.Frozen({})}, "Frozen has no edges for the wired parameter '0.weight'"),
        (
            {"rule": dnw.Frozen({n: torch.ones(2, dtype=torch.bool) for n in ("0.weight", "5.weight", "7.weight")})},
            "expected a boolean mask",
        ),
        ({"density": dnw.Global(0.1), "num_edges": 4}, "is a budget for every layer"),
    ],
)
def test_bad_arguments_change_nothing(arguments, message):
    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        dnw.wire(model, base, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small_net().parameters(), strict=True))
    dnw.wire(model, base, density=0.1)


@pytest.mark.parametrize("seed", [None, 1 << 64, -1, "a", 1.5, True])
def test_bad_seeds(seed):
    model = small_net()
    with pytest.raises(ValueError, match=r"seed=.*: allowed is a whole number from 0 to 2\*\*63 - 1"):
        dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.1, seed=seed)


def test_not_an_optimizer():
    with pytest.raises(ValueError, match="expected a torch.optim.Optimizer, got int"):
        dnw.wire(small_net(), 3, density=0.1)  # type: ignore[arg-type]


def test_frozen_edges_of_an_unknown_parameter():
    model = nn.Linear(3, 3)
    edges = {"weight": torch.eye(3).bool(), "wieght": torch.eye(3).bool()}
    with pytest.raises(ValueError, match="edges for 'wieght', which is not wired; did you mean 'weight'"):
        dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), rule=dnw.Frozen(edges))


def test_edges_outside_the_candidates_are_refused():
    graph = dnw.graphs.StaticGraph((2, 3), 2)
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    every = torch.ones(graph.weight.shape, dtype=torch.bool)
    with pytest.raises(ValueError, match="include entries that are not candidate edges"):
        dnw.wire(graph, optimizer, rule=dnw.Frozen({"weight": every}))
    wiring = dnw.wire(graph, optimizer, num_edges=10)
    state = copy.deepcopy(optimizer.state_dict())
    active = state["state"][0]["active"]
    active.view(-1)[active.flatten().nonzero()[0]] = False  # another edge instead, so that their number is right
    active.view(-1)[(~graph.edge_candidates()["weight"]).flatten().nonzero()[0]] = True
    with pytest.raises(ValueError, match="some of its active edges are no candidate edges of this model"):
        optimizer.load_state_dict(state)
    assert wiring["weight"].num_active == 10


def test_where_a_warning_is_an_error_the_model_is_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(100)
    before = copy.deepcopy(model.state_dict())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserWarning, match=r"'1.weight' has no active edge left"):
        dnw.wire(model, base, dnw.Global(0.3), floor=dnw.Floor(edges=0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(dnw.wire(model, base, density=0.5)) == 2
