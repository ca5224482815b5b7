"""Taking over, selecting and projecting in one pass over a parameter, piece by piece while a piece is in the cache.

Contract: gives exactly the edges and weights that ``top_k`` gives, for single edges of one float32 parameter on a CPU that are
ranked by the magnitude of their latent weights. The k-th largest magnitude moves little in a step, so entries well above the
last one are in and entries well below are out; the few between are ranked once the pass is over. Where the k-th has moved
further, the caller ranks as usual.
"""

from __future__ import annotations

import torch

from dnw._layer import WiredLayer
from dnw._select import largest, magnitude_bits

_PIECE = 1 << 17
"""Entries at a time: what fits into a second-level cache with all that is made of them."""
_MARGIN = 1 << 18
"""How far the k-th largest may move either way, in units of the last place of a float32: 3 %."""


def fits(layer: WiredLayer) -> bool:
    """Whether a layer's tensors are such as are taken here."""
    plain = layer.shard is None and layer.pattern is None and not layer.least_per_target and not layer.in_place
    held, latent = layer.held, layer.latent
    return plain and held.device.type == "cpu" and held.dtype == latent.dtype == torch.float32 and held.is_contiguous()


def take_over(layer: WiredLayer, k: int) -> bool:
    """Makes what the parameter holds the latent weights, the k largest of them active, and the others 0 in the parameter.

    Returns:
        Whether it is done. If not, the latent weights are taken over and nothing else is.
    """
    last = layer.threshold if layer.threshold is not None else _threshold(layer)
    low, high = last - _MARGIN, last + _MARGIN
    held, latent, active = layer.held.detach().view(-1), layer.latent.view(-1), layer.begin_selection().view(-1)
    if low <= 0:
        layer.take(held)
        return False
    candidates = None if layer.candidates is None else layer.candidates.view(-1)
    size = min(_PIECE, held.numel())
    bits, flag = torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=torch.bool)
    above, places, found = 0, [], []
    for start in range(0, held.numel(), _PIECE):
        piece = held[start : start + _PIECE]
        stop = start + len(piece)
        latent[start:stop].copy_(piece)
        layer.taken = stop  # from here on the piece may be overwritten
        size_of = torch.bitwise_and(piece.view(torch.int32), 0x7FFF_FFFF, out=bits[: len(piece)])
        if candidates is not None:
            size_of.masked_fill_(~candidates[start:stop], -1)
        chosen = torch.ge(size_of, low, out=active[start:stop])
        near = torch.gt(size_of, high, out=flag[: len(piece)])
        above += int(near.count_nonzero())
        near.logical_xor_(chosen)
        place = near.nonzero().squeeze(1)
        found.append(size_of[place])
        places.append(place + start)
        piece.masked_fill_(torch.logical_not(chosen, out=near), 0)
    between, place = torch.cat(found), torch.cat(places)
    if not 0 < k - above <= len(between):
        layer.threshold = None
        return False
    kept = largest(between, k - above)
    layer.threshold = int(between[kept].min())
    out = place[~kept]
    active[out] = False
    held[out] = 0
    return True


def _threshold(layer: WiredLayer) -> int:
    """The smallest magnitude of an active edge, as bits."""
    assert layer.active is not None
    return int(magnitude_bits(layer.latent)[layer.active].min())
