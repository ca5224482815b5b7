"""Numbers of a wiring while it trains."""

import json

import pytest
import torch
from helpers import batch, small_net, train_steps
from torch import nn

import dnw


def test_numbers_equal_counting_masks():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    wiring = dnw.wire(net, optimizer, density=0.2)
    masks = [{n: p.active for n, p in wiring.items()}]
    ever = {n: mask.clone() for n, mask in masks[0].items()}
    first = wiring.stats()
    assert (first["step"], first["total"]["entered"], first["total"]["left"]) == (0, 0, 0)
    for step in range(6):
        train_steps(net, optimizer, range(step, step + 1))
        masks.append({n: p.active for n, p in wiring.items()})
        for n, mask in masks[-1].items():
            ever[n] |= mask
    found = wiring.stats()
    assert found["step"] == 6
    for n, row in found["layers"].items():
        assert row == {
            "candidates": masks[-1][n].numel(),
            "active": int(masks[-1][n].sum()),
            "density": wiring[n].density,
            "entered": int((masks[-1][n] & ~masks[0][n]).sum()),
            "left": int((masks[0][n] & ~masks[-1][n]).sum()),
            "ever_active": int(ever[n].sum()) / ever[n].numel(),
            "dead_targets": int((~masks[-1][n].flatten(1).any(1)).sum()),
            "dead_sources": int((~masks[-1][n].transpose(0, 1).flatten(1).any(1)).sum()),
        }
    total = found["total"]
    for key in ("candidates", "active", "entered", "left", "dead_targets", "dead_sources"):
        assert total[key] == sum(row[key] for row in found["layers"].values())
    assert total["entered"] > 0
    assert total["ever_active"] > total["density"] == total["active"] / total["candidates"]
    assert json.loads(json.dumps(found)) == found


def test_since_an_earlier_time():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    wiring = dnw.wire(net, optimizer, density=0.2)
    masks = {}
    for step in range(12):
        masks[step] = wiring["5.weight"].active
        wiring.stats()
        train_steps(net, optimizer, range(step, step + 1))
    entered = int((wiring["5.weight"].active & ~masks[7]).sum())
    assert wiring.stats(since=7)["layers"]["5.weight"]["entered"] == entered
    with pytest.raises(ValueError, match=r"since=2: edges are known of the steps at which they were asked for, '5', '6'"):
        wiring.stats(since=2)
    assert wiring.stats()["total"]["entered"] == 0


def test_before_anybody_has_asked_no_step_is_known():
    net = small_net()
    wiring = dnw.wire(net, torch.optim.SGD(net.parameters(), lr=0.5), density=0.2)
    with pytest.raises(ValueError, match="none yet"):
        wiring.stats(since=0)


def test_dead_targets_and_sources_of_every_layout():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Conv2d(4, 6, 3, bias=False)
            self.grouped = nn.Conv2d(4, 6, 3, groups=2, bias=False)
            self.turned = nn.ConvTranspose2d(4, 6, 3, bias=False)

    net = Net()
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in net.named_parameters()}
    masks["plain.weight"][1], masks["plain.weight"][:, [0, 3]] = False, False
    masks["grouped.weight"][5], masks["grouped.weight"][:3, 1] = False, False
    masks["turned.weight"][:, 2], masks["turned.weight"][[1, 2, 3]] = False, False
    wiring = dnw.wire(net, torch.optim.SGD(net.parameters(), lr=0.1), rule=dnw.Frozen(masks))
    dead = {n: (row["dead_targets"], row["dead_sources"]) for n, row in wiring.stats()["layers"].items()}
    assert dead == {"plain.weight": (1, 2), "grouped.weight": (1, 1), "turned.weight": (1, 3)}


def test_a_hook_that_was_there_before_sees_what_the_step_has_made():
    net, seen = small_net(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    optimizer.register_step_post_hook(lambda *_: seen.append(int(wiring["5.weight"].entered.sum())))
    wiring = dnw.wire(net, optimizer, density=0.2)
    for step in range(4):
        images, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        assert seen[-1] == int(wiring["5.weight"].entered.sum())
    assert any(seen)
