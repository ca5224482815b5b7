"""The wiring lives with the optimizer: equal to mask-in-forward bit for bit, resumable, reversible, and clear when misused."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import MaskInForward, RuleCase, batch, rule_cases, small_net, train_steps
from torch import nn

import dnw
from dnw._wiring.state import FORMAT

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
}
RULES = list(rule_cases(small_net()))


def case(rule: str) -> RuleCase:
    return rule_cases(small_net())[rule]


def wired(rule: str = "dnw", optimizer: str = "momentum", seed: int = 0):
    model = small_net(seed)
    chosen = case(rule)
    base = OPTIMIZERS["momentum" if chosen.rule.needs_momentum and optimizer == "sgd" else optimizer](model.parameters())
    return model, base, dnw.wire(model, base, rule=chosen.rule, **chosen.budget)


def saved(*things: object) -> list[dict]:
    """State dicts after a trip through a file."""
    buffer = io.BytesIO()
    torch.save([x.state_dict() for x in things], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(a: dnw.Wiring, b: dnw.Wiring) -> bool:
    return all(
        torch.equal(a[n].latent, b[n].latent)
        and torch.equal(a[n].active, b[n].active)
        and torch.equal(a[n].weight, b[n].weight)
        for n in a
    )


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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw_fused"])
def test_resume_is_bit_exact(rule, at, optimizer):
    model, base, wiring = wired(rule, optimizer)
    train_steps(model, base, range(at))
    weights, state = saved(model, base)
    train_steps(model, base, range(at, 8))
    for model_first in (True, False):
        other, other_base, other_wiring = wired(rule, optimizer, seed=5)
        if model_first:
            other.load_state_dict(weights)
        other_base.load_state_dict(copy.deepcopy(state))  # torch itself keeps the caller's momentum tensors
        if not model_first:
            other.load_state_dict(weights)
        assert other_wiring.step == at
        train_steps(other, other_base, range(at, 8))
        assert same(wiring, other_wiring)


@pytest.mark.parametrize("rule", ["random", "frozen", "complete"])
def test_fixed_rules_never_change_their_edges(rule):
    model, base, wiring = wired(rule)
    before = {name: wiring[name].active for name in wiring}
    train_steps(model, base, range(5))
    assert all(torch.equal(before[name], wiring[name].active) for name in wiring)


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


# --- steps of every kind ---


def test_parameters_without_gradient_are_left_alone():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    base = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    wiring = dnw.wire(model, base, density=0.5)
    kept, version = wiring["1.weight"].latent, model[1].weight._version
    graph = model[1](torch.randn(2, 4)).square().sum()  # a graph that outlives the step
    base.zero_grad()
    model[0](torch.randn(2, 4)).sum().backward()
    base.step()
    assert torch.equal(wiring["1.weight"].latent, kept)
    assert model[1].weight._version == version
    graph.backward()


def test_several_parameter_groups():
    model = small_net()
    groups = [
        {"params": [model[0].weight], "lr": 0.5},
        {"params": [p for n, p in model.named_parameters() if n != "0.weight"]},
    ]
    base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    wiring = dnw.wire(model, base, density=0.2)
    train_steps(model, base, range(3))
    weights, state = saved(model, base)
    train_steps(model, base, range(3, 6))
    other = small_net(4)
    groups = [
        {"params": [other[0].weight], "lr": 0.5},
        {"params": [p for n, p in other.named_parameters() if n != "0.weight"]},
    ]
    other_base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    other_wiring = dnw.wire(other, other_base, density=0.2)
    other.load_state_dict(weights)
    other_base.load_state_dict(state)
    train_steps(other, other_base, range(3, 6))
    assert same(wiring, other_wiring)


def test_parameters_of_another_optimizer_are_not_touched():
    model = small_net()
    first = torch.optim.SGD([model[0].weight], lr=0.1)
    second = torch.optim.SGD([p for n, p in model.named_parameters() if n != "0.weight"], lr=0.1)
    wiring = dnw.wire(model, second, density=0.2, exclude="0")
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    first.step()
    second.step()
    assert list(wiring) == ["5.weight", "7.weight"]
    assert (model[0].weight != 0).all()


def test_two_wirings_on_one_optimizer():
    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    conv = dnw.wire(model, base, density=0.5, include="0")
    linear = dnw.wire(model, base, density=0.1, include=nn.Linear)
    train_steps(model, base, range(3))
    assert conv.num_active == 108
    assert linear.num_active == 51 + 6
    weights, state = saved(model, base)
    train_steps(model, base, range(3, 5))
    expected = [conv["0.weight"].latent, linear["5.weight"].latent]
    model.load_state_dict(weights)
    base.load_state_dict(state)
    train_steps(model, base, range(3, 5))
    assert torch.equal(expected[0], conv["0.weight"].latent)
    assert torch.equal(expected[1], linear["5.weight"].latent)


def test_gradient_accumulation():
    model, base, wiring = wired()
    for step in range(4):
        images, labels = batch(step)
        F.cross_entropy(model(images), labels).backward()
        if step % 2:
            base.step()
            base.zero_grad()
    assert wiring.step == 2

    textbook = MaskInForward(small_net(), {n: wiring[n].num_active for n in wiring})
    theirs = OPTIMIZERS["momentum"](textbook.parameters())
    for step in range(4):
        images, labels = batch(step)
        F.cross_entropy(textbook(images), labels).backward()
        if step % 2:
            theirs.step()
            theirs.zero_grad()
    assert all(torch.equal(wiring[n].latent, textbook.net.get_parameter(n)) for n in wiring)


def test_an_optimizer_whose_step_calls_its_base_class_steps_once():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model, expected = small_net(), small_net()
    base = Noisy(model.parameters(), lr=0.1, momentum=0.9)
    expected_base = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    wiring, expected_wiring = dnw.wire(model, base, density=0.2), dnw.wire(expected, expected_base, density=0.2)
    assert train_steps(model, base, range(4)) == train_steps(expected, expected_base, range(4))
    assert same(wiring, expected_wiring)
    assert wiring.step == 4
    assert wiring["5.weight"].entered.equal(expected_wiring["5.weight"].entered)


@pytest.mark.parametrize("positional", [True, False])
def test_closure(positional):
    model, base, wiring = wired()
    expected, expected_base, expected_wiring = wired()

    def closure():
        images, labels = batch(0)
        base.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    loss = base.step(closure) if positional else base.step(closure=closure)
    assert [loss.item()] == train_steps(expected, expected_base, range(1))
    assert same(wiring, expected_wiring)


class Interrupted(torch.optim.SGD):
    """Updates half of the parameters, then raises."""

    broken = True

    @torch.no_grad()
    def step(self, closure=None):
        if not self.broken:
            return super().step()
        for p in self.param_groups[0]["params"][:3]:
            p.add_(1.0)
        raise KeyboardInterrupt


@pytest.mark.parametrize("then", ["state_dict", "project", "step", "remove", "active"])
def test_an_interrupted_step_rolls_back(then):
    model = small_net()
    base = Interrupted(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, base, density=0.2)
    latents = {n: wiring[n].latent for n in wiring}
    weights = {n: wiring[n].weight for n in wiring}
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    grads = {n: model.get_parameter(n).grad.clone() for n in wiring}
    with pytest.raises(KeyboardInterrupt):
        base.step()
    if then == "state_dict":
        assert torch.equal(base.state_dict()["state"][0]["latent"], latents["0.weight"])
    elif then == "project":
        wiring.project()
    elif then == "active":
        assert wiring["0.weight"].num_active == 43
    elif then == "remove":
        wiring.remove()
    else:
        base.broken = False
        base.step()
        for n in wiring:
            torch.testing.assert_close(wiring[n].latent, latents[n] - 0.1 * grads[n], atol=1e-7, rtol=0)
        assert wiring.step == 1
        return
    for n, weight in weights.items():
        assert torch.equal(model.get_parameter(n), weight)


# --- writes to the model ---


def test_model_load_state_dict_after_wiring_is_taken_over():
    model, base, wiring = wired()
    dense = small_net(9)
    model.load_state_dict(dense.state_dict())
    wiring.project()
    for name in wiring:
        assert torch.equal(wiring[name].latent, dense.get_parameter(name))
        assert int((model.get_parameter(name) != 0).sum()) == wiring[name].num_active

    expected = small_net(9)
    expected_base = OPTIMIZERS["momentum"](expected.parameters())
    expected_wiring = dnw.wire(expected, expected_base, density=0.2)
    train_steps(model, base, range(2))
    train_steps(expected, expected_base, range(2))
    assert same(wiring, expected_wiring)


def test_a_write_between_steps_changes_only_what_was_written():
    model, base, wiring = wired()
    train_steps(model, base, range(2))
    latent, active = wiring["5.weight"].latent, wiring["5.weight"].active
    with torch.no_grad():
        model[5].weight.clamp_(-0.1, 0.1)
    expected = torch.where(active, latent.clamp(-0.1, 0.1), latent)
    assert torch.equal(wiring["5.weight"].latent, expected)


def test_latent_weights_can_be_written():
    model, _, wiring = wired()
    wanted = torch.zeros(16, 32)
    wanted[3, :5] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    wiring["5.weight"].latent = wanted
    assert torch.equal(model[5].weight[3, :5], wanted[3, :5])
    assert wiring["5.weight"].num_active == 102
    with pytest.raises(ValueError, match=r"expected shape \(16, 32\), got \(2,\)"):
        wiring["5.weight"].latent = torch.zeros(2)
    with pytest.raises(ValueError, match="not finite"):
        wiring["5.weight"].latent = torch.full((16, 32), torch.nan)


def test_what_is_read_is_a_copy():
    model, _, wiring = wired()
    parameter = wiring["5.weight"]
    before = [parameter.latent, parameter.active, parameter.weight]
    parameter.latent.zero_()
    parameter.active.zero_()
    parameter.weight.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, [parameter.latent, parameter.active, parameter.weight], strict=True))


# --- what travels in the state dict ---


def test_format_of_the_state():
    model, base, wiring = wired("random", "adam")
    train_steps(model, base, range(2))
    entry = base.state_dict()["state"][0]
    assert set(entry) == {"step", "exp_avg", "exp_avg_sq", "latent", "active", "wiring"}
    assert entry["wiring"].tolist() == [FORMAT, 2, 2, 0, 43]
    assert entry["active"].dtype == torch.bool
    assert set(base.state_dict()) == {"state", "param_groups"}


def test_state_of_an_optimizer_without_state_of_its_own():
    model, base, _ = wired("dnw", "adamw")
    state = base.state_dict()["state"]  # before the first step
    assert set(state) == {0, 4, 6}
    assert set(state[0]) == {"latent", "active", "wiring"}
    assert len(base.state) == 0  # a lazy initialisation must find nothing
    train_steps(model, base, range(1))


def test_loading_clones_and_keeps_the_callers_dict():
    model, base, wiring = wired()
    train_steps(model, base, range(2))
    state = copy.deepcopy(base.state_dict())
    other, other_base, other_wiring = wired(seed=3)
    other_base.load_state_dict(state)
    kept = state["state"][0]["latent"].clone()
    train_steps(other, other_base, range(2, 4))
    assert torch.equal(state["state"][0]["latent"], kept)


def test_a_state_without_latents_takes_the_present_weights_with_a_warning():
    plain = small_net()
    base = OPTIMIZERS["momentum"](plain.parameters())
    train_steps(plain, base, range(2))
    model, wired_base, wiring = wired(seed=4)
    model.load_state_dict(plain.state_dict())
    with pytest.warns(UserWarning, match="holds no latent weights for '0.weight', '5.weight', '7.weight'"):
        wired_base.load_state_dict(base.state_dict())
    assert torch.equal(wiring["5.weight"].latent, plain[5].weight)
    assert wiring["5.weight"].num_active == 102


def test_a_state_of_another_budget_or_format_is_refused_before_anything_changes():
    model, base, wiring = wired()
    train_steps(model, base, range(2))
    before = copy.deepcopy(base.state_dict())
    other = small_net(2)
    other_base = OPTIMIZERS["momentum"](other.parameters())
    dnw.wire(other, other_base, density=0.5)
    with pytest.raises(ValueError, match=r"'0.weight': it has 108 active edges, this wiring keeps 43"):
        base.load_state_dict(other_base.state_dict())
    newer = copy.deepcopy(before)
    newer["state"][0]["wiring"][0] = FORMAT + 1
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}, this version of dnw reads {FORMAT}"):
        base.load_state_dict(newer)
    after = base.state_dict()
    assert all(torch.equal(before["state"][i]["latent"], after["state"][i]["latent"]) for i in (0, 4, 6))


def test_a_saved_model_is_the_sparse_network_with_the_names_of_the_dense_one():
    model, base, wiring = wired()
    train_steps(model, base, range(2))
    state = model.state_dict()
    assert list(state) == list(small_net().state_dict())
    assert int((state["5.weight"] != 0).sum()) == wiring["5.weight"].num_active


def test_frozen_graph_from_a_loaded_random_one_survives_a_seed_change():
    model, base, wiring = wired("random")
    _, state = saved(model, base)
    other = small_net(1)
    other_base = OPTIMIZERS["momentum"](other.parameters())
    other_wiring = dnw.wire(other, other_base, density=0.2, rule=dnw.RandomGraph(), seed=7)
    other_base.load_state_dict(state)
    assert torch.equal(other_wiring["5.weight"].active, wiring["5.weight"].active)


# --- taking it off, misuse ---


@pytest.mark.parametrize("keep", ["sparse", "latent"])
def test_remove(keep):
    model, base, wiring = wired("dnw", "adamw")
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


def test_not_an_optimizer():
    with pytest.raises(ValueError, match="expected a torch.optim.Optimizer, got int"):
        dnw.wire(small_net(), 3, density=0.1)  # type: ignore[arg-type]


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


# --- compile, and rules of other kinds ---


@pytest.mark.slow
def test_compiled_model_fullgraph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, base, wiring = wired()
    eager, eager_base, eager_wiring = wired()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(6):
        images, labels = batch(step)
        for net, optimizer in ((compiled, base), (eager, eager_base)):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
    for name in wiring:
        assert torch.equal(wiring[name].active, eager_wiring[name].active)
        torch.testing.assert_close(wiring[name].latent, eager_wiring[name].latent)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
def test_wiring_a_compiled_model_uses_the_plain_names():
    torch._dynamo.reset()
    model = small_net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    base = torch.optim.SGD(compiled.parameters(), lr=0.1)
    wiring = dnw.wire(compiled, base, density=0.2)
    assert list(wiring) == ["0.weight", "5.weight", "7.weight"]
    train_steps(compiled, base, range(2))
    assert int((model[5].weight != 0).sum()) == 102


@pytest.mark.slow
def test_compiled_optimizer_step_keeps_dormant_latents():
    torch._dynamo.reset()
    model, base, wiring = wired()
    eager, eager_base, eager_wiring = wired()
    step = torch.compile(base.step, backend="aot_eager")
    for i in range(3):
        images, labels = batch(i)
        base.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step()
    train_steps(eager, eager_base, range(3))
    assert all(torch.allclose(wiring[n].latent, eager_wiring[n].latent, atol=1e-6) for n in wiring)


def test_fused_optimizer_with_grad_scaler_skips_whole_steps():
    """A fused optimizer runs its hooks on a step that the scaler skips, and sees scaled gradients."""
    model, base, wiring = wired("random", "adamw_fused")
    before = {n: wiring[n].latent for n in wiring}
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    base.grad_scale, base.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    base.step()
    assert wiring.step == 0
    assert all(torch.equal(wiring[n].latent, before[n]) for n in wiring)
    base.found_inf = torch.tensor(0.0)
    base.step()
    assert wiring.step == 1
    unscaled, unscaled_base, unscaled_wiring = wired("random", "adamw_fused")
    F.cross_entropy(unscaled(batch(0)[0]), batch(0)[1]).div(2).backward()
    unscaled_base.step()
    assert all(torch.allclose(wiring[n].latent, unscaled_wiring[n].latent, atol=1e-7) for n in wiring)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moving_the_model_after_wiring_is_followed():
    model, base, wiring = wired()
    model.to("cuda")
    for step in range(3):
        images, labels = (x.to("cuda") for x in batch(step))
        base.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        base.step()
    assert wiring["0.weight"].active.is_cuda
    assert wiring.step == 3


# --- found in review ---


def trained(weight_decay: float) -> dict:
    """A sparse network whose weights have shrunk below those of a fresh one."""
    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=weight_decay)
    dnw.wire(model, base, density=0.2)
    train_steps(model, base, range(60))
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_loading_a_sparse_network_into_a_wired_model_keeps_its_edges(weight_decay):
    state = trained(weight_decay)
    model, _, wiring = wired(seed=3)
    model.load_state_dict(state)
    wiring.project()
    for name in wiring:
        assert torch.equal(model.get_parameter(name), state[name])
        assert torch.equal(wiring[name].active, state[name] != 0)


def test_questions_from_step_hooks_do_not_disturb_the_step():
    model, base, wiring = wired()
    twin, twin_base, twin_wiring = wired()
    seen = []

    def ask(*_):
        seen.append((wiring.num_active, wiring["5.weight"].latent, wiring["5.weight"].weight))

    base.register_step_pre_hook(ask)
    base._optimizer_step_post_hooks.clear()
    base.register_step_post_hook(ask)  # before the wiring's own, as if registered before wiring
    base.register_step_post_hook(wiring._exchange.after_step)
    assert train_steps(model, base, range(3)) == train_steps(twin, twin_base, range(3))
    assert same(wiring, twin_wiring)
    assert wiring.step == 3
    assert all(active == 158 and int((weight != 0).sum()) == 102 for active, _, weight in seen)


def test_saving_in_the_middle_of_a_step_is_refused():
    model, base, _ = wired()
    base.register_step_pre_hook(lambda *_: base.state_dict())
    with pytest.raises(RuntimeError, match="in the middle of optimizer.step"):
        train_steps(model, base, range(1))


@pytest.mark.parametrize("plain_first", [False, True])
def test_a_subclass_that_writes_before_its_base_class_steps(plain_first):
    class Base(torch.optim.SGD):
        pass

    class Decayed(Base):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.mul_(0.9)
            return super().step(closure)

    model = nn.Linear(6, 6)
    if plain_first:  # PyTorch puts hooks into the base class only once somebody has made a plain instance of it
        torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        Base([nn.Parameter(torch.ones(1))], lr=0.1)
    base = Decayed(model.parameters(), lr=0.0)
    wiring = dnw.wire(model, base, density=0.5)
    before, bias = wiring["weight"].latent, model.bias.detach().clone()
    for _ in range(3):
        base.zero_grad()
        model(torch.ones(1, 6)).sum().backward()
        base.step()
    torch.testing.assert_close(wiring["weight"].latent, before * 0.9**3)
    torch.testing.assert_close(model.bias.detach(), bias * 0.9**3)
    assert wiring.step == 3


def test_a_write_to_a_layer_without_gradient_survives_a_global_selection():
    model = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)])
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, base, dnw.Global(0.51))  # one edge of the other layer stays
    nn.init.constant_(model[1].weight, 7.0)
    model[0](torch.randn(2, 6)).sum().backward()
    base.step()
    assert (model[1].weight == 7).all()
    assert (wiring["1.weight"].num_active, wiring["0.weight"].num_active) == (36, 1)


def test_a_small_write_to_a_layer_without_gradient_is_projected_with_its_pool():
    model = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)])
    base = torch.optim.SGD(model.parameters(), lr=1e-6)
    wiring = dnw.wire(model, base, dnw.Global(0.5))
    active = wiring["1.weight"].active
    with torch.no_grad():
        model[1].weight[~active] = 1e-9  # too small to become active
    model[0](torch.randn(2, 6)).sum().backward()
    base.step()
    assert torch.equal(wiring["1.weight"].active, active)
    assert not model[1].weight[~active].any()
    assert torch.equal(wiring["1.weight"].latent[~active], torch.full_like(model[1].weight[~active], 1e-9))


def test_the_users_gradient_is_given_back():
    model, base, _ = wired("random")
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    given = model[5].weight.grad
    values = given.clone()
    base.step()
    assert model[5].weight.grad is given
    assert torch.equal(given, values)


def test_dormant_edges_of_a_fixed_graph_get_no_gradient():
    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, base, density=0.2, rule=dnw.RandomGraph())
    before = {n: wiring[n].latent for n in wiring}
    train_steps(model, base, range(3))
    for n in wiring:
        assert torch.equal(wiring[n].latent[~wiring[n].active], before[n][~wiring[n].active])


def test_draws_depend_on_seed_step_and_name():
    def draws(**changes):
        values = {"name": "a", "latent": torch.zeros(4), "candidates": None, "seed": 0, "step": 0} | changes
        return tuple(dnw.Layer(**values).uniform().tolist())

    assert draws() == draws()
    assert len({draws(), draws(seed=1), draws(step=1), draws(name="b")}) == 4


def test_the_seed_travels():
    model, base, _ = wired("dropping")
    other = small_net(1)
    other_base = OPTIMIZERS["momentum"](other.parameters())
    other_wiring = dnw.wire(other, other_base, density=0.2, rule=case("dropping").rule, seed=9)
    other_base.load_state_dict(base.state_dict())
    assert {layer.seed for layer in other_wiring._weights.layers} == {0}


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


def test_a_plain_optimizer_state_leaves_dormant_latents_alone():
    model = small_net()
    base = OPTIMIZERS["momentum"](model.parameters())
    train_steps(model, base, range(2))
    plain, dense = copy.deepcopy(base.state_dict()), model[5].weight.detach().clone()
    wiring = dnw.wire(model, base, density=0.2)
    with pytest.warns(UserWarning, match="holds no latent weights"):
        base.load_state_dict(plain)
    assert torch.equal(wiring["5.weight"].latent, dense)


def test_latent_weights_of_parameters_that_are_not_wired_are_dropped_with_a_warning():
    model, base, _ = wired()
    train_steps(model, base, range(2))
    state = copy.deepcopy(base.state_dict())
    other = small_net()
    other_base = OPTIMIZERS["momentum"](other.parameters())
    wiring = dnw.wire(other, other_base, density=0.2, exclude="7")
    with pytest.warns(UserWarning, match=r"for 1 parameters that are not wired here \(of shape \(4, 16\)\); they are dropped"):
        other_base.load_state_dict(state)
    assert set(other_base.state[other[7].weight]) == {"momentum_buffer"}
    assert wiring.step == 2
    train_steps(other, other_base, range(2, 4))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("wiring", torch.zeros(0, dtype=torch.int64), "'wiring' is missing or not a tensor of whole numbers"),
        ("wiring", torch.tensor([FORMAT, 2]), r"'wiring' has shape \(2,\)"),
        ("latent", "text", "expected 'latent' as torch.float32 of shape .*, got none"),
        ("latent", torch.full((8, 3, 3, 3), torch.nan), "not finite"),
        ("latent", torch.zeros(2), "expected 'latent'"),
        ("active", torch.zeros(8, 3, 3, 3), "expected 'active' as torch.bool"),
        ("active", torch.ones(8, 3, 3, 3, dtype=torch.bool), "it has 216 active edges, this wiring keeps 43"),
    ],
)
def test_a_damaged_state_changes_nothing(key, value, message):
    model, base, wiring = wired()
    train_steps(model, base, range(2))
    state = copy.deepcopy(base.state_dict())
    train_steps(model, base, range(2, 3))
    before = {n: wiring[n].latent for n in wiring}
    state["state"][0][key] = value
    with pytest.raises(ValueError, match=message):
        base.load_state_dict(state)
    assert all(torch.equal(wiring[n].latent, before[n]) for n in wiring)
    assert wiring.step == 3


def test_edges_outside_the_candidates_are_refused():
    graph = dnw.graphs.StaticGraph((2, 3), 2, rank_all_entries=True)
    base = torch.optim.SGD(graph.parameters(), lr=0.1)
    dnw.wire(graph, base, num_edges=20)
    other = dnw.graphs.StaticGraph((2, 3), 2)
    every = torch.ones(other.weight.shape, dtype=torch.bool)
    with pytest.raises(ValueError, match="include entries that are not candidate edges"):
        dnw.wire(other, torch.optim.SGD(other.parameters(), lr=0.1), rule=dnw.Frozen({"weight": every}))
    other_base = torch.optim.SGD(other.parameters(), lr=0.1)
    dnw.wire(other, other_base, num_edges=10, include="weight")
    state = base.state_dict()
    state["state"][0]["wiring"][4] = 10
    state["state"][0]["active"] = ~other.edge_candidates()["weight"]
    state["state"][0]["active"].view(-1)[:4] = True
    with pytest.raises(ValueError, match="no candidate edges of this model|active edges, this wiring keeps"):
        other_base.load_state_dict(state)


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


def test_wrapped_optimizers_are_unwrapped():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, Wrapper(base), density=0.2)
    train_steps(model, base, range(1))
    assert wiring.step == 1


def test_frozen_edges_of_an_unknown_parameter():
    model = nn.Linear(3, 3)
    edges = {"weight": torch.eye(3).bool(), "wieght": torch.eye(3).bool()}
    with pytest.raises(ValueError, match="edges for 'wieght', which is not wired; did you mean 'weight'"):
        dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), rule=dnw.Frozen(edges))


# --- copies ---


def copies(how: str, things: tuple) -> tuple:
    return copy.deepcopy(things) if how == "deepcopy" else pickle.loads(pickle.dumps(things))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw_fused"])
@pytest.mark.parametrize("rule", RULES)
def test_a_copy_of_all_three_trains_on_by_itself(rule, optimizer, at, how):
    model, base, wiring = wired(rule, optimizer)
    train_steps(model, base, range(at))
    other, other_base, other_wiring = copies(how, (model, base, wiring))
    assert other_wiring.step == at
    assert same(wiring, other_wiring)
    train_steps(other, other_base, range(at, at + 3))
    assert other_wiring.step == at + 3
    assert wiring.step == at
    train_steps(model, base, range(at, at + 3))
    assert same(wiring, other_wiring)
    assert str(other_wiring.summary()) == str(wiring.summary())
    assert len(base.state) == len(other_base.state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_with_a_global_budget(how):
    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.3)
    wiring = dnw.wire(model, base, dnw.Global(0.1))
    train_steps(model, base, range(2))
    other, other_base, other_wiring = copies(how, (model, base, wiring))
    for net, optimizer in ((model, base), (other, other_base)):
        train_steps(net, optimizer, range(2, 5))
    assert same(wiring, other_wiring)


def test_wiring_a_copied_optimizer_adopts_what_it_carries():
    model, base, wiring = wired("random", "momentum")
    train_steps(model, base, range(3))
    other, other_base = copy.deepcopy((model, base))
    other_wiring = dnw.wire(other, other_base, density=0.2, rule=dnw.RandomGraph(), seed=7)
    assert other_wiring.step == 3
    assert same(wiring, other_wiring)
    for net, optimizer in ((model, base), (other, other_base)):
        train_steps(net, optimizer, range(3, 6))
    assert same(wiring, other_wiring)


def test_a_wired_state_loaded_before_wiring_is_refused():
    model, base, _ = wired()
    train_steps(model, base, range(2))
    other = small_net()
    other_base = OPTIMIZERS["momentum"](other.parameters())
    other_base.load_state_dict(base.state_dict())
    with pytest.raises(ValueError, match="before it was wired, and has rounded it; wire first, then load"):
        dnw.wire(other, other_base, density=0.2)


# --- torch.distributed.checkpoint ---


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("rule", ["dnw", "random", "dropping"])
def test_distributed_checkpoint_state_dicts(rule, optimizer, at, flatten):
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, base, wiring = wired(rule, optimizer)
    train_steps(model, base, range(at))
    if at == 0:  # making state for a fresh optimizer takes a template step, which must not count
        dcp.get_optimizer_state_dict(model, base, options=options)
        assert wiring.step == 0
    weights, state = dcp.get_state_dict(model, base, options=options)
    weights, state = copy.deepcopy((weights, state))
    other, other_base, other_wiring = wired(rule, optimizer, seed=4)
    dcp.set_state_dict(other, other_base, model_state_dict=weights, optim_state_dict=state, options=options)
    assert other_wiring.step == at
    assert same(wiring, other_wiring)
    train_steps(model, base, range(at, at + 3))
    train_steps(other, other_base, range(at, at + 3))
    assert same(wiring, other_wiring)


def test_state_that_only_the_wiring_has_does_not_pass_for_the_optimizers_own():
    """torch.distributed.checkpoint takes any state for an initialised optimizer, Adam any state for one that has stepped."""
    from torch.distributed.checkpoint import state_dict as dcp

    model, base, wiring = wired("dnw", "adamw")
    before = copy.deepcopy(base.state_dict())
    other, other_base, other_wiring = wired("dnw", "adamw", seed=1)
    other_base.load_state_dict(before)
    assert not other_base.state
    assert same(wiring, other_wiring)
    state = dcp.get_optimizer_state_dict(other, other_base)
    assert "exp_avg" in state["state"]["0.weight"]
    assert other_wiring.step == 0
    copy.deepcopy(other_base)


# --- averages, and weights to evaluate with ---


def averages(model: nn.Module) -> dict[str, nn.Module]:
    return {
        "ema": torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.6)),
        "swa": torch.optim.swa_utils.AveragedModel(model, use_buffers=True),
    }


@pytest.mark.parametrize("budget", [0.2, dnw.Global(0.2)], ids=["uniform", "global"])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_an_average_is_projected_to_its_k_largest(kind, budget):
    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    wiring = dnw.wire(model, base, budget)
    average = averages(model)[kind]
    for step in range(12):
        train_steps(model, base, range(step, step + 1))
        average.update_parameters(model)
    present = {n: (p.weight, p.latent, p.active) for n, p in wiring.items()}
    dense = {n: average.module.get_parameter(n).detach().clone() for n in wiring}
    assert sum(int((d != 0).sum()) for d in dense.values()) > wiring.num_active
    wiring.project(average)
    kept = {n: average.module.get_parameter(n) != 0 for n in wiring}
    assert sum(int(k.sum()) for k in kept.values()) == wiring.num_active
    largest = dnw.top_k(list(dense.values()), wiring.num_active, [None] * 3)
    for i, (n, p) in enumerate(wiring.items()):
        assert torch.equal(average.module.get_parameter(n), dense[n] * kept[n])
        if budget == 0.2:
            assert torch.equal(kept[n], dnw.top_k([dense[n]], wiring[n].num_active, [None])[0])
        else:
            assert torch.equal(kept[n], largest[i])
        assert all(torch.equal(a, b) for a, b in zip(present[n], (p.weight, p.latent, p.active), strict=True))
    torch.optim.swa_utils.update_bn([batch(0)[0]], average)


@pytest.mark.parametrize("rule", RULES)
def test_an_average_of_every_rule(rule):
    model, base, wiring = wired(rule)
    average = averages(model)["ema"]
    for step in range(4):
        train_steps(model, base, range(step, step + 1))
        average.update_parameters(model)
    wiring.project(average)
    kept = {n: average.module.get_parameter(n) != 0 for n in wiring}
    assert sum(int(found.sum()) for found in kept.values()) <= wiring.num_active
    for n, parameter in wiring.items():
        found = kept[n]
        if not wiring.rule.redistributes and not isinstance(case(rule).budget.get("density"), dnw.Global):
            assert int(found.sum()) <= parameter.num_active
        if wiring.rule.fixed:
            assert not found[~parameter.active].any()


def test_averages_that_do_not_fit():
    model, _, wiring = wired()
    with pytest.raises(ValueError, match="this is the wired model itself"):
        wiring.project(model)
    with pytest.raises(ValueError, match="Linear has no parameter '0.weight'"):
        wiring.project(nn.Linear(2, 2))
    other = small_net()
    other[0] = nn.Conv2d(3, 9, 3)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(9, 3, 3, 3\) in the average and \(8, 3, 3, 3\)"):
        wiring.project(other)


def test_evaluating_unsettled_is_refused_where_it_matters():
    model, base, wiring = wired("dropping")
    train_steps(model, base, range(2))
    images = batch(0)[0]
    model.eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"evaluate inside `with wiring.settled\(\):`"):
        model(images)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="wiring.settled"):
        model(images)
    with torch.no_grad(), wiring.settled():
        settled = model(images)
        with wiring.settled():
            assert torch.equal(model(images), settled)
        assert torch.equal(model(images), settled)
    model(images).sum().backward()  # frozen norms while training, say
    model.train()
    with torch.no_grad():
        model(images)  # norm statistics, say
    model.eval()
    with wiring.settled(), torch.no_grad():
        settled = model(images)
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for other in (copied, pickled):  # copies are not wired, and were made of settled weights
            assert torch.equal(other.eval()(images), settled)
    wiring.remove()
    with torch.no_grad():
        model.eval()(images)


@pytest.mark.parametrize("rule", ["dnw", "random", "frozen", "complete"])
def test_nothing_is_left_in_the_model_where_it_does_not_matter(rule):
    model, base, _ = wired(rule)
    train_steps(model, base, range(1))
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._backward_hooks for m in model.modules())
    assert set(model.state_dict()) == set(small_net().state_dict())
    assert set(vars(model[5])) == set(vars(nn.Linear(1, 1)))
    with torch.no_grad():
        model.eval()(batch(0)[0])


# --- found in a second review ---


def is_selected(wiring: dnw.Wiring) -> bool:
    return all(
        torch.equal(p.active, dnw.top_k([p.latent], p.num_active, [None])[0]) and torch.equal(p.weight, p.latent * p.active)
        for p in wiring.values()
    )


def test_latent_weights_never_join_an_autograd_graph():
    model, base, wiring = wired()
    model.load_state_dict(small_net(3).state_dict())
    copy.deepcopy(base.state_dict())
    with torch.no_grad():
        model[5].weight.clamp_(-0.1, 0.1)
    assert not wiring["5.weight"].latent.requires_grad
    model[7].weight.data = model[7].weight.data.clone()
    wiring["0.weight"].latent = nn.Parameter(torch.randn(8, 3, 3, 3))
    for parameter in wiring.values():
        assert not parameter.latent.requires_grad
        parameter.latent.numpy()
    copy.deepcopy((model, base, wiring))


@pytest.mark.parametrize("then", ["raise", "skip", "template"])
def test_a_write_is_selected_also_when_the_next_step_does_not_count(then):
    model, base, wiring = wired("dnw", "adamw_fused")
    model.load_state_dict(small_net(3).state_dict())
    if then == "template":
        from torch.distributed.checkpoint import state_dict as dcp

        dcp.get_optimizer_state_dict(model, base)
    else:
        F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
        if then == "skip":
            base.found_inf = torch.tensor(1.0)
            base.step()
        else:
            hook = base.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError()))
            with pytest.raises(ZeroDivisionError):
                base.step()
            hook.remove()
    assert wiring.step == 0
    assert is_selected(wiring)
    assert torch.equal(wiring["5.weight"].latent, small_net(3)[5].weight)


def test_putting_other_weights_into_a_trained_model_for_a_while_warns():
    model, base, wiring = wired()
    other = trained(0.0)
    train_steps(model, base, range(3))
    model.load_state_dict(other)
    with pytest.warns(UserWarning, match="its dormant edges start from 0 again.*put them into a copy of the model"):
        wiring.project()


@pytest.mark.parametrize("edges", ["the same", "some of them"])
def test_restart_takes_what_the_model_holds_zeros_included(edges):
    model, base, wiring = wired()
    with torch.no_grad():
        for name, parameter in wiring.items():
            weight = model.get_parameter(name)
            weight.mul_(0.01)
            if edges != "the same":
                weight.view(-1)[parameter.active.flatten().nonzero()[0]] = 0
    held = copy.deepcopy(model.state_dict())
    wiring.restart()
    for name, parameter in wiring.items():
        assert torch.equal(model.get_parameter(name), held[name])
        assert torch.equal(parameter.latent, held[name])
    train_steps(model, base, range(1))


def test_an_average_of_a_model_whose_names_end_alike():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, base, density=0.5)

    class Ema(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = copy.deepcopy(model)

    for average in (torch.optim.swa_utils.AveragedModel(model), Ema(), copy.deepcopy(model)):
        with torch.no_grad():
            for p in average.parameters():
                p.normal_()
        wiring.project(average)
        assert [int((p != 0).sum()) for p in average.parameters() if p.ndim == 2] == [18, 18]


@pytest.mark.parametrize("seed", [None, 1 << 64, -1, "a", 1.5, True])
def test_bad_seeds(seed):
    model = small_net()
    with pytest.raises(ValueError, match=r"seed=.*: allowed is a whole number from 0 to 2\*\*63 - 1"):
        dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.1, seed=seed)


def test_an_optimizer_without_a_learning_rate():
    class Signs(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad.sign(), alpha=0.01)

    model = small_net()
    base = Signs(model.parameters())
    wiring = dnw.wire(model, base, density=0.2)
    train_steps(model, base, range(3))
    assert wiring.step == 3


def test_what_happens_inside_settled():
    model, base, wiring = wired("dropping")
    train_steps(model, base, range(2))
    before = wiring["5.weight"].latent
    place = tuple(wiring["5.weight"].active.nonzero()[0].tolist())
    with wiring.settled():
        with torch.no_grad():
            model[5].weight[place] = 7.0
        assert int((wiring["5.weight"].latent != before).sum()) == 1
        assert model[5].weight[place] == 7.0
        F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
        with pytest.raises(RuntimeError, match=r"optimizer.step\(\) inside `with wiring.settled\(\)"):
            base.step()
        with torch.no_grad():
            model[5].weight[place] = 8.0  # taken over at the end
        wiring.project()
        assert torch.equal(model[5].weight, wiring["5.weight"].latent * wiring["5.weight"].active)
    assert wiring["5.weight"].latent[place] == 8.0
    train_steps(model, base, range(2, 3))


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


def test_frozen_edges_are_not_exchanged_for_others_when_loading():
    model, base, _ = wired("random")
    k = {n: int((model.get_parameter(n) != 0).sum()) for n in ("0.weight", "5.weight", "7.weight")}
    edges = {n: (torch.arange(model.get_parameter(n).numel()) < k[n]).view_as(model.get_parameter(n)) for n in k}
    other = small_net()
    other_base = OPTIMIZERS["momentum"](other.parameters())
    dnw.wire(other, other_base, rule=dnw.Frozen(edges))
    with pytest.raises(ValueError, match="its edges are not those that Frozen was given"):
        other_base.load_state_dict(base.state_dict())


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
