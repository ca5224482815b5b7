"""The program that an exported model becomes, as it grows, and how its values lie as PyTorch sees them.

Contract: nothing is left out yet (_shrink.py). Operators of PyTorch have one handler each, by name, which appends instructions
(_shapes.py, _operators.py); one that raises ``NotCompiled``, or whose instructions do not fit, leaves the operator to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from dnw.compile._layers import Crop, Rearrange
from dnw.compile._program import Instruction, Node, Pick, Program, Size
from dnw.compile._views import BATCH, View

PRIME = 1_000_003
"""Stands for the batch where sizes are worked out: it divides no other size."""


class NotCompiled(Exception):
    """What no instruction stands for; it stays with PyTorch."""


class OverImages(Exception):
    """What is no network on images one by one."""


class Traced:
    """A program as it grows.

    Attributes:
        nodes, sizes: of the program; of each value its size.
        outputs: the values that are returned.
        where: the module that the present node comes from.
        batches: the symbols of the batch, one for each input that PyTorch has not seen meet others, with what they count as.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.sizes: list[Size] = []
        self.outputs: list[int] = []
        self.where = ""
        self.batches = dict[Any, int]()

    def program(self) -> Program:
        sizes = tuple(self.sizes[: len(self.sizes) - len(self.nodes)])
        return Program(tuple(self.nodes), sizes, tuple(self.outputs))

    def emit(self, instruction: Instruction, *reads: int) -> int:
        """Appends an instruction; returns the number of what it makes."""
        size = instruction.check(*(self.sizes[i] for i in reads))
        self.nodes.append(Node(instruction, reads, self.where))
        self.sizes.append(size)
        return len(self.sizes) - 1

    def resized(self, value: int, size: Size) -> int:
        """The same numbers in the same order, as a size."""
        axes = self.sizes[value]
        return value if axes == size else self.emit(Rearrange(axes, tuple(range(len(axes))), size), value)

    def view(self, value: int) -> View:
        """Of a value as it is."""
        return View.of(value, self.sizes[value])

    def shown(self, value: int, size: Size) -> View:
        """Of a value as a tensor ``[batch, *size]``; where that is a number, the value has one channel."""
        return View.of(value, size) if size else View(value, (), ((BATCH,),))

    def shape(self, node: fx.Node | Any) -> tuple[int, ...]:
        """Of what a node makes; the batch counts as ``PRIME``."""
        return tuple(self.number(n) for n in node.meta["val"].shape)

    def number(self, n: Any) -> int:
        found = n if isinstance(n, int) else n.node.expr.subs(self.batches)
        if not isinstance(found, int) and not found.is_number:
            raise ValueError(f"{self.where or 'the model'}: sizes that depend on the numbers in a tensor are not compiled")
        return int(found)

    # --- how values lie ---

    def raw(self, view: View) -> View:
        """The same, as a value that lies as the tensor does: the batch, then its dimensions."""
        return self.rearranged(view, range(1, len(view.dims)))

    def rearranged(self, view: View, order: Sequence[int]) -> View:
        """A value with some of the dimensions as its axes, in an order; the view on it is as before."""
        if any(BATCH in dim[1:] for dim in view.dims):
            raise NotCompiled
        parts = [tuple(i for i in view.dims[d] if i != BATCH) for d in order]
        split = tuple(n for _, n in view.atoms) or (1,)
        atoms = [i for part in parts for i in part] or [0]
        size = tuple(view.length(part) for part in parts) or (1,)
        value = view.value
        if tuple(atoms) == tuple(range(len(split))):
            value = self.resized(value, size)
        else:
            value = self.emit(Rearrange(split, tuple(atoms), size), value)
        places = {d: (i,) for i, d in enumerate(order)}
        dims = tuple((*((BATCH,) if BATCH in dim else ()), *places.get(i, ())) for i, dim in enumerate(view.dims))
        return View(value, tuple(enumerate(size)), dims)._short()

    def channelled(self, view: View, dim: int) -> View:
        """The same, as a value whose channels are a dimension, in its order, and whose places are all others, in theirs."""
        rest = tuple(i for n, d in enumerate(view.dims) if n != dim for i in d if i != BATCH)
        if set(view.dims[dim]) == set(view.whole(0)) and rest == view.places:
            channels = view.whole(0)
            if view.dims[dim] == channels:
                return view
            sizes, order = [view.atoms[i][1] for i in channels], [channels.index(i) for i in view.dims[dim]]
            picked = torch.arange(self.sizes[view.value][0]).view(sizes).permute(order).flatten()
            value = self.emit(Pick(picked), view.value)
            atoms = [(0, len(picked)), *(view.atoms[i] for i in view.places)]
            at = {i: n for n, i in enumerate(view.places, 1)}
            dims = tuple(
                (0,) if n == dim else tuple(BATCH if i == BATCH else at[i] for i in d) for n, d in enumerate(view.dims)
            )
            return View(value, tuple(atoms), dims)._short()
        return self.rearranged(view, [dim, *(i for i, d in enumerate(view.dims) if i != dim and d != (BATCH,))])

    def maps(self, view: View) -> View:
        """The same, as a value ``(channels, height, width)``."""
        if len(view.dims) != 4 or view.dims[0] != (BATCH,):
            raise NotCompiled
        view = self.channelled(view, 1)
        size = tuple(view.shape[1:])
        return view if self.sizes[view.value] == size else View.of(self.resized(view.value, size), size)

    def like(self, view: View, value: int) -> View:
        """A value that lies as another one does."""
        return replace(view, value=value)

    def laid(self, constant: Tensor, view: View) -> Tensor:
        """A constant that is broadcast to a tensor, as the tensor's value lies: of its size, or with axes of length 1."""
        whole = constant.double()
        whole = whole.reshape([1] * (len(view.dims) - whole.ndim) + list(whole.shape))
        if whole.ndim != len(view.dims) or whole.shape[view.dims.index((BATCH,))] != 1:
            raise NotCompiled
        shape, order = [], []
        for dim, n in zip(view.dims, whole.shape, strict=True):
            if dim == (BATCH,):
                shape.append(1)
                order.append(BATCH)
                continue
            if n not in (1, view.length(dim)):
                raise NotCompiled
            shape += [view.atoms[i][1] if n > 1 else 1 for i in dim] if dim else []
            order += list(dim)
            if not dim and n != 1:
                raise NotCompiled
        whole = whole.reshape(shape).permute([order.index(i) for i in (BATCH, *range(len(view.atoms)))])[0]
        size, at = list[int](), 0
        for axis in range(len(self.sizes[view.value])):
            count = len(view.whole(axis))
            part = whole.shape[at : at + count]
            full = [view.atoms[i][1] for i in view.whole(axis)]
            if any(n != 1 for n in part) and list(part) != full:
                whole = whole.expand(*whole.shape[:at], *full, *whole.shape[at + count :])
                part = whole.shape[at : at + count]
            n = 1
            for p in part:
                n *= p
            size.append(n)
            at += count
        return whole.reshape(size)

    def part(self, view: View, dim: int, start: int, stop: int, step: int = 1, drop: bool = False) -> View:
        """Some of the indices along a dimension; with ``drop`` the one index, without its dimension."""
        atoms, whole = view.dims[dim], view.length(view.dims[dim])
        if atoms == (BATCH,):
            if drop or start != 0 or step != 1 or stop < PRIME:
                raise NotCompiled
            return view
        if BATCH in atoms:
            raise NotCompiled
        stop = min(stop, whole)
        if not 0 <= start < stop:
            raise NotCompiled
        if (start, stop, step) != (0, whole, 1):
            view = self._part(view, dim, start, stop, step)
        if not drop:
            return view
        return View(view.value, view.atoms, (*view.dims[:dim], *view.dims[dim + 1 :]))

    def _part(self, view: View, dim: int, start: int, stop: int, step: int) -> View:
        atoms = view.dims[dim]
        axes = {view.atoms[i][0] for i in atoms}
        count = len(range(start, stop, step))
        if axes == {0}:
            channels = view.whole(0)
            others = [i for i in channels if i not in atoms]
            index = torch.arange(self.sizes[view.value][0]).view([view.atoms[i][1] for i in channels])
            index = index.permute([channels.index(i) for i in (*atoms, *others)]).flatten(0, len(atoms) - 1)[start:stop:step]
            value = self.emit(Pick(index.flatten()), view.value)
            kept = [(0, count), *(view.atoms[i] for i in others), *(view.atoms[i] for i in view.places)]
            at = {BATCH: BATCH, **{i: n for n, i in enumerate([*others, *view.places], 1)}}
        elif len(axes) == 1 and atoms == view.whole(axis := next(iter(axes))):
            value = self.emit(Crop(axis, start, stop, step), view.value)
            left = [i for i in range(len(view.atoms)) if i not in atoms]
            kept = [(axis, count), *(view.atoms[i] for i in left)]
            at = {BATCH: BATCH, **{i: n for n, i in enumerate(left, 1)}}
            order = sorted(range(len(kept)), key=lambda n: kept[n][0])
            again = {old: new for new, old in enumerate(order)}
            dims = tuple(
                (again[0],) if n == dim else tuple(i if i == BATCH else again[at[i]] for i in d)
                for n, d in enumerate(view.dims)
            )
            return View(value, tuple(kept[n] for n in order), dims)._short()
        else:
            return self._part(
                self.rearranged(view, [i for i, d in enumerate(view.dims) if d != (BATCH,)]), dim, start, stop, step
            )
        dims = tuple((0,) if n == dim else tuple(at[i] for i in d) for n, d in enumerate(view.dims))
        return View(value, tuple(kept), dims)._short()


# --- handlers, one for each operator of PyTorch that an instruction stands for ---


Handler = Callable[..., Any]


@dataclass(frozen=True)
class Handlers:
    """Handlers of operators of ATen by their names, without the overload and without the underscore of in-place ones.

    Attributes:
        by_name: called with the program, the node of PyTorch's graph, and what that is called with: views and constants.
        becomes: of each name what the operator becomes, for the table in the docs.
        of_shapes: names of those to which the batch is only part of a shape.
    """

    by_name: dict[str, Handler] = field(default_factory=dict)
    becomes: dict[str, str] = field(default_factory=dict)
    of_shapes: set[str] = field(default_factory=set)

    def __call__(
        self, *names: str, becomes: str, of_shapes: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Makes a function the handler of operators."""

        def register(handler: Callable[..., Any]) -> Callable[..., Any]:
            self.by_name.update(dict.fromkeys(names, handler))
            self.becomes.update(dict.fromkeys(names, becomes))
            self.of_shapes.update(names if of_shapes else ())
            return handler

        return register


def need(condition: object) -> None:
    if not condition:
        raise NotCompiled
