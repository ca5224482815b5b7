"""Estimators whose active weights come down to 0 at a threshold, so that edges come and go without a jump."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dnw._rules.layer import Layer, only
from dnw._rules.pool import Pool
from dnw._rules.rule import Rule, check_settings
from dnw._selection.budgets import num_edges
from dnw._selection.patterns import Pattern


@dataclass(frozen=True)
class Thresholded(Rule):
    """A rule whose active weights come down to 0 at the threshold, the largest dormant magnitude of their pool.

    In a layer that has edges below it, because it keeps some at least, it is the largest dormant magnitude of that layer.
    """

    fits_floors = False

    def fits(self, pattern: Pattern) -> bool:
        return False

    def prepare(self, pools: Sequence[Pool]) -> None:
        for pool in pools:
            bounds = []
            for x in pool.layers:
                assert x.active is not None
                dormant, size = ~x.active if x.candidates is None else ~x.active & x.candidates, x.latent.abs()
                smallest = torch.where(x.active, size, math.inf)
                both = [only(dormant, size), -smallest]
                bounds.append(torch.stack([part.amax() if part.numel() else part.new_full((), -math.inf) for part in both]))
            largest, shard = torch.stack(bounds), pool.layers[0].shard
            largest = largest if shard is None else shard.max(largest)
            threshold = largest[:, 0].amax().clamp(min=0)
            for x, (of_layer, smallest) in zip(pool.layers, largest, strict=True):
                x.notes["threshold"] = torch.where(-smallest < threshold, of_layer.clamp(min=0), threshold)


@dataclass(frozen=True)
class ST3(Thresholded):
    """Straight-through with soft thresholding: active weights are shrunk by the threshold, and targets scaled up again.

    Source: Vanderschueren, De Vleeschouwer, "Are straight-through gradients and soft-thresholding all you need for sparse
    training?", 2023, section 3; there with ``density=dnw.Global(...)`` and a cubic ``schedule=dnw.DensitySchedule(...)``. In
    the authors' code the threshold lies between the largest dormant and the smallest active magnitude.

    A target's scale depends on all of its weights. So that what somebody writes to the model stays as it was written, a write
    to some active weights of a target gives new latent weights to all of them, which belong to the scale that comes of it.

    Args:
        rescale: whether the weights of each target are divided by the share of their magnitude that is active (1.01 / (share
            + 0.01), as the authors have it).
    """

    rescale: bool = True

    def prepare(self, pools: Sequence[Pool]) -> None:
        super().prepare(pools)
        for layer in (x for pool in pools for x in pool.layers if self.rescale):
            size = layer.latent.abs() if layer.candidates is None else only(layer.candidates, layer.latent.abs())
            active, whole = layer.sum_by_target(only(layer.active, size)), layer.sum_by_target(size)
            layer.notes["scale"] = 1.01 / ((active / whole).nan_to_num(1.0) + 0.01)

    def project(self, layer: Layer) -> Tensor:
        shrunk = layer.latent.sign() * (layer.latent.abs() - layer.notes["threshold"])
        return only(layer.active, shrunk * layer.notes["scale"] if self.rescale else shrunk)

    def remade(self, layer: Layer, written: Tensor) -> Tensor:
        if not self.rescale:
            return written
        assert layer.active is not None
        touched = layer.sum_by_target(written.to(layer.latent.dtype)) > 0
        return written | layer.active & (self.project(layer) != 0) & touched

    def latent_of(self, layer: Layer, effective: Tensor) -> Tensor:
        shrunk = effective * self._inverse_scale(layer, effective) if self.rescale else effective
        return shrunk + effective.sign() * layer.notes["threshold"]

    def _inverse_scale(self, layer: Layer, effective: Tensor) -> Tensor:
        """1 / scale, of each target, at the latent weights that have these effective ones.

        With a magnitude E of effective weights in a target, latent weights are threshold + |effective| x, where x = 1 / scale
        is (share + 0.01) / 1.01. The share being linear in x over linear in x, x is the positive root of a parabola.
        """
        threshold, zero = layer.notes["threshold"].float(), effective == 0
        stays = only(zero & (self.project(layer) == 0), layer.latent.abs())
        dormant = stays if layer.active is None else only(~layer.active, stays)
        if layer.candidates is not None:
            dormant = only(layer.candidates, dormant)
        parts = [effective.abs(), (~zero) * threshold + only(layer.active, stays), dormant]
        e, a, d = (layer.sum_by_target(part.float()).double() for part in parts)
        b, c = a + d - e, a + d * (0.01 / 1.01)
        root = (b.square() + 4 * e * c).sqrt()
        x = torch.where(b > 0, 2 * c / (b + root), (root - b) / (2 * e)).nan_to_num(1.0)
        return x.to(layer.latent.dtype)


@dataclass(frozen=True)
class Feather(Thresholded):
    """Straight-through between hard and soft thresholding, with a smaller gradient for dormant edges.

    The effective weight is sign(w) (|w|^p - T^p)^(1/p). Source: Glentis Georgoulakis et al., "Feather: an elegant solution to
    effective DNN sparsification", 2023, section 3; there with ``density=dnw.Global(...)`` and a cubic schedule that ends at
    half of training.

    Args:
        power: p; 1 is soft thresholding, and a large one comes near hard thresholding.
        dormant_gradient: factor of dormant edges' gradient, from 0 to 1. By default the authors', which depends on the final
            density: 1 up to 95 % of zeros, 0.5 beyond; of each budget by itself, where theirs is one for the whole network.
    """

    power: float = 3.0
    dormant_gradient: float | None = None

    def __post_init__(self) -> None:
        check_settings(self, power=(1.0, math.inf))
        if self.dormant_gradient is not None:
            check_settings(self, dormant_gradient=(0.0, 1.0))

    def prepare(self, pools: Sequence[Pool]) -> None:
        super().prepare(pools)
        for pool in pools:
            factor = self.dormant_gradient
            if factor is None:
                factor = 0.5 if (pool.budget or pool.k) < num_edges(0.05, pool.num_candidates) else 1.0
            for layer in pool.layers:
                layer.notes["dormant_gradient"] = torch.full_like(layer.notes["threshold"], factor)

    def gradient(self, layer: Layer) -> Tensor | None:
        assert layer.active is not None
        assert layer.grad is not None
        return torch.where(layer.active, layer.grad, layer.notes["dormant_gradient"] * layer.grad)

    def project(self, layer: Layer) -> Tensor:
        # |w| (1 - (T / |w|)^p)^(1/p), in which no power of a small weight vanishes
        ratio = (layer.notes["threshold"] / layer.latent.abs()).nan_to_num(1.0).clamp(max=1)
        return only(layer.active, layer.latent * (1 - ratio**self.power) ** (1 / self.power))

    def latent_of(self, layer: Layer, effective: Tensor) -> Tensor:
        ratio = (layer.notes["threshold"] / effective.abs()).nan_to_num(0.0, posinf=0.0)
        return effective * (1 + ratio**self.power) ** (1 / self.power)
