"""Which multiply-adds of a run lie between live channels: those that depend on an input and that an output depends on.

Contract: what is counted dead has no effect, for any values of the weights that are active edges. The run is walked forwards to
find what is reached, with one boolean per element of memory, so that views and writing in place need no care; then backwards
to find what is wanted. A constant (a bias, a state that starts at 0) is not reached. What is called live without looking: all
positions and images of a channel where one is, so that a kernel's edge at the border counts as in the middle; all outputs
of an operation that is not known here, where anything reaches it, and all its inputs, where anything of it is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnw.count._dependence import ATTENTION, MATRIX, Convolution, Matrix, dependence_of, packets
from dnw.count._ledger import Operation, storage
from dnw.count._marks import Marks

_KEEPING_ZEROS = packets("_to_copy", "clone", "neg", "mul", "div", "_weight_norm_interface")


def products_of_edges(
    run: Sequence[Operation], masks: Mapping[Tensor, Tensor], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> tuple[dict[str, int], dict[str, int]]:
    """Multiply-adds of active edges, and those of active edges between live channels, by the owner of the products.

    Args:
        run: the operations, in order.
        masks: active edges, by the parameter as it took part in the run.
        inputs, outputs: of the run.
    """
    walk = _Walk(masks)
    for tensor in inputs:
        walk.reached.write(tensor, torch.ones(tensor.shape, dtype=torch.bool))
    last = {storage(tensor): i for i, operation in enumerate(run) for tensor in (*operation.sources, *operation.outputs)}
    visits = []
    for i, operation in enumerate(run):
        visits.append(walk.forward(operation))
        walk.reached.drop(key for t in (*operation.sources, *operation.outputs) if last[key := storage(t)] == i)
    for tensor in outputs:
        walk.wanted.write(tensor, torch.ones(tensor.shape, dtype=torch.bool))
    for visit in reversed(visits):
        walk.backward(visit)
    nominal: dict[str, int] = {}
    live: dict[str, int] = {}
    for operation in run:
        if operation.products:
            nominal[operation.owner] = nominal.get(operation.owner, 0) + walk.nominal(operation)
            live[operation.owner] = live.get(operation.owner, 0) + walk.live(operation)
    return nominal, live


@dataclass(frozen=True, eq=False)
class _Visit:
    """An operation on the way forwards: what it depends on, how, and what of that the way back needs."""

    operation: Operation
    sources: list[Tensor]
    dependence: Any
    reached: list[Tensor | None]


class _Walk:
    """The marks, and what the dependences do with them."""

    def __init__(self, masks: Mapping[Tensor, Tensor]) -> None:
        self.reached, self.wanted, self.active, self.live_entries = Marks(), Marks(), Marks(), Marks()
        for parameter, mask in masks.items():
            self._set_active(parameter, mask)
        self._live_fractions: dict[Operation, float] = {}

    def forward(self, op: Operation) -> _Visit:
        sources, dependence = dependence_of(op, self.reached, self.active)
        reached = [self.reached.read(s) for s in sources]
        reached = [r.clone() if r is not None and bool(r.any()) else None for r in reached]
        if all(r is None for r in reached):
            self._derive(op)
            found: list[Tensor | None] = [None] * len(op.outputs)
        else:
            found = [dependence.forward(reached, out) for out in op.outputs]
        for out, marks in zip(op.outputs, found, strict=True):
            self.reached.write(out, marks)
        return _Visit(op, sources, dependence, [None if r is None else dependence.kept(r, i) for i, r in enumerate(reached)])

    def backward(self, visit: _Visit) -> None:
        op, reached = visit.operation, visit.reached
        wanted = [self.wanted.read(out) for out in op.outputs]
        wanted = [w.clone() if w is not None and bool(w.any()) else None for w in wanted]
        for out in op.outputs:  # what was there before is not what is wanted
            self.wanted.write(out, None)
        if all(w is None for w in wanted) or all(r is None for r in reached):
            return
        if op.products:
            self._find_live(visit, wanted)
        for source, marks, r in zip(visit.sources, visit.dependence.backward(visit.sources, wanted), reached, strict=True):
            if r is not None and marks is not None:
                self.wanted.write(source, marks, add=True)

    def _set_active(self, weight: Tensor, mask: Tensor) -> None:
        self.active.write(weight, torch.ones(weight.shape, dtype=torch.bool))  # a mask without edges is one, too
        self.active.write(weight, mask)

    def _derive(self, op: Operation) -> None:
        """Of a weight that is made of masked ones (by a cast, another mask, a scale): its active edges."""
        known = [mask for s in op.sources if (mask := self.active.read(s)) is not None]
        if known and op.func._overloadpacket in _KEEPING_ZEROS:
            mask = torch.ones(op.outputs[0].shape, dtype=torch.bool)
            for m in known:
                mask = mask & m
            self._set_active(op.outputs[0], mask)

    def _find_live(self, visit: _Visit, wanted: list[Tensor | None]) -> None:
        op, dependence = visit.operation, visit.dependence
        if isinstance(dependence, (Matrix, Convolution)):
            weight, marks = dependence.live_entries(visit.reached, wanted)
            if weight is not None:
                active = self.active.read(weight)
                self.live_entries.write(weight, marks if active is None else marks & active, add=True)
                return
        fraction = 1.0
        packet = op.func._overloadpacket
        if wanted[0] is not None and wanted[0].ndim > 2 and (packet in MATRIX or packet in ATTENTION):  # heads
            found = dependence.forward(visit.reached, op.outputs[0]) & wanted[0]
            fraction = float(found.flatten(0, -3).flatten(1).any(1).float().mean())
        self._live_fractions[op] = fraction

    def nominal(self, op: Operation) -> int:
        """Multiply-adds of active edges."""
        known = [(s, mask) for s in op.operands if (mask := self.active.read(s)) is not None]
        for weight, mask in known:
            return op.products // weight.numel() * int(mask.count_nonzero())
        return op.products

    def live(self, op: Operation) -> int:
        """Multiply-adds of active edges between live channels."""
        if op.is_constant:
            return self.nominal(op)
        if op in self._live_fractions:
            return round(self.nominal(op) * self._live_fractions[op])
        for weight in op.operands:
            marks = self.live_entries.read(weight)
            if marks is not None and weight.numel():
                return op.products // weight.numel() * int(marks.count_nonzero())
        return 0
