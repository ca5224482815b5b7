"""The gradients that the base optimizer gets: those of autograd, or what the rule makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dnw._rules.rule import Rule
from dnw._wiring.weights import Weights
from dnw._wiring.wired_layer import WiredLayer
from dnw.kernels._exchange import is_finite, masked
from dnw.kernels._team import each


def gradients(
    weights: Weights, layers: Sequence[WiredLayer], step: int, check_finite: bool | None = None
) -> list[Tensor | None]:
    """The gradient of each of some layers that have one; None where it is the one that autograd gave.

    Args:
        weights: that the layers are of.
        layers: whose parameters have a gradient.
        step: number of the step that it is for.
        check_finite: whether to look for NaN and infinity; None does so on a CPU, for parameters that are not sharded.

    Raises:
        FloatingPointError: one is NaN or infinite. The latent weight would be so too, and rank first.
    """
    rule, optimizer = weights.rule, weights.optimizer
    is_due = rule.is_due(step)
    selects = is_due and rule.selects_by_gradient
    as_is = type(rule).gradient is Rule.gradient and rule.needs_dormant_gradient and not selects
    maximized = {id(p) for group in weights.chain[-1].param_groups if group.get("maximize") for p in group["params"]}
    scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer finds them too large by this
    skips = getattr(optimizer, "found_inf", None) is not None  # and skips steps that are not finite itself
    made: list[Tensor | None] = []
    jobs: list[tuple[int, Callable[[], bool]]] = []
    checks = [not skips and _looks_at(layer, check_finite) for layer in layers]
    for layer, check in zip(layers, checks, strict=True):
        given = layer.local_grad()
        if given.layout != torch.strided and not as_is:
            raise RuntimeError(
                f"the gradient of {layer.name!r} is a sparse tensor, and {type(rule).__name__} needs a dense one; make the "
                "module without sparse gradients (nn.Embedding(..., sparse=False)) or take DNW()"
            )
        weights.see_state(layer)
        layer.grad = given if scale is None else given / scale
        rises = id(layer.parameter) in maximized  # the rule sees what falls
        layer.grad = layer.grad.neg() if rises else layer.grad
        gradient = rule.gradient(layer)
        gradient = gradient.neg() if rises and gradient is not None else gradient
        if not selects:
            layer.grad = None
        elif scale is None and not rises and (gradient is None or gradient.data_ptr() == given.data_ptr()):
            layer.grad = given.clone()  # some optimizers change the gradient in place
        if gradient is not None and scale is not None:
            gradient = gradient * scale
        found = given if gradient is None else gradient
        if not rule.needs_dormant_gradient and not weights.pools.is_full(layer):
            assert layer.active is not None
            gradient = layer.buffer(found)
            work = partial(masked, found, layer.active, gradient, check=check, check_all=check and selects)
        else:
            work = partial(is_finite, found) if check else partial(bool, True)
        jobs.append((found.numel() if found.device.type == "cpu" else 0, work))
        made.append(gradient)
    for layer, check, finite in zip(layers, checks, each(jobs), strict=True):
        if check:
            _require_finite(layer, finite)
    return made


def _looks_at(layer: WiredLayer, check_finite: bool | None) -> bool:
    return layer.shard is None and layer.latent.device.type == "cpu" if check_finite is None else check_finite


def _require_finite(layer: WiredLayer, finite: bool) -> None:
    if finite and layer.shard is None:
        return
    bad = layer.total(~layer.local_grad().isfinite())  # of a sharded one all processes must know
    if bad or layer.shard is None:
        raise FloatingPointError(
            f"the gradient of {layer.name!r} has {bad:,} entries that are NaN or infinite; the step is not taken and "
            "nothing has changed. Skip the step, lower the learning rate or clip gradients (wire(..., check_finite=False) "
            "takes such steps)"
        )
