"""Copies of a model, its optimizer and its wiring go on by themselves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import RULES, pairs, same, small_net, train_steps, wired

import dnw


def copies(how: str, things: tuple) -> tuple:
    return copy.deepcopy(things) if how == "deepcopy" else pickle.loads(pickle.dumps(things))


@pytest.mark.parametrize(
    ("rule", "optimizer", "at", "how"), pairs(RULES, ["sgd", "momentum", "adamw_fused"], [0, 3], ["deepcopy", "pickle"])
)
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
