"""Steps of every kind: in groups, accumulated, through closures, scaled, asked in the middle, interrupted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIMIZERS, MaskInForward, batch, same, saved, small_net, train_steps, wired
from torch import nn

import dnw

# --- optimizers and their groups ---


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


def test_wrapped_optimizers_are_unwrapped():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, Wrapper(base), density=0.2)
    train_steps(model, base, range(1))
    assert wiring.step == 1


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


# --- one step ---


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


def test_the_users_gradient_is_given_back():
    model, base, _ = wired("random")
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    given = model[5].weight.grad
    values = given.clone()
    base.step()
    assert model[5].weight.grad is given
    assert torch.equal(given, values)


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


# --- in the middle of a step ---


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


@pytest.mark.parametrize("optimizer", ["SGD", "Subclass", "LBFGS"])
def test_training_goes_on_after_a_closure_gave_a_gradient_that_is_not_finite(optimizer):
    kinds = {"SGD": torch.optim.SGD, "Subclass": type("Subclass", (torch.optim.SGD,), {}), "LBFGS": torch.optim.LBFGS}
    model = nn.Linear(8, 8, bias=False)
    base = kinds[optimizer](model.parameters(), lr=0.1)
    wiring = dnw.wire(model, base, density=0.5)
    before = wiring["weight"].latent

    def closure(factor):
        base.zero_grad()
        loss = factor * model(torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    with pytest.raises(FloatingPointError, match="the step is not taken"):
        base.step(lambda: closure(float("nan")))
    assert torch.equal(wiring["weight"].latent, before)
    base.step(lambda: closure(1.0))
    assert wiring.step == 1
    assert not torch.equal(wiring["weight"].latent, before)
    assert int(model.weight.count_nonzero()) == 32


@pytest.mark.parametrize("rule", ["no_update", "sr_ste", "norm_ste", "rigl", "random"])
def test_a_sparse_gradient_is_refused_by_rules_that_change_it(rule):
    model = nn.Embedding(10, 8, sparse=True)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    dnw.wire(model, base, density=0.5, rule=dnw.RULES[rule](), include=[nn.Embedding])
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="is a sparse tensor, and .* needs a dense one"):
        base.step()


def test_dnw_takes_sparse_gradients():
    model = nn.Embedding(10, 8, sparse=True)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, base, density=0.5, include=[nn.Embedding])
    before = wiring["weight"].latent
    model(torch.tensor([1, 2])).sum().backward()
    base.step()
    assert torch.allclose(wiring["weight"].latent[1:3], before[1:3] - 0.1)
    assert torch.equal(wiring["weight"].latent[3:], before[3:])


@pytest.mark.parametrize("rule", ["dnw", "random", "set"])
def test_tensors_of_the_wiring_are_made_where_its_parameters_are_whatever_the_default_device(rule):
    model = small_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torch.device("meta"):
        wiring = dnw.wire(model, base, density=0.2, rule=dnw.RULES[rule]())
        wiring.stats()
    model(batch(0)[0]).sum().backward()
    with torch.device("meta"):
        base.step()
        assert wiring.stats()["total"]["active"] == wiring.num_active
