"""What only a CUDA device can show: the same wirings as on the CPU, runs that go on there, networks compiled from there."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dnw
from dnw.models import tiny_digits
from dnw.recipes import RECIPES
from dnw.train import EpochMetrics, RunDirectory, override, resume, train
from dnw.train._log import Log

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 1, 8, 8, generator=generator), torch.randint(10, (16,), generator=generator)


def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_digits().double()


@pytest.mark.parametrize("rule", ["dnw", "no_update", "random", "rigl", "set", "feather", "top_kast"])
def test_wirings_are_those_of_the_cpu(rule):
    """In double precision, so that rounding in another order moves no edge."""
    edges, losses = [], []
    for device in ("cpu", DEVICE):
        net = model().to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        wiring = dnw.wire(net, optimizer, rule=dnw.RULES[rule](), num_edges=100, seed=3)
        for step in range(5):
            images, labels = batch(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images.double().to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
        edges.append(wiring["graph.weight"].active.cpu())
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.equal(*edges)


class Stopped(Log):
    """Ctrl-C after two epochs."""

    def epoch(self, m: EpochMetrics, epochs: int) -> None:
        if m.epoch == 2:
            raise KeyboardInterrupt


def test_a_run_goes_on_after_it_was_stopped(tmp_path):
    config = override(RECIPES["digits"](), ["epochs=4", "baseline=null", f"device={DEVICE}"])
    whole = train(config, data_dir=tmp_path, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, data_dir=tmp_path, out=tmp_path / "parts", log=Stopped())
    resume(tmp_path / "parts")
    one, other = RunDirectory(whole).metrics(), RunDirectory(tmp_path / "parts").metrics()
    assert len(one) == len(other) == 4
    assert one[0].train_loss == pytest.approx(other[0].train_loss, rel=1e-3)  # sums in another order


def test_a_model_on_the_device_is_compiled_for_the_cpu():
    net = model().float().to(DEVICE).eval()
    images = batch(0)[0]
    compiled = dnw.compile.compile(net, images)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), net(images.to(DEVICE)).cpu(), rtol=1e-3, atol=1e-4)
    assert next(net.parameters()).device.type == DEVICE


def test_a_copy_trains_on():
    net = model().to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    dnw.wire(net, optimizer, num_edges=100)
    twin = copy.deepcopy(net)
    images, labels = batch(1)
    F.cross_entropy(twin(images.double().to(DEVICE)), labels.to(DEVICE)).backward()
    assert twin.graph.weight.grad.device.type == DEVICE
