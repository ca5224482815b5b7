"""What surrounds an optimizer's step, in one pass over the memory of each parameter.

Contract: the same numbers with and without the native code, for whatever tensors. Native are float32 tensors on a CPU, each in
one piece.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dnw.kernels._library import INT64, POINTER, UINT32, address, load

_VERSION = 4
_FUNCTIONS = {
    "masked": (POINTER, POINTER, POINTER, INT64),
    "finite": (POINTER, INT64),
    "take": (POINTER, POINTER, POINTER, POINTER, INT64, UINT32, UINT32, POINTER, INT64, POINTER, POINTER),
    "take_n_of_m": (POINTER, POINTER, POINTER, INT64, INT64, UINT32, UINT32, POINTER),
    "groups": (),
    "pack": (POINTER, INT64, POINTER),
    "tally": (POINTER, POINTER, POINTER, INT64, POINTER),
    "dead": (POINTER, INT64, INT64, INT64, INT64, POINTER, POINTER),
}
"""The functions of exchange.c that are called here."""


@cache
def library() -> ctypes.CDLL | None:
    """The native code; None where it is not built, or not for this version."""
    return load(Path(__file__).parent, "_exchange_native", _VERSION, _FUNCTIONS)


def is_native(*tensors: Tensor | None) -> bool:
    """Whether the native code takes these tensors: float32 or masks, on a CPU, in one piece."""
    return library() is not None and all(
        t is None
        or (t.device.type == "cpu" and t.dtype in (torch.float32, torch.bool) and t.is_contiguous() and not t.is_neg())
        for t in tensors
    )


def masked(values: Tensor, mask: Tensor, out: Tensor, *, check: bool = True, check_all: bool = False) -> bool:
    """Writes values where a mask holds, else 0, to ``out``.

    Args:
        values, mask, out: of one shape; the mask is boolean.
        check: whether to look at what is written.
        check_all: whether to look at all values.

    Returns:
        Whether what was looked at is finite; true where nothing was.
    """
    lib, values = library(), values.detach()
    if lib is not None and is_native(values, mask, out):
        finite = bool(lib.dnw_masked(address(values), address(mask), address(out), values.numel()))
    else:
        torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device), out=out)
        finite = not check or is_finite(out)
    return (finite or not check) and (not check_all or is_finite(values))


def is_finite(values: Tensor) -> bool:
    """Whether all values are finite."""
    lib = library()
    if lib is not None and is_native(values) and values.dtype == torch.float32:
        return bool(lib.dnw_finite(address(values), values.numel()))
    # one pass and no temporaries, as a rule; finite numbers may well add up to infinity
    total = values.sum(dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)
    return bool(total.isfinite()) or bool(values.isfinite().all())


def take(
    held: Tensor, latent: Tensor, active: Tensor, candidates: Tensor | None, low: int, high: int, taken: Tensor
) -> tuple[int, Tensor]:
    """Makes what a parameter holds its latent weights; candidates of at least a magnitude become active, the others 0 in it.

    Args:
        held, latent: of one shape.
        active, candidates: masks of that shape; the former is written. None where every entry is a candidate.
        low, high: magnitudes, as bits of a float32.
        taken: one number, int64: how many entries of ``latent`` are taken over, whenever this is interrupted.

    Returns:
        How many candidates lie above ``high``, and the flat indices of those from ``low`` to ``high``, in order.
    """
    lib = library()
    size = held.numel()
    if lib is None or not is_native(held, latent, active, candidates):
        return _take(held.view(-1), latent.view(-1), active.view(-1), candidates, low, high, taken)
    indices, found = (torch.empty(n, dtype=torch.int64, device="cpu") for n in (size // 16 + 64, 2))
    masks = address(active), address(candidates)
    room = address(indices), len(indices)
    lib.dnw_take(address(held), address(latent), *masks, size, low, high, *room, address(found), address(taken))
    above, between = found.tolist()
    if between > len(indices):  # there was no room for all of them
        indices = _between(latent.view(-1), candidates, low, high)
    return above, indices[:between]


_PIECE = 1 << 17
"""Entries at a time: what fits into a second-level cache with all that is made of them."""


def _take(
    held: Tensor, latent: Tensor, active: Tensor, candidates: Tensor | None, low: int, high: int, taken: Tensor
) -> tuple[int, Tensor]:
    above, indices = 0, []
    for start in range(0, len(held), _PIECE):
        piece, stop = held[start : start + _PIECE], min(start + _PIECE, len(held))
        latent[start:stop].copy_(piece)
        taken.fill_(stop)  # from here on the piece may be overwritten
        bits = piece.view(torch.int32) & 0x7FFF_FFFF
        if candidates is not None:
            bits.masked_fill_(~candidates.view(-1)[start:stop], -1)
        chosen = torch.ge(bits, low, out=active[start:stop])
        over = bits > high
        above += int(over.count_nonzero())
        indices.append((over ^ chosen).nonzero().squeeze(1) + start)
        piece.masked_fill_(~chosen, 0)
    return above, torch.cat(indices)


def _between(latent: Tensor, candidates: Tensor | None, low: int, high: int) -> Tensor:
    bits = latent.view(torch.int32) & 0x7FFF_FFFF
    between = (bits >= low) & (bits <= high)
    return (between if candidates is None else between & candidates.view(-1)).nonzero().squeeze(1)


def takes_n_of_m(held: Tensor, latent: Tensor, active: Tensor, m: int) -> bool:
    """Whether :func:`take_n_of_m` takes these tensors."""
    lib = library()
    if lib is None or not is_native(held, latent, active) or not held.numel():
        return False
    return m * held[0, 0].numel() <= lib.dnw_groups()


def take_n_of_m(held: Tensor, latent: Tensor, active: Tensor, n: int, m: int, taken: Tensor) -> None:
    """Makes what a parameter holds its latent weights; of every m sources the n largest become active, the others 0 in it.

    Args:
        held, latent, active: of one shape ``[targets, sources, ...]``, and such as :func:`takes_n_of_m` says.
        n, m: of m consecutive sources n, at each place of a kernel; among equals the first.
        taken: as for :func:`take`.
    """
    lib = library()
    assert lib is not None
    sizes = held.numel(), held[0, 0].numel()
    lib.dnw_take_n_of_m(address(held), address(latent), address(active), *sizes, n, m, address(taken))


def packed(mask: Tensor) -> Tensor:
    """A mask, 64 entries to a word, the first in the lowest bit: int64."""
    lib, size = library(), mask.numel()
    if lib is not None and is_native(mask):
        words = torch.empty(-(-size // 64), dtype=torch.int64, device="cpu")
        lib.dnw_pack(address(mask), size, address(words))
        return words
    flat = torch.cat([mask.reshape(-1), mask.new_zeros(-size % 64)]).view(-1, 64).to(torch.int64)
    return (flat << torch.arange(64, device=mask.device)).sum(1)


def tally(now: Tensor, then: Tensor, ever: Tensor) -> list[int]:
    """Of packed masks how many entries are now, have ever been, are now but were not then, were then but are not now.

    Args:
        now, then: packed.
        ever: packed; what is now is added to it, in place.
    """
    lib = library()
    if lib is not None and all(x.device.type == "cpu" for x in (now, then, ever)):
        counts = torch.empty(4, dtype=torch.int64, device="cpu")
        lib.dnw_tally(address(now), address(then), address(ever), len(now), address(counts))
        return counts.tolist()
    ever |= now
    bits = torch.arange(64, device=now.device)
    return [int(((words.unsqueeze(1) >> bits) & 1).sum()) for words in (now, ever, now & ~then, then & ~now)]


def dead(mask: Tensor, groups: int) -> tuple[int, int]:
    """Targets, and sources of a group of targets, without edges in a mask ``[targets, sources, ...]``."""
    lib = library()
    if lib is not None and is_native(mask):
        kernel = math.prod(mask.shape[2:])
        seen = torch.empty(mask.shape[1], dtype=torch.uint8, device="cpu")
        found = torch.empty(2, dtype=torch.int64, device="cpu")
        sizes = (groups, mask.shape[0] // groups, mask.shape[1], kernel)
        lib.dnw_dead(address(mask), *sizes, address(seen), address(found))
        targets, sources = found.tolist()
        return targets, sources
    reads = mask.flatten(2).any(2) if mask.ndim > 2 else mask
    read = reads.unflatten(0, (groups, -1)).any(1)
    return int((~reads.any(1)).count_nonzero()), int((~read).count_nonzero())
