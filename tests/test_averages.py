"""Averages of weights are sparse too, and what a rule only trains with is not evaluated."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import RULES, batch, case, small_net, train_steps, wired
from torch import nn

import dnw

# --- averages ---


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


# --- weights to evaluate with ---


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


@pytest.mark.parametrize("rule", ["dnw", "random", "frozen", "complete"])
def test_nothing_is_left_in_the_model_where_it_does_not_matter(rule):
    model, base, _ = wired(rule)
    train_steps(model, base, range(1))
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._backward_hooks for m in model.modules())
    assert set(model.state_dict()) == set(small_net().state_dict())
    assert set(vars(model[5])) == set(vars(nn.Linear(1, 1)))
    with torch.no_grad():
        model.eval()(batch(0)[0])
