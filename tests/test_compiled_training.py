"""Training under torch.compile is training."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIMIZERS, RULES, batch, case, small_net, train_steps, wired

import dnw


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


@pytest.mark.slow
def test_every_rule_trains_a_compiled_model_as_it_trains_an_eager_one():
    """A wiring works around a step, not in the forward pass: one compiled model serves all rules, each from the same start."""
    torch._dynamo.reset()
    eager, inside = small_net(), small_net()
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    start = copy.deepcopy(eager.state_dict())
    for name in RULES:
        found = []
        for used, model in ((eager, eager), (compiled, inside)):
            model.load_state_dict(start)
            base = OPTIMIZERS["momentum"](model.parameters())
            wiring = dnw.wire(used, base, rule=case(name).rule, **case(name).budget)
            train_steps(used, base, range(6))
            with wiring.settled():
                found.append([p.detach().clone() for p in model.parameters()])
            wiring.remove()
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
