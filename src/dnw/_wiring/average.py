"""Projecting an average of a model's weights over time (EMA, SWA) as the model's own are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnw._rules.layer import Layer
from dnw._rules.pool import Pool
from dnw._selection.shards import local
from dnw._wiring.parameters import parameters_named
from dnw._wiring.weights import Weights


@torch.no_grad()
def project_average(weights: Weights, averaged: nn.Module) -> None:
    """Gives an average the edges of largest magnitude, as many as the wired model has, and its settled weights.

    Raises:
        ValueError: the average lacks a wired parameter, or has it in another shape.
    """
    copies: dict[int, Layer] = {}
    targets: list[tuple[Tensor, Layer]] = []
    names = [layer.name for layer in weights.layers]
    for layer, parameter in zip(weights.layers, parameters_named(averaged, names), strict=True):
        if parameter is layer.parameter:
            raise ValueError("this is the wired model itself, not an average of it; leave the argument out")
        if parameter.shape != layer.parameter.shape:
            raise ValueError(
                f"{layer.name!r} has shape {tuple(parameter.shape)} in the average and {layer.shape} in the wired model"
            )
        copy = layer.with_latent(local(parameter).to(device=layer.latent.device, dtype=layer.latent.dtype, copy=True))
        copies[id(layer)] = copy
        targets.append((local(parameter), copy))
    rule = weights.rule
    pools = [Pool([copies[id(x)] for x in pool.layers], pool.k) for pool in weights.pools]
    if not rule.fixed:
        for pool, masks in zip(pools, rule.select(pools), strict=True):
            for copy, mask in zip(pool.layers, masks, strict=True):
                copy.active = mask
    rule.prepare(pools)
    for target, copy in targets:
        target.copy_(rule.settle(copy))
