"""Half precision: exact budgets, float32 latent weights behind it, autocast and gradient scaling."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIMIZERS, RULES, MaskInForward, batch, case, pairs, slow_top_k, small_net
from torch import nn

import dnw

HALVES = [torch.bfloat16, torch.float16]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    dtype = next(model.parameters()).dtype
    for number in numbers:
        images, labels = batch(number)
        optimizer.zero_grad()
        F.cross_entropy(model(images.to(dtype)).float(), labels).backward()
        optimizer.step()


def half_net(dtype: torch.dtype, seed: int = 0) -> nn.Sequential:
    return small_net(seed).to(dtype)


@pytest.mark.parametrize(("rule", "latent_dtype", "dtype"), pairs(["dnw", "random", "dropping"], [None, torch.float32], HALVES))
def test_half_precision_parameters_keep_exactly_k_edges(rule, latent_dtype, dtype):
    model = half_net(dtype)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    wiring = dnw.wire(model, optimizer, rule=case(rule).rule, latent_dtype=latent_dtype, **case(rule).budget)
    budget = {n: dnw.num_edges(0.2, wiring[n].num_candidates) for n in wiring}
    for number in range(6):
        steps(model, optimizer, range(number, number + 1))
        for n, parameter in wiring.items():
            assert parameter.num_active == budget[n]
            assert parameter.latent.dtype == (latent_dtype or dtype)
            assert parameter.weight.dtype == model.get_parameter(n).dtype == dtype
            assert not model.get_parameter(n)[~parameter.active].any()


@pytest.mark.parametrize("value", [0.0, 1e-30, 6e-8])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_active_is_not_the_same_as_non_zero(dtype, value):
    layer = nn.Linear(20, 10, bias=False).to(dtype)
    nn.init.constant_(layer.weight, value)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    wiring = dnw.wire(layer, optimizer, density=0.25)
    layer(torch.zeros(1, 20, dtype=dtype)).sum().backward()
    layer.weight.grad.fill_(1.0)  # no template step of a checkpoint: a real one with learning rate 0
    optimizer.step()
    assert wiring.step == 1
    assert wiring["weight"].num_active == 50
    assert int(wiring["weight"].active.sum()) == 50
    assert wiring["weight"].edges().to_scipy().nnz == 50
    assert "50" in str(wiring.summary())


def test_float32_latents_keep_small_updates():
    """In bfloat16 an update of 1e-4 to a weight near 1 is rounded away; with float32 latent weights a hundred add up."""
    drift = {}
    for latent_dtype in (None, torch.float32):
        layer = nn.Linear(4, 1, bias=False).to(torch.bfloat16)
        nn.init.constant_(layer.weight, 1.0)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
        wiring = dnw.wire(layer, optimizer, num_edges=2, latent_dtype=latent_dtype)
        for _ in range(100):
            optimizer.zero_grad()
            layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
        drift[latent_dtype] = (wiring["weight"].latent - 1).tolist()[0]
    assert drift[None] == [0.0] * 4
    assert drift[torch.float32] == pytest.approx([-0.01] * 4, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw", "adamw_fused"])
def test_float32_latents_train_as_a_float32_master_copy_does(optimizer):
    """By hand: float32 weights and optimizer, rounded to bfloat16 and masked for each forward pass."""
    model = half_net(torch.bfloat16)
    base = OPTIMIZERS[optimizer](model.parameters())
    wiring = dnw.wire(model, base, density=0.2, latent_dtype=torch.float32)
    manual = half_net(torch.bfloat16)
    masters = {n: p.detach().float() if n in wiring else p for n, p in manual.named_parameters()}
    theirs = OPTIMIZERS[optimizer]([nn.Parameter(m) if n in wiring else m for n, m in masters.items()])
    masters = dict(zip(masters, theirs.param_groups[0]["params"], strict=True))
    storage = {n: model.get_parameter(n).data_ptr() for n in wiring}
    for number in range(10):
        steps(model, base, range(number, number + 1))
        images, labels = batch(number)
        with torch.no_grad():
            for n in wiring:
                flat = masters[n].flatten().tolist()
                mask = torch.tensor(slow_top_k(flat, wiring[n].num_active, [True] * len(flat)))
                manual.get_parameter(n).copy_(masters[n] * mask.view(masters[n].shape))
        manual.zero_grad()
        F.cross_entropy(manual(images.bfloat16()).float(), labels).backward()
        for n in wiring:
            masters[n].grad = manual.get_parameter(n).grad.float()
        theirs.step()
    for n in wiring:
        assert torch.equal(wiring[n].latent, masters[n])
        assert model.get_parameter(n).data_ptr() == storage[n]
        assert model.get_parameter(n).grad.dtype == torch.bfloat16
        state = base.state[model.get_parameter(n)]
        assert all(v.dtype == torch.float32 for k, v in state.items() if k in ("momentum_buffer", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw", "adamw_fused"])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("how", ["file", "deepcopy"])
def test_float32_latents_resume_bit_exactly(optimizer, at, how):
    model = half_net(torch.bfloat16)
    base = OPTIMIZERS[optimizer](model.parameters())
    wiring = dnw.wire(model, base, density=0.2, latent_dtype=torch.float32)
    steps(model, base, range(at))
    if how == "deepcopy":
        other, other_base, other_wiring = copy.deepcopy((model, base, wiring))
    else:
        buffer = io.BytesIO()
        torch.save((model.state_dict(), base.state_dict()), buffer)
        buffer.seek(0)
        weights, state = torch.load(buffer, weights_only=True)
        other = half_net(torch.bfloat16, seed=1)
        other_base = OPTIMIZERS[optimizer](other.parameters())
        other_wiring = dnw.wire(other, other_base, density=0.2, latent_dtype=torch.float32)
        other_base.load_state_dict(state)
        other.load_state_dict(weights)
    assert other[0].weight.dtype == torch.bfloat16
    steps(model, base, range(at, at + 5))
    steps(other, other_base, range(at, at + 5))
    for n in wiring:
        assert torch.equal(wiring[n].latent, other_wiring[n].latent)
        assert torch.equal(model.get_parameter(n), other.get_parameter(n))
        for key, value in base.state.get(model.get_parameter(n), {}).items():
            assert torch.equal(value, other_base.state[other.get_parameter(n)][key])


def test_a_failed_load_and_a_failed_step_give_the_parameter_back():
    model = half_net(torch.bfloat16)
    base = OPTIMIZERS["momentum"](model.parameters())
    wiring = dnw.wire(model, base, density=0.2, latent_dtype=torch.float32)
    steps(model, base, range(2))
    state = copy.deepcopy(base.state_dict())
    before = {n: wiring[n].latent for n in wiring}
    del state["param_groups"][0]["params"][-1]
    with pytest.raises(ValueError, match="different|size"):
        base.load_state_dict(state)
    assert torch.equal(wiring["5.weight"].latent, before["5.weight"])
    assert model[5].weight.dtype == torch.bfloat16
    hook = base.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        steps(model, base, range(2, 3))
    hook.remove()
    assert torch.equal(wiring["5.weight"].latent, before["5.weight"])
    assert model[5].weight.dtype == torch.bfloat16
    assert int(model[5].weight.count_nonzero()) == 102
    steps(model, base, range(2, 4))
    assert wiring.step == 4


def test_float32_latents_take_over_writes():
    model = half_net(torch.bfloat16)
    base = OPTIMIZERS["momentum"](model.parameters())
    wiring = dnw.wire(model, base, density=0.2, latent_dtype=torch.float32)
    steps(model, base, range(2))
    before, active = wiring["5.weight"].latent.clone(), wiring["5.weight"].active
    place = tuple(active.nonzero()[0].tolist())
    with torch.no_grad():
        model[5].weight[place] = 3.0
    wiring.project()
    after = wiring["5.weight"].latent
    assert after[place] == 3.0
    before[place] = 3.0
    assert torch.equal(after, before)  # the others kept the digits that bfloat16 has no room for


@pytest.mark.parametrize("bad", [torch.int32, torch.float16, "float32"])
def test_bad_latent_dtypes(bad):
    model = small_net()
    with pytest.raises(ValueError, match="latent_dtype"):
        dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.2, latent_dtype=bad)
    assert int((model[5].weight == 0).sum()) == 0


def test_a_state_with_other_latents_is_refused():
    model = half_net(torch.bfloat16)
    base = OPTIMIZERS["momentum"](model.parameters())
    dnw.wire(model, base, density=0.2, latent_dtype=torch.float32)
    other = half_net(torch.bfloat16)
    other_base = OPTIMIZERS["momentum"](other.parameters())
    dnw.wire(other, other_base, density=0.2)
    with pytest.raises(ValueError, match="expected 'latent' as torch.bfloat16 of shape .*, got torch.float32"):
        other_base.load_state_dict(base.state_dict())


# --- autocast and gradient scaling ---


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw_fused"])
def test_grad_scaler_with_skipped_steps_equals_training_without_them(optimizer, rule):
    """Powers of two scale exactly, so the scaled run must equal the plain one bit for bit, skipped steps left out."""

    def make() -> tuple:
        model = small_net()
        base = OPTIMIZERS[optimizer](model.parameters())
        return model, base, dnw.wire(model, base, rule=case(rule).rule, **case(rule).budget)

    model, base, wiring = make()
    plain, plain_base, plain_wiring = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    done = 0
    for number in range(8):
        images, labels = batch(number)
        base.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        overflows = number in (0, 3, 4)
        if overflows:
            model[5].weight.grad[0, 0] = torch.inf
        scaler.step(base)
        scaler.update()
        if not overflows:
            done += 1
            plain_base.zero_grad()
            F.cross_entropy(plain(images), labels).backward()
            plain_base.step()
        else:  # the running statistics of the norm have moved all the same
            plain(images)
        assert wiring.step == plain_wiring.step == done
        for n in wiring:
            assert torch.equal(wiring[n].active, plain_wiring[n].active)
            torch.testing.assert_close(wiring[n].latent, plain_wiring[n].latent, rtol=1e-6, atol=1e-8)


def test_autocast_equals_mask_in_forward_under_autocast():
    model = small_net()
    base = OPTIMIZERS["adamw"](model.parameters())
    wiring = dnw.wire(model, base, density=0.2)
    textbook = MaskInForward(small_net(), {n: wiring[n].num_active for n in wiring})
    theirs = OPTIMIZERS["adamw"](textbook.parameters())
    for number in range(20):
        images, labels = batch(number)
        losses = []
        for net, optimizer in ((model, base), (textbook, theirs)):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
    for n in wiring:
        assert torch.equal(wiring[n].latent, textbook.net.get_parameter(n))


def test_a_refused_state_leaves_the_model_as_it_was():
    model = small_net().bfloat16()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    dnw.wire(model, base, density=0.2, latent_dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    state = base.state_dict()
    state["param_groups"].append({"params": [99], "lr": 1.0})
    with pytest.raises(ValueError, match="parameter group"):
        base.load_state_dict(state)
    after = model.state_dict()
    assert all(value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items())
