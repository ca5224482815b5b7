"""State dicts: resumed bit for bit under every rule, and refused where they do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import OPTIMIZERS, RULES, case, pairs, same, saved, small_net, train_steps, wired

import dnw
from dnw._wiring.state import FORMAT

# --- resuming ---


@pytest.mark.parametrize(("rule", "at", "optimizer"), pairs(RULES, [0, 3], ["sgd", "momentum", "adamw_fused"]))
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


def test_the_seed_travels():
    model, base, _ = wired("dropping")
    other = small_net(1)
    other_base = OPTIMIZERS["momentum"](other.parameters())
    other_wiring = dnw.wire(other, other_base, density=0.2, rule=case("dropping").rule, seed=9)
    other_base.load_state_dict(base.state_dict())
    assert {layer.seed for layer in other_wiring._weights.layers} == {0}


def test_frozen_graph_from_a_loaded_random_one_survives_a_seed_change():
    model, base, wiring = wired("random")
    _, state = saved(model, base)
    other = small_net(1)
    other_base = OPTIMIZERS["momentum"](other.parameters())
    other_wiring = dnw.wire(other, other_base, density=0.2, rule=dnw.RandomGraph(), seed=7)
    other_base.load_state_dict(state)
    assert torch.equal(other_wiring["5.weight"].active, wiring["5.weight"].active)


def test_a_saved_model_is_the_sparse_network_with_the_names_of_the_dense_one():
    model, base, wiring = wired()
    train_steps(model, base, range(2))
    state = model.state_dict()
    assert list(state) == list(small_net().state_dict())
    assert int((state["5.weight"] != 0).sum()) == wiring["5.weight"].num_active


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


# --- states that do not fit ---


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


def test_a_wired_state_loaded_before_wiring_is_refused():
    model, base, _ = wired()
    train_steps(model, base, range(2))
    other = small_net()
    other_base = OPTIMIZERS["momentum"](other.parameters())
    other_base.load_state_dict(base.state_dict())
    with pytest.raises(ValueError, match="before it was wired, and has rounded it; wire first, then load"):
        dnw.wire(other, other_base, density=0.2)


def test_frozen_edges_are_not_exchanged_for_others_when_loading():
    model, base, _ = wired("random")
    k = {n: int((model.get_parameter(n) != 0).sum()) for n in ("0.weight", "5.weight", "7.weight")}
    edges = {n: (torch.arange(model.get_parameter(n).numel()) < k[n]).view_as(model.get_parameter(n)) for n in k}
    other = small_net()
    other_base = OPTIMIZERS["momentum"](other.parameters())
    dnw.wire(other, other_base, rule=dnw.Frozen(edges))
    with pytest.raises(ValueError, match="its edges are not those that Frozen was given"):
        other_base.load_state_dict(base.state_dict())


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


# --- torch.distributed.checkpoint ---


@pytest.mark.parametrize(
    ("rule", "optimizer", "at", "flatten"),
    pairs(
        ["dnw", "random", "dropping", "sr_ste", "top_kast", "l1_anneal"], ["sgd", "momentum", "adamw"], [0, 3], [False, True]
    ),
)
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


@pytest.mark.parametrize("rule", sorted(dnw.RULES.keys() - {"frozen", "complete"}))
def test_state_that_is_made_for_a_checkpoint_knows_of_no_step(rule):
    from torch.distributed.checkpoint import state_dict as dcp

    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wiring = dnw.wire(model, base, density=0.2, rule=dnw.RULES[rule]())
    dcp.get_optimizer_state_dict(model, base)
    assert wiring.step == 0
    assert not any(state["momentum_buffer"].any() for state in base.state.values() if state.get("momentum_buffer") is not None)


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
