"""Which edges are active: the k largest magnitudes, exactly.

Contract: ``top_k_each`` is the only place where scores become edge sets. It is exact: k active edges are k, with ties, with
all-equal and with all-zero scores. Among equal magnitudes the lowest flat index wins, on every device, in every dtype and
however the tensors are spread over processes.

Two ways lead there. On a CPU each pool is ranked by itself, inside a bracket that a sample gives. On accelerators and for
sharded tensors, histograms of the magnitudes' bits find the k-th largest of all pools at once: shapes are fixed, nothing
waits for the device, and between processes only the histograms travel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from dnw._selection.layout import TARGETS_FIRST, Layout
from dnw._selection.shards import Shard


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores that compete for one budget.

    Attributes:
        scores: one tensor per layer, of any shape; ranked by magnitude.
        k: number of active edges over all layers, from 1 to the number of candidates.
        candidates: one boolean mask per layer, of the shape of its scores, or None where every entry is a candidate.
        shards: for each layer the part of it that the scores are, or None where they are the whole.
        spread: for each layer what makes its edge set of a mask of the shape of its scores, where those are not of edges.
        least: for each layer how many of its entries are chosen at least; none where it is empty.
        least_per_target, least_per_source: the same for each target, and for each source.
        layouts: for each layer which dimensions of its scores are targets; the first where it is empty.
    """

    scores: Sequence[Tensor]
    k: int
    candidates: Sequence[Tensor | None]
    shards: Sequence[Shard | None] = ()
    spread: Sequence[Callable[[Tensor], Tensor]] = ()
    least: Sequence[int] = ()
    least_per_target: Sequence[int] = ()
    least_per_source: Sequence[int] = ()
    layouts: Sequence[Layout] = ()

    @property
    def shard(self) -> Shard | None:
        """How the scores are spread over processes."""
        return self.shards[0] if self.shards else None

    def bits(self) -> Tensor:
        """The magnitudes of all layers as flat integers; -1 where there is no candidate."""
        dtype = torch.float64 if any(s.dtype == torch.float64 for s in self.scores) else torch.float32
        flat = []
        for score, candidate in zip(self.scores, self.candidates, strict=True):
            bits = magnitude_bits(score.detach().to(dtype))
            flat.append((bits if candidate is None else bits.masked_fill_(~candidate, -1)).reshape(-1))
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def split(self, mask: Tensor) -> list[Tensor]:
        """A flat mask over all layers as one mask per layer, of the shape of its scores."""
        parts = mask.split([s.numel() for s in self.scores])
        return [part.view(score.shape) for part, score in zip(parts, self.scores, strict=True)]

    def spread_out(self, masks: list[Tensor]) -> list[Tensor]:
        """The edge sets of masks of the shapes of the scores."""
        return [spread(mask) for spread, mask in zip(self.spread, masks, strict=True)] if self.spread else masks

    def totals(self, masks: Sequence[Tensor]) -> list[int]:
        """How many entries of each layer are true, over all processes."""
        counts = torch.stack([mask.count_nonzero() for mask in masks])
        return (counts if self.shard is None else self.shard.sum(counts)).tolist()

    def flat_index(self, index: Tensor) -> Tensor:
        """Local flat indices over all layers as flat indices over all whole layers."""
        result = torch.empty_like(index)
        start = whole = 0
        for score, shard in zip(self.scores, self.shards, strict=True):
            assert shard is not None
            here = (index >= start) & (index < start + score.numel())
            result[here] = shard.flat_index(index[here] - start) + whole
            start, whole = start + score.numel(), whole + math.prod(shard.shape)
        return result


def top_k(scores: Sequence[Tensor], k: int, candidates: Sequence[Tensor | None]) -> list[Tensor]:
    """The edge sets of the k candidates of largest |score|, over all the given tensors together.

    Args:
        scores: one tensor per layer, of any shape; ranked by magnitude.
        k: number of active edges over all layers, from 1 to the number of candidates.
        candidates: one boolean mask per layer, of the shape of its scores, or None where every entry is a candidate.

    Returns:
        One boolean mask per layer, k of whose entries are true in all. Among equal magnitudes the lowest flat index of
        the earliest layer wins.
    """
    return top_k_each([Ranking(scores, k, candidates)])[0]


def top_k_each(rankings: Sequence[Ranking]) -> list[list[Tensor]]:
    """:func:`top_k` of several rankings at once, batched wherever launches or messages between processes count.

    Where a ranking says what each layer, target or source has at least, those have their largest entries first, and the
    largest of all others fill the budget.
    """
    rankings = [_of_nodes_first(ranking) for ranking in rankings]
    masks = _largest_each(rankings)
    return [ranking.spread_out(_of_layers_first(ranking, chosen)) for ranking, chosen in zip(rankings, masks, strict=True)]


def _of_nodes_first(ranking: Ranking) -> Ranking:
    """The same with infinite scores where an entry is among those that its target, or its source, keeps."""
    none = [0] * len(ranking.scores)
    of_targets, of_sources = ranking.least_per_target or none, ranking.least_per_source or none
    if not any(of_targets) and not any(of_sources):
        return ranking
    layouts = ranking.layouts or [TARGETS_FIRST] * len(ranking.scores)
    scores = []
    for score, among, targets, sources, layout in zip(
        ranking.scores, ranking.candidates, of_targets, of_sources, layouts, strict=True
    ):
        bits = magnitude_bits(score.detach()) if targets or sources else None
        bits = bits if bits is None or among is None else bits.masked_fill_(~among, -1)
        if targets and bits is not None:
            score = score.masked_fill(layout.from_targets(largest_of_each(layout.by_target(bits), targets)), math.inf)
        if sources and bits is not None:
            score = score.masked_fill(layout.from_sources(largest_of_each(layout.by_source(bits), sources)), math.inf)
        scores.append(score)
    return replace(ranking, scores=scores)


def _largest_each(rankings: Sequence[Ranking]) -> list[list[Tensor]]:
    """Of each ranking the k largest, as masks of the shapes of the scores."""
    results: list[list[Tensor]] = [[] for _ in rankings]
    batches: dict[tuple, list[int]] = {}
    for i, ranking in enumerate(rankings):
        device, shard = ranking.scores[0].device, ranking.shard
        if device.type == "cpu" and shard is None:
            results[i] = ranking.split(largest(ranking.bits(), ranking.k))
        else:
            wide = any(s.dtype == torch.float64 for s in ranking.scores)
            groups = () if shard is None else tuple(map(id, shard.groups))
            batches.setdefault((device, wide, shard is None, groups), []).append(i)
    for members in batches.values():
        batch = [rankings[i] for i in members]
        for i, ranking, mask in zip(members, batch, _rank_by_histograms(batch), strict=True):
            results[i] = ranking.split(mask)
    return results


def _of_layers_first(ranking: Ranking, chosen: list[Tensor]) -> list[Tensor]:
    """What was chosen, unless a layer has too few of it: then the largest of each layer come first."""
    if not any(ranking.least) or all(n >= least for n, least in zip(ranking.totals(chosen), ranking.least, strict=True)):
        return chosen
    floors = [(i, least) for i, least in enumerate(ranking.least) if least]
    shards = ranking.shards or [None] * len(chosen)
    of_layer = [
        Ranking([ranking.scores[i]], least, [ranking.candidates[i]], [shards[i]] if ranking.shards else ())
        for i, least in floors
    ]
    scores = list(ranking.scores)
    for (i, _), (mask,) in zip(floors, _largest_each(of_layer), strict=True):
        scores[i] = scores[i].masked_fill(mask, math.inf)
    return _largest_each([replace(ranking, scores=scores)])[0]


_PASSES = 8
"""Largest entries of a row that are found by a pass over them each; more are found by sorting."""


def largest_of_each(bits: Tensor, least: int) -> Tensor:
    """A mask of the largest entries of each row, the first dimension, the lowest indices first among equals; -1 is none."""
    rows = bits.flatten(1)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    if least <= _PASSES:
        for _ in range(min(least, rows.shape[1])):
            values, first = rows.max(dim=1, keepdim=True)
            mask.scatter_(1, first, mask.gather(1, first) | (values >= 0))
            rows = rows.scatter(1, first, -1)
    else:
        mask.scatter_(1, rows.sort(dim=1, descending=True, stable=True).indices[:, :least], True)
        mask &= rows >= 0
    return mask.view(bits.shape)


def magnitude_bits(values: Tensor) -> Tensor:
    """The bits of |values| as integers, which are ordered as the magnitudes are.

    Integers compare exactly whatever the floating-point mode, and denormals stay apart. Half precision is widened to
    float32 first, which is exact. NaN ranks above infinity: callers refuse non-finite values.
    """
    if values.dtype == torch.float64:
        return values.contiguous().view(torch.int64) & 0x7FFF_FFFF_FFFF_FFFF
    return values.to(torch.float32).contiguous().view(torch.int32) & 0x7FFF_FFFF


# --- one pool on a CPU -----------------------------------------------------------------------------------------------

_SAMPLE = 1 << 16


def largest(bits: Tensor, k: int) -> Tensor:
    """A flat mask of the k largest entries of a flat integer tensor on a CPU, the lowest indices first among equals."""
    threshold = _kth_largest(bits, k)
    mask = bits >= threshold
    surplus = int(mask.count_nonzero()) - k
    if surplus:  # ties at the k-th magnitude: those of highest index go
        ties = (bits == threshold).nonzero().squeeze(1)
        mask[ties[-surplus:]] = False
    return mask


def _kth_largest(bits: Tensor, k: int) -> Tensor:
    """The k-th largest entry of a flat integer tensor, without sorting it.

    A strided sample of 65,536 entries gives a bracket that holds the k-th largest with near certainty; only the few per
    cent of entries inside the bracket are then ranked. Where the bracket misses, everything is ranked: the result is
    exact either way.
    """
    n = bits.numel()
    if n > 4 * _SAMPLE:
        stride = (n // _SAMPLE) | 1
        sample = bits[::stride].sort(descending=True).values
        m, fraction = sample.numel(), k / n
        middle, margin = round(fraction * m), math.ceil(5 * math.sqrt(m * fraction * (1 - fraction))) + 5
        high = sample[middle - margin] if middle > margin else None
        low = sample[middle + margin] if middle + margin < m else None
        above = int((bits > high).count_nonzero()) if high is not None else 0
        inside = bits
        if low is not None:
            inside = bits[(bits >= low) & (bits <= high)] if high is not None else bits[bits >= low]
        elif high is not None:
            inside = bits[bits <= high]
        if above < k <= above + inside.numel():
            return inside.kthvalue(inside.numel() - (k - above) + 1).values
    return bits.kthvalue(n - k + 1).values


# --- many pools at once, on an accelerator or over processes ---------------------------------------------------------

_DIGIT = 11
"""Bits that one histogram tells apart: 2,048 bins a pool."""
_SPARE = 1 << 8
"""Bins for the entries that a histogram does not count."""
_PIECE = 1 << 23
"""Entries that one histogram is made of at a time, which bounds the memory it takes."""


def _rank_by_histograms(rankings: Sequence[Ranking]) -> list[Tensor]:
    """Flat masks of the k largest of each ranking; all rankings are on one device and spread over the same processes."""
    bits = [ranking.bits() for ranking in rankings]
    shard = rankings[0].shard
    ks = tuple(ranking.k for ranking in rankings)
    threshold, take, equal = _kth_by_histograms(bits, ks, 63 if bits[0].dtype == torch.int64 else 31, shard)
    if shard is None:
        return _take_ties_in_order(bits, threshold, take)
    if torch.equal(take, equal):
        return [b >= t for b, t in zip(bits, threshold, strict=True)]
    masks = [b > t for b, t in zip(bits, threshold, strict=True)]
    # Among ties those of lowest flat index win. They may lie on any process, so that index is ranked in the same way.
    ties = [(b == t).nonzero().squeeze(1) for b, t in zip(bits, threshold, strict=True)]
    size = max(sum(math.prod(s.shape) for s in r.shards if s is not None) for r in rankings)
    order = [size - r.flat_index(tie) for r, tie in zip(rankings, ties, strict=True)]
    last, _, _ = _kth_by_histograms(order, tuple(take.tolist()), size.bit_length(), shard)
    for mask, tie, index, bound in zip(masks, ties, order, last, strict=True):
        mask[tie[index >= bound]] = True
    return masks


def _kth_by_histograms(
    bits: Sequence[Tensor], ks: tuple[int, ...], num_bits: int, shard: Shard | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k-th largest of each tensor of non-negative integers (-1 does not count), digit by digit from the top.

    Returns:
        Of each tensor the k-th largest entry, how many of the entries equal to it are among the k, and how many such entries
        there are: three tensors ``[tensors]`` on the tensors' device.
    """
    device, dtype = bits[0].device, bits[0].dtype
    found = torch.zeros(len(bits), dtype=dtype, device=device)
    need = equal = _constant(ks, device)
    pieces = [_Piece.of(members, bits) for members in _pieces([b.numel() for b in bits])]
    shift = num_bits
    while shift > 0:
        width = min(_DIGIT, shift)
        shift -= width
        bins = 1 << width
        counts = torch.zeros(len(bits) * bins + _SPARE, dtype=torch.int64, device=device)
        for piece in pieces:
            piece.count(counts, found, shift, width)
        if shard is not None:
            shard.sum(counts)
        reaching = counts[:-_SPARE].view(len(bits), bins).flip(1).cumsum(1).flip(1)  # entries whose digit is at least this
        digit = (reaching >= need[:, None]).sum(1, keepdim=True) - 1
        above = torch.cat([reaching, torch.zeros_like(reaching[:, :1])], 1).gather(1, digit + 1)
        equal = (reaching.gather(1, digit) - above).squeeze(1)
        need = need - above.squeeze(1)
        found = (found << width) | digit.squeeze(1).to(dtype)
    return found, need, equal


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some of the tensors, end to end."""

    first: int
    sizes: tuple[int, ...]
    bits: Tensor

    @classmethod
    def of(cls, members: range, bits: Sequence[Tensor]) -> _Piece:
        parts = [bits[i] for i in members]
        return cls(members.start, tuple(p.numel() for p in parts), parts[0] if len(parts) == 1 else torch.cat(parts))

    def spread(self, values: Tensor) -> Tensor:
        """One value per tensor as one value per entry."""
        mine = values[self.first : self.first + len(self.sizes)]
        if len(self.sizes) == 1:
            return mine
        sizes = _constant(self.sizes, values.device)
        return mine.repeat_interleave(sizes, output_size=self.bits.numel())

    def count(self, counts: Tensor, found: Tensor, shift: int, width: int) -> None:
        """Adds how often each value of the digit occurs among the entries that begin as the k-th largest does."""
        bins = 1 << width
        start = self.spread(torch.arange(len(found), device=counts.device) * bins)
        bin_ = ((self.bits >> shift) & (bins - 1)).to(torch.int64) + start
        # Of -1 every bit is set, so its beginning is never that of a magnitude. What does not count is spread over many
        # bins, because writing to one of them over and over is slow.
        elsewhere = (self.bits & (_SPARE - 1)).to(torch.int64) + (len(counts) - _SPARE)
        bin_ = torch.where((self.bits >> (shift + width)) == self.spread(found), bin_, elsewhere)
        if counts.device.type == "cpu":
            counts += torch.bincount(bin_, minlength=len(counts))
        else:
            counts.index_add_(0, bin_, _ones(bin_.numel(), counts.device))


def _take_ties_in_order(bits: Sequence[Tensor], threshold: Tensor, take: Tensor) -> list[Tensor]:
    """Masks of what lies above the threshold of each tensor and of the first ``take`` entries equal to it."""
    masks: list[Tensor] = []
    for members in _pieces([b.numel() for b in bits]):
        piece = _Piece.of(members, bits)
        limit = piece.spread(threshold)
        tied = piece.bits == limit
        rank = tied.cumsum(0, dtype=torch.int32 if tied.numel() < 1 << 31 else torch.int64)
        ends = _constant(piece.sizes, rank.device).cumsum(0) - 1
        before = torch.cat([torch.zeros_like(rank[:1]), rank.index_select(0, ends)])[:-1]
        allowed = take[members.start : members.stop] + before
        within = _Piece(0, piece.sizes, piece.bits).spread(allowed)
        mask = (piece.bits > limit) | (tied & (rank <= within))
        masks += mask.split(list(piece.sizes))
    return masks


def _pieces(sizes: Sequence[int]) -> Iterator[range]:
    """Runs of tensors of at most ``_PIECE`` entries together, or one larger tensor alone."""
    cuts, total = [0], 0
    for i, size in enumerate(sizes):
        if i > cuts[-1] and total + size > _PIECE:
            cuts.append(i)
            total = 0
        total += size
    return (range(a, b) for a, b in pairwise([*cuts, len(sizes)]))


@lru_cache(maxsize=64)
def _constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """A small tensor that is copied to the device once: such a copy waits for it."""
    return torch.tensor(values, dtype=torch.int64, device=device)


def _ones(size: int, device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.int64, device=device).expand(size)
