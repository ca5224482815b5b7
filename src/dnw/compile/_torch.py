"""Operators that no instruction stands for: PyTorch runs them, one by one, on what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnw.compile._program import Facts, Instruction, Size, _require, every
from dnw.compile._views import BATCH, View

EXACT = 1 << 24
"""Whole numbers below are exact in float32, as which they are handed on."""
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""What PyTorch writes for numbers that depend on the batch."""


def numbers(symbol: Any, batches: Mapping[Any, int]) -> Any:
    """The number that a symbol is for some batch."""
    found = symbol.node.expr.subs(batches)
    if not found.is_number and found not in (True, False):
        raise ValueError("sizes that depend on the numbers in a tensor are not compiled")
    if isinstance(symbol, torch.SymInt):
        return int(found)
    return float(found) if isinstance(symbol, torch.SymFloat) else bool(found)


@dataclass(frozen=True, eq=False)
class Spread:
    """A constant for one image, that is repeated for each of a batch.

    Attributes:
        tensor: of a batch of one.
        at: which dimension the batch is.
    """

    tensor: Tensor
    at: int

    def of(self, batch: int) -> Tensor:
        return self.tensor.expand([batch if i == self.at else n for i, n in enumerate(self.tensor.shape)])


@dataclass(frozen=True, eq=False)
class Cast:
    """A view of what PyTorch has as whole numbers, or as truth values."""

    view: View
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Foreign(Instruction):
    """One operator of PyTorch.

    Attributes:
        target: what is called.
        args, kwargs: with what; views where values belong, of the number that they have among those that are read, and sizes
            that may depend on the batch.
        reads: how many values are read.
        size: of what it makes, without the batch.
        at: which dimension of that the batch is.
        item: which of several results it is.
        batches: the symbols of the batch in sizes.
    """

    target: Any
    args: Any
    kwargs: Any
    reads: int
    size: Size
    at: int
    item: int | None
    batches: tuple[Any, ...]

    @property
    def name(self) -> str:
        return str(self.target).removeprefix("aten.").split(".")[0]

    def __call__(self, *inputs: Tensor) -> Tensor:
        dtype, batch = inputs[0].dtype, len(inputs[0])

        def filled(leaf: Any) -> Any:
            if isinstance(leaf, Cast):
                return seen(inputs[leaf.view.value], leaf.view).to(leaf.dtype)
            if isinstance(leaf, View):
                return seen(inputs[leaf.value], leaf)
            if isinstance(leaf, Spread):
                leaf = leaf.of(batch).clone()
            if isinstance(leaf, SYMBOLS):
                return numbers(leaf, dict.fromkeys(self.batches, batch))
            return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        args, kwargs = pytree.tree_map(filled, (self.args, self.kwargs), is_leaf=lambda x: isinstance(x, (View, Cast)))
        made = self.target(*args, **kwargs)
        made = made if self.item is None else made[self.item]
        if made.numel() and not (made.is_floating_point() or made.dtype == torch.bool):
            low, high = int(made.min()), int(made.max())
            if max(-low, high) >= EXACT:
                raise ValueError(f"{self.name}: whole numbers from {low} to {high}; they are handed on exactly up to 2^24")
        return made.movedim(self.at, 0).reshape(batch, *self.size).to(dtype)

    def check(self, *sizes: Size) -> Size:
        _require(len(sizes) == self.reads, f"{len(sizes)} values for {self.name}")
        return self.size

    def varying(self, *facts: Facts) -> Tensor:
        return torch.ones(self.size[0] if self.size else 1, dtype=torch.bool)

    def settled(self, taken: list[Tensor], sent: Tensor, facts: Sequence[Facts]) -> tuple[list[Tensor], Tensor]:
        return every(*taken), every(sent)[0]


def seen(value: Tensor, view: View) -> Tensor:
    """A value ``[batch, *size]`` as the tensor that a view shows."""
    batch = len(value)
    split = value.reshape(batch, *(n for _, n in view.atoms))
    order = [0 if i == BATCH else 1 + i for dim in view.dims for i in dim]
    shape = [batch if dim == (BATCH,) else view.length(dim) * (batch if BATCH in dim else 1) for dim in view.dims]
    return split.permute(order).reshape(shape)
