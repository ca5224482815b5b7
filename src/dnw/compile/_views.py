"""How PyTorch sees a value of a program: which of its dimensions are channels and places, through views and permutations.

Contract: pure bookkeeping. A value of a program has sizes ``(channels, *places)``. PyTorch has the batch beside them, splits
dimensions, merges them and changes their order; none of that moves a number, so none of it becomes an instruction until
something reads the value that cannot read it as it lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dnw.compile._program import Size

BATCH = -1
"""The atom that stands for the batch."""


@dataclass(frozen=True)
class View:
    """A tensor of PyTorch as a view of a value.

    Attributes:
        value: its number in the program.
        atoms: the axes of the value, split into parts: of each the axis and how long it is, in the order in which they lie.
        dims: of each dimension of the tensor the atoms that it goes through, the outermost first.
    """

    value: int
    atoms: tuple[tuple[int, int], ...]
    dims: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, value: int, size: Size, order: Sequence[int] | None = None) -> View:
        """Of a value of a size: the batch, then its axes in an order."""
        axes = range(len(size)) if order is None else order
        found = cls(value, tuple(enumerate(size)), ((BATCH,), *((axis,) for axis in axes)))
        return found._short()

    def _short(self) -> View:
        """Without atoms of length 1."""
        kept = [i for i, (_, n) in enumerate(self.atoms) if n != 1]
        at = {BATCH: BATCH, **{old: new for new, old in enumerate(kept)}}
        dims = tuple(tuple(at[i] for i in dim if i in at) for dim in self.dims)
        return View(self.value, tuple(self.atoms[i] for i in kept), dims)

    def length(self, dim: Sequence[int]) -> int:
        """Of a dimension without the batch."""
        return math.prod(self.atoms[i][1] for i in dim if i != BATCH)

    @property
    def shape(self) -> tuple[int, ...]:
        """Without regard of the batch, which counts as 1."""
        return tuple(self.length(dim) for dim in self.dims)

    def permuted(self, order: Sequence[int]) -> View:
        return View(self.value, self.atoms, tuple(self.dims[i] for i in order))

    def reshaped(self, shape: Sequence[int], batch: int) -> View | None:
        """As a shape in which the batch counts as a number that divides nothing else; None where that moves numbers."""
        left = [i for dim in self.dims for i in dim][::-1]
        atoms, dims = list(self.atoms), list[list[int]]()
        inside = {i: [i] for i in range(len(atoms))}  # of each atom that was there, what it has been split into
        for wanted in shape:
            dim, n = list[int](), wanted
            while n > 1 and left:
                i = left.pop()
                size = batch if i == BATCH else atoms[i][1]
                if n % size == 0:
                    dim.append(i)
                    n //= size
                    continue
                if i == BATCH or size % n:
                    return None
                axis = atoms[i][0]
                atoms[i] = (axis, n)
                atoms.append((axis, size // n))
                for parts in inside.values():
                    if i in parts:
                        parts.insert(parts.index(i) + 1, len(atoms) - 1)
                dim.append(i)
                left.append(len(atoms) - 1)
                n = 1
            if n != 1:
                return None
            dims.append(dim)
        if left:
            return None
        order = [part for i in range(len(self.atoms)) for part in inside[i]]
        at = {BATCH: BATCH, **{old: new for new, old in enumerate(order)}}
        return View(self.value, tuple(atoms[i] for i in order), tuple(tuple(at[i] for i in dim) for dim in dims))._short()

    def whole(self, axis: int) -> tuple[int, ...]:
        """All atoms of an axis."""
        return tuple(i for i, (a, _) in enumerate(self.atoms) if a == axis)

    @property
    def places(self) -> tuple[int, ...]:
        """All atoms of places, in the order in which they lie."""
        return tuple(i for i, (axis, _) in enumerate(self.atoms) if axis > 0)

    def channels_at(self) -> int | None:
        """The dimension that is all the channels, in whatever order, while all others are places in theirs; None if not.

        A value of one channel has it nowhere; that counts as None too.
        """
        if not self.dims or self.dims[0] != (BATCH,):
            return None
        channels = set(self.whole(0))
        at = [i for i, dim in enumerate(self.dims) if channels and set(dim) == channels]
        rest = [i for n, dim in enumerate(self.dims[1:], 1) if n not in at for i in dim]
        return at[0] if len(at) == 1 and tuple(rest) == self.places else None

    def pattern(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """What two views have in common whose tensors lie in the same way."""
        return tuple(tuple((BATCH, 0) if i == BATCH else (i, self.atoms[i][1]) for i in dim) for dim in self.dims)
