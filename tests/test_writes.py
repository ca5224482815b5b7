"""What is written to a wired model, or to its latent weights, between steps is taken over."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIMIZERS, batch, same, small_net, train_steps, wired
from torch import nn

import dnw

# --- to the model ---


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


def test_putting_other_weights_into_a_trained_model_for_a_while_warns():
    model, base, wiring = wired()
    other = trained(0.0)
    train_steps(model, base, range(3))
    model.load_state_dict(other)
    with pytest.warns(UserWarning, match="its dormant edges start from 0 again.*put them into a copy of the model"):
        wiring.project()


def test_a_write_between_steps_changes_only_what_was_written():
    model, base, wiring = wired()
    train_steps(model, base, range(2))
    latent, active = wiring["5.weight"].latent, wiring["5.weight"].active
    with torch.no_grad():
        model[5].weight.clamp_(-0.1, 0.1)
    expected = torch.where(active, latent.clamp(-0.1, 0.1), latent)
    assert torch.equal(wiring["5.weight"].latent, expected)


def is_selected(wiring: dnw.Wiring) -> bool:
    return all(
        torch.equal(p.active, dnw.top_k([p.latent], p.num_active, [None])[0]) and torch.equal(p.weight, p.latent * p.active)
        for p in wiring.values()
    )


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


# --- to latent weights ---


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
    with pytest.raises(RuntimeError, match="make a clone"):  # what is written to a copy in place would be lost
        parameter.latent.zero_()
    parameter.active.zero_()
    parameter.weight.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, [parameter.latent, parameter.active, parameter.weight], strict=True))


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


class Subclass(torch.optim.SGD):
    """An optimizer that is not PyTorch's own: when it evaluates its closure is not known."""


@pytest.mark.parametrize("optimizer", [Subclass, torch.optim.LBFGS])
def test_what_was_written_before_a_closure_gave_gradients_is_taken_over(optimizer):
    model = nn.Linear(8, 8, bias=False)
    base = optimizer(model.parameters(), lr=1e-12)
    wiring = dnw.wire(model, base, density=0.5)
    written = torch.rand(8, 8) + 5
    model.load_state_dict({"weight": written})

    def closure():
        base.zero_grad()
        loss = model(torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    base.step(closure)
    assert torch.allclose(wiring["weight"].latent, written)


def test_zeros_that_are_written_are_no_other_sparse_weight_where_dormant_edges_take_part():
    model = nn.Linear(16, 16, bias=False)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, base, density=0.5, rule=dnw.TargetedDropout(rate=0.5))
    dormant, before = ~wiring["weight"].active, wiring["weight"].latent
    with torch.no_grad():
        model.weight[0] = 0
    assert torch.equal(wiring["weight"].latent[1:][dormant[1:]], before[1:][dormant[1:]])


@pytest.mark.parametrize("rule", ["dnw", "rigl", "feather", "targeted_dropout"])
def test_what_was_written_is_made_sparse_before_the_wiring_comes_off(rule):
    model, base, wiring = wired(rule)
    train_steps(model, base, range(2))
    numbers = {name: edges.num_active for name, edges in wiring.items()}
    model.load_state_dict(small_net(9).state_dict())
    wiring.remove()
    assert {name: int(model.get_parameter(name).count_nonzero()) for name in numbers} == numbers


def test_weights_that_cannot_be_ranked_are_not_taken_over():
    model, base, wiring = wired()
    train_steps(model, base, range(2))
    before = wiring["0.weight"].latent
    held = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[0] = math.nan
    for ask in (wiring.project, wiring.restart, lambda: wiring["0.weight"].latent):
        with pytest.raises(ValueError, match="'0.weight' has weights that are not finite"):
            ask()
    with torch.no_grad():
        model[0].weight.copy_(held)
    assert torch.equal(wiring["0.weight"].latent, before)


def test_latent_weights_that_are_infinite_in_their_dtype_are_refused():
    model = nn.Linear(8, 8).half()
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5)
    with pytest.raises(ValueError, match="'weight' has weights that are not finite"):
        wiring["weight"].latent = torch.full((8, 8), 1e6)
