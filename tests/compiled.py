"""Networks for tests of the compiler: every node sends something of its own, and some are gone."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

import dnw
from dnw.compile import Program, plan
from dnw.models import GraphChain, Stage


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with norms whose statistics and weights are nothing special, and every constant node sending something."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            with torch.no_grad():
                module.weight.normal_(generator=generator)
                module.bias.normal_(generator=generator)
                if module.running_mean is not None:
                    module.running_mean.normal_(generator=generator)
                    module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def thinned(model: nn.Module, seed: int, **budget: object) -> nn.Module:
    """With a random graph of some budget."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dnw.wire(model, optimizer, rule=dnw.RandomGraph(), seed=seed, **budget).remove()
    return model


def small_program() -> Program:
    return copy.deepcopy(_small_program())


@functools.cache
def _small_program() -> Program:
    torch.manual_seed(0)
    model = thinned(lively(GraphChain(10, image_stride=1, stages=(Stage(6, 8, 1, 2), Stage(8, 16, 2, 3)))), 3, density=0.2)
    return plan(model, (3, 21, 18)).apply(model)
