"""Taking over, selecting and projecting in one pass over a parameter.

Contract: gives exactly the edges and weights that ``top_k`` gives, for single edges of one float32 parameter on a CPU that are
ranked by the magnitude of their latent weights, and for n of every m of them. The k-th largest magnitude moves little in a
step, so entries well above the last one are in and entries well below are out; the few between are ranked once the pass is
over. Where each target keeps a least number of edges, only targets with fewer above are looked at once more. Where the k-th
has moved further, the caller ranks as usual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dnw._selection.patterns import NOfM
from dnw._selection.top_k import largest, largest_of_each, magnitude_bits
from dnw._wiring.wired_layer import MARGIN, WiredLayer
from dnw.kernels import _exchange


def fits(layer: WiredLayer) -> bool:
    """Whether a layer's tensors are such as are taken here."""
    held, latent = layer.held, layer.latent
    if layer.shard is not None or layer.least_per_source or layer.in_place or layer.has_other_storage:
        return False
    if layer.least_per_target and (layer.layout.transposed or layer.layout.stacked):
        return False
    if held.device.type != "cpu":
        return False
    assert layer.active is not None
    in_one_piece = held.is_contiguous() and latent.is_contiguous() and layer.active.is_contiguous()
    if not (held.dtype == latent.dtype == torch.float32 and in_one_piece):
        return False
    if layer.pattern is None:
        return True
    if not isinstance(layer.pattern, NOfM) or layer.layout.transposed or layer.layout.stacked:
        return False
    return _exchange.takes_n_of_m(held, latent, layer.active, layer.pattern.m)


def take_over(layer: WiredLayer, k: int) -> bool:
    """Makes what the parameter holds the latent weights, the k largest of them active, and the others 0 in the parameter.

    Returns:
        Whether it is done. If not, the latent weights are taken over and nothing else is.
    """
    held, latent, active = layer.held.detach(), layer.latent, layer.begin_selection()
    if isinstance(layer.pattern, NOfM):
        _exchange.take_n_of_m(held, latent, active, layer.pattern.n, layer.pattern.m, layer.progress)
        return True
    last = _threshold(layer) if layer.threshold is None else layer.threshold
    low, high = last - layer.margin, last + layer.margin
    layer.threshold = None
    if low <= 0:
        layer.take(held)
        return False
    above, between = _exchange.take(held, latent, active, layer.candidates, low, high, layer.progress)
    if layer.least_per_target:
        kept = _kept_by_targets(layer, between, high)
        above, between = above + len(kept), between[~torch.isin(between, kept)]
        active.view(-1)[kept] = True
        held.view(-1)[kept] = latent.view(-1)[kept]
    bits = magnitude_bits(latent.view(-1)[between])
    if not 0 < k - above <= len(bits):
        layer.margin = min(4 * layer.margin, 16 * MARGIN)
        return False
    chosen = largest(bits, k - above)
    layer.threshold = int(bits[chosen].min())
    out = between[~chosen]
    active.view(-1)[out] = False
    held.view(-1)[out] = 0
    return True


def _kept_by_targets(layer: WiredLayer, between: Tensor, high: int) -> Tensor:
    """Flat indices of the edges of at most the magnitude ``high`` that targets keep, where they have too few above it.

    Args:
        layer: whose candidates from some magnitude on are active.
        between: flat indices of the active ones of at most ``high``.
        high: a magnitude, as bits.
    """
    assert layer.active is not None
    least, rows, active = layer.least_per_target, layer.latent.flatten(1), layer.active.view(-1)
    width = rows.shape[1]
    active[between] = False
    above = active.view(torch.uint8).view_as(rows)
    wanting = ((above.amax(1) if least == 1 else above.sum(1, dtype=torch.int32)) < least).nonzero().squeeze(1)
    active[between] = True
    bits = magnitude_bits(rows[wanting])
    if layer.candidates is not None:
        bits.masked_fill_(~layer.candidates.flatten(1)[wanting], -1)
    row, column = (largest_of_each(bits, least) & (bits <= high)).nonzero(as_tuple=True)
    return wanting[row] * width + column


def _threshold(layer: WiredLayer) -> int:
    """The smallest magnitude of an active edge at the last selection, as bits; of those that no target keeps anyway."""
    assert layer.active is not None
    bits, previous = magnitude_bits(layer.latent), layer.previous
    if layer.least_per_target:
        ranked = bits.masked_fill(~previous, -1).flatten(1)
        others = previous & ~largest_of_each(ranked, layer.least_per_target).view_as(previous)
        previous = others if others.any() else previous
    return int(bits[previous].min())
