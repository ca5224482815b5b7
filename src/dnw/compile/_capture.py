"""From any PyTorch model to a program of all its channels, by ``torch.export``.

Contract: the model is not changed. The program is what the model computes in eval mode, in double precision, with a free batch;
nothing is left out yet (_shrink.py). What no instruction stands for is kept as an operator of PyTorch.
"""

from __future__ import annotations

import inspect
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from dnw.compile._layers import (
    Activation,
    AdaptiveMean,
    Attention,
    Concat,
    Crop,
    LayerNorm,
    Pad,
    PlaceMean,
    Pool,
    Product,
    Rearrange,
    Shift,
    Sum,
)
from dnw.compile._program import (
    Affine,
    Constant,
    Convolution,
    InstanceNorm,
    Instruction,
    Linear,
    Node,
    Pick,
    Program,
    Restore,
    Size,
)
from dnw.compile._torch import EXACT, SYMBOLS, Cast, Foreign, Spread, numbers
from dnw.compile._views import BATCH, View

_PRIME = 1_000_003
"""Stands for the batch where sizes are worked out: it divides no other size."""


class NotCompiled(Exception):
    """What no instruction stands for; it stays with PyTorch."""


class _OverImages(Exception):
    """What is no network on images one by one."""


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of its parameters, and so of what it takes."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def captured(model: nn.Module, example: tuple[Tensor, ...]) -> Capture:
    """A model, in whatever mode, captured as in eval mode for inputs like the examples.

    Raises:
        ValueError: it cannot be exported, or not with a free batch.
    """
    kind = dtype_of(model)
    two = tuple(x[:1].detach().expand(2, *x.shape[1:]).clone() for x in example)
    two = tuple(x.to(kind) if x.is_floating_point() else x for x in two)
    with evaluating(model), _silence():
        try:
            return Capture(_exported(model, two))
        except _OverImages as error:
            raise ValueError(str(error)) from None


def _exported(model: nn.Module, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    shapes, reason = tuple({0: torch.export.Dim.AUTO} for _ in example), ""
    for strict in (False, True):
        try:
            found = torch.export.export(model, example, dynamic_shapes=_arguments(model, shapes), strict=strict)
        except Exception as error:  # whatever the model itself raises while it is traced
            reason = reason or f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
            continue
        if _is_free(found):
            return found.run_decompositions({})  # what is changed in place, and what is copied, becomes plain values
        reason = "its code fixes the number of images in a batch, by len(x) or int(x.shape[0]), say; x.shape[0] leaves it free"
    raise ValueError(f"the model cannot be exported by torch.export, which compiling begins with ({reason})")


def _is_free(exported: torch.export.ExportedProgram) -> bool:
    """Whether every input has a batch of any size."""
    inputs = set(exported.graph_signature.user_inputs)
    firsts = [node.meta["val"].shape[:1] for node in exported.graph.nodes if node.op == "placeholder" and node.name in inputs]
    return all(isinstance(n, torch.SymInt) and not n.node.expr.is_number for first in firsts for n in first)


def _arguments(model: nn.Module, shapes: tuple[Any, ...]) -> Any:
    """Shapes as the model's forward takes them: all in one where it takes any number of arguments."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    return (shapes,) if kinds[:1] == [inspect.Parameter.VAR_POSITIONAL] else shapes


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module is as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _silence() -> Iterator[None]:
    """What torch.export says on the way is of no use to who compiles: it either works, or its reason is in the error."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch._dynamo", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass(frozen=True)
class Given:
    """How an input of the model becomes one of the program, ``[batch, *size]`` in floating-point numbers.

    Attributes:
        size: of the model's input, without the batch.
        whole: whether it holds whole numbers, or truth values.
    """

    size: Size
    whole: bool = False

    def floats(self, x: Any, number: int) -> Any:
        """What the program takes; of inputs that do not fit what they are.

        Raises:
            ValueError: numbers of another kind, or whole ones that are not exact in float32.
        """
        if self.whole:
            x = x if isinstance(x, Tensor) else torch.as_tensor(x)
            if x.is_floating_point() or x.is_complex():
                raise ValueError(f"input {number}: expected whole numbers, as in the example, got {x.dtype}")
            if x.numel() and x.dtype != torch.bool and max(-int(x.min()), int(x.max())) >= EXACT:
                raise ValueError(f"input {number}: whole numbers from {int(x.min())} to {int(x.max())}; up to 2^24 are exact")
            x = x.to(torch.float32)
        return x if self.size or getattr(x, "ndim", 0) != 1 else x.reshape(-1, 1)


@dataclass(frozen=True)
class Returned:
    """How an output of the program becomes one of the model.

    Attributes:
        size: of the model's output, without the batch.
        at: which dimension of it is the batch.
        dtype: of the model's, where that is no floating-point number.
    """

    size: Size
    at: int
    dtype: torch.dtype | None

    def packed(self, x: Any) -> Any:
        x = x.reshape(len(x), *self.size)
        if not isinstance(x, Tensor):  # a NumPy array
            return self.packed(torch.from_numpy(x)).numpy()
        return x.movedim(0, self.at).to(self.dtype or x.dtype)


@dataclass(frozen=True, eq=False)
class Uneven:
    """A constant of the batch's size that is not the same for each image, for batches of two and of three."""

    two: Tensor
    three: Tensor

    def of(self, batch: int) -> Tensor:
        return self.two if batch == 2 else self.three


class Capture:
    """A program of an exported model, and which parts of it PyTorch runs.

    Attributes:
        nodes, sizes: of the program as it grows; of each value its size.
        outputs: the values that are returned.
        given: how each input is taken.
        returned: of all that the model returns how, or what it is where it is the same for all inputs.
        spec: how that is packed.
    """

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        self.nodes: list[Node] = []
        self.sizes: list[Size] = []
        self.outputs: list[int] = []
        self.given: list[Given] = []
        self.returned: list[Any] = []
        self.spec = exported.call_spec.out_spec
        self._env: dict[fx.Node, Any] = {}
        self._where = ""
        self._batches = dict[Any, int]()  # the symbols of the batch, one for each input that PyTorch has not seen meet others
        self._signature = exported.graph_signature
        lifted = _lifted(exported)
        for node in exported.graph.nodes:
            self._where = _where(node)
            if node.op == "placeholder":
                self._env[node] = lifted[node.name] if node.name in lifted else self._input(node)
            elif node.op == "output":
                self._finish(node.args[0])
            elif node.op == "call_function" and not isinstance(node.target, torch._ops.HigherOrderOperator):
                self._run(node)
            else:
                raise ValueError(f"{self._where or 'the model'}: {node.target} is not compiled")

    def program(self) -> Program:
        sizes = tuple(self.sizes[: len(self.sizes) - len(self.nodes)])
        return Program(tuple(self.nodes), sizes, tuple(self.outputs))

    # --- nodes ---

    def _input(self, node: fx.Node) -> View:
        given = node.meta["val"]
        if not isinstance(given, Tensor):
            raise ValueError(f"the input {node.name} is a {type(given).__name__}; compiled are networks on tensors")
        if given.is_complex():
            raise ValueError(f"the input {node.name} holds complex numbers, which are not compiled")
        first: Any = given.shape[0]
        self._batches[first.node.expr] = _PRIME
        size = tuple(int(n) for n in given.shape[1:])
        self.given.append(Given(size, not given.is_floating_point()))
        self.sizes.append(size or (1,))
        return self.shown(len(self.sizes) - 1, size)

    def _finish(self, results: Sequence[Any]) -> None:
        for spec, result in zip(self._signature.output_specs, results, strict=True):
            if spec.kind is not OutputKind.USER_OUTPUT:  # buffers and inputs that the model changes; here they stay
                continue
            if isinstance(result, fx.Node) and isinstance(self._env[result], Uneven):
                self._env[result] = self._foreign(result, result.target, *self._made(result))
            found = self._env.get(result) if isinstance(result, fx.Node) else result
            if isinstance(found, Spread):
                at = found.at
                constant = found.tensor.movedim(at, 0)[0].double()
                value = self.emit(Restore(torch.empty(0, dtype=torch.int64), constant.reshape(constant.shape or (1,))), 0)
                shown = list(self.shown(value, tuple(constant.shape)).dims[1:])
                found = View(value, self.view(value).atoms, (*shown[:at], (BATCH,), *shown[at:]))
            if isinstance(found, View):
                self.returned.append(self._returned(found, result.meta["val"].dtype))
            elif isinstance(found, Tensor):
                self.returned.append(found.float() if found.is_floating_point() else found)
            elif found is None or isinstance(found, (bool, int, float, str)):
                self.returned.append(found)
            else:
                raise ValueError(f"the model returns a {type(found).__name__}; compiled are networks that return tensors")
        if not self.outputs:
            raise ValueError("nothing that the model returns depends on its inputs")

    def _returned(self, view: View, dtype: torch.dtype) -> Returned:
        at = [i for i, dim in enumerate(view.dims) if dim == (BATCH,)]
        if not at:
            raise ValueError(f"{self._where}: the batch is merged with other dimensions of an output; that is not compiled")
        found = self.raw(view.permuted([at[0], *(i for i in range(len(view.dims)) if i != at[0])]))
        self.outputs.append(found.value)
        return Returned(found.shape[1:], at[0], None if dtype.is_floating_point else dtype)

    def emit(self, instruction: Instruction, *reads: int) -> int:
        """Appends an instruction; returns the number of what it makes."""
        size = instruction.check(*(self.sizes[i] for i in reads))
        self.nodes.append(Node(instruction, reads, self._where))
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
        """Of what a node makes; the batch counts as ``_PRIME``."""
        return tuple(self._number(n) for n in node.meta["val"].shape)

    def _number(self, n: Any) -> int:
        found = n if isinstance(n, int) else n.node.expr.subs(self._batches)
        if not isinstance(found, int) and not found.is_number:
            raise ValueError(f"{self._where or 'the model'}: sizes that depend on the numbers in a tensor are not compiled")
        return int(found)

    def _run(self, node: fx.Node) -> None:
        target: Any = node.target
        args, kwargs = self._given(node)
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, View) for leaf in leaves) and any(isinstance(leaf, Uneven) for leaf in leaves):
            args, kwargs = self._made(node)
            leaves = pytree.tree_leaves((args, kwargs))
        made = node.meta.get("val")
        if isinstance(made, (*SYMBOLS, int, float)):
            self._env[node] = made
            return
        if any(isinstance(x, Tensor) and x.is_complex() for x in pytree.tree_leaves(made)):
            raise ValueError(f"{self._where or 'the model'}: {target} makes complex numbers, which are not compiled")
        if target is operator.getitem and isinstance(args[0], (list, tuple)):
            self._env[node] = args[0][args[1]]
            return
        if not any(isinstance(leaf, View) for leaf in leaves):
            self._env[node] = self._constant(node, target, args, kwargs)
            return
        name = (target.name() if isinstance(target, torch._ops.OpOverload) else str(target)).split("::")[-1].split(".")[0]
        number = args[_FILLED_WITH[name]] if name in _FILLED_WITH else _FILLED.get(name)
        number = number.item() if isinstance(number, Tensor) and number.numel() == 1 else number
        if isinstance(number, (int, float)) and all(n % _PRIME or n == _PRIME for n in self.shape(node)):
            self._env[node] = self._filled(node, number)
            return
        handler = HANDLERS.get(name)
        before = len(self.nodes)
        try:
            moves = handler in _OF_SHAPES and not (handler is _view and any(isinstance(leaf, torch.dtype) for leaf in leaves))
            if handler is None or not (moves or handler is _to or not (self._is_of_batch(leaves) or self._is_whole(node))):
                raise NotCompiled
            of_one = pytree.tree_map(lambda leaf: leaf.tensor if isinstance(leaf, Spread) else leaf, (args, kwargs))
            found = handler(self, node, *of_one[0], **of_one[1])
        except (NotCompiled, ValueError, ZeroDivisionError):  # also what instructions do not take
            inputs = self._inputs
            del self.nodes[before:], self.sizes[inputs + before :]
            found = self._foreign(node, target, args, kwargs)
        self._env[node] = found

    @staticmethod
    def _is_of_batch(leaves: Sequence[Any]) -> bool:
        return any(isinstance(leaf, SYMBOLS) for leaf in leaves)

    def _is_whole(self, node: fx.Node) -> bool:
        """Whether a node makes, or reads of a value, what are no floating-point numbers."""
        seen = [node, *(n for n in node.all_input_nodes if isinstance(self._env[n], View))]
        tensors = pytree.tree_leaves([n.meta.get("val") for n in seen])
        return any(isinstance(x, Tensor) and not x.is_floating_point() for x in tensors)

    @property
    def _inputs(self) -> int:
        return len(self.sizes) - len(self.nodes)

    def _filled(self, node: fx.Node, number: float) -> Any:
        """A constant that takes no more than its shape from what it is given."""
        shape, dtype = self.shape(node), node.meta["val"].dtype
        one = torch.full(
            [1 if n == _PRIME else n for n in shape], number, dtype=torch.float64 if dtype.is_floating_point else dtype
        )
        return Spread(one, shape.index(_PRIME)) if _PRIME in shape else one

    def _given(self, node: fx.Node) -> Any:
        """What a node is called with."""
        return fx.node.map_arg((node.args, node.kwargs), lambda n: self._env[n])

    def _made(self, node: fx.Node) -> Any:
        """The same, when PyTorch makes all of it that is another number for each image."""
        for read in node.all_input_nodes:
            if isinstance(self._env[read], Uneven):
                self._env[read] = self._foreign(read, read.target, *self._made(read))
        return self._given(node)

    def _constant(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
        """What is made of constants alone; of what has the batch's size, one image, where all are the same."""
        if target is torch.ops.aten._assert_tensor_metadata.default:  # constants are in double precision here
            return None

        def of(batch: int) -> Any:
            def filled(leaf: Any) -> Any:
                if isinstance(leaf, (Spread, Uneven)):
                    return leaf.of(batch)
                return numbers(leaf, dict.fromkeys(self._batches, batch)) if isinstance(leaf, SYMBOLS) else leaf

            given = pytree.tree_map(filled, (args, kwargs))
            made = target(*given[0], **given[1])
            return made.double() if isinstance(made, Tensor) and made.is_floating_point() else made

        if not any(isinstance(leaf, (Spread, Uneven, *SYMBOLS)) for leaf in pytree.tree_leaves((args, kwargs))):
            return of(1)
        found, more = of(2), of(3)
        if not isinstance(found, Tensor):
            raise ValueError(f"{self._where or 'the model'}: {target} depends on the size of the batch; that is not compiled")
        shape = tuple(self._number(n) for n in node.meta["val"].shape)
        if found.shape == more.shape and torch.equal(found, more):
            return found
        if shape.count(_PRIME) == 1:
            at = shape.index(_PRIME)
            one = more.narrow(at, 0, 1)
            if torch.equal(one.expand_as(more), more) and torch.equal(one.expand_as(found), found):
                return Spread(one, at)
        return Uneven(found, more)

    def _foreign(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
        """An operator that PyTorch runs."""
        views = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, View)]
        kinds = {id(self._env[n]): n.meta["val"].dtype for n in node.all_input_nodes if isinstance(self._env[n], View)}
        kinds = {i: kind for i, kind in kinds.items() if not kind.is_floating_point}
        args, kwargs = pytree.tree_map(lambda leaf: Cast(leaf, kinds[id(leaf)]) if id(leaf) in kinds else leaf, (args, kwargs))
        made = node.meta["val"]
        if isinstance(made, (list, tuple)):
            return [self._foreign_part(target, args, kwargs, views, part, i) for i, part in enumerate(made)]
        return self._foreign_part(target, args, kwargs, views, made, None)

    def _foreign_part(self, target: Any, args: Any, kwargs: Any, views: list[View], made: Any, item: int | None) -> View | None:
        if not isinstance(made, Tensor):
            return None
        shape = tuple(self._number(n) for n in made.shape)
        at = [i for i, n in enumerate(shape) if n % _PRIME == 0]
        joins = str(target).removeprefix("aten.").split(".")[0] in ("cat", "concat", "stack")
        if len(at) != 1 or shape[at[0]] // _PRIME % _PRIME == 0 or (joins and shape[at[0]] != _PRIME):
            raise ValueError(f"{self._where or 'the model'}: {target} mixes the images of a batch; that is not compiled")
        beside = shape[at[0]] // _PRIME  # the batch is the outer one of the two
        size = (beside, *(n for i, n in enumerate(shape) if i != at[0]))
        size = size if beside > 1 else size[1:]
        values = list(dict.fromkeys(view.value for view in views)) or [0]  # of an input the size of the batch, at least

        def inside(leaf: Any) -> Any:
            if isinstance(leaf, Cast):
                return replace(leaf, view=inside(leaf.view))
            return replace(leaf, value=values.index(leaf.value)) if isinstance(leaf, View) else leaf

        args, kwargs = pytree.tree_map(inside, (args, kwargs))
        instruction = Foreign(target, args, kwargs, len(values), size or (1,), at[0], item, tuple(self._batches))
        found = self.shown(self.emit(instruction, *values), size)
        dims = list(found.dims[1 + (beside > 1) :])
        dims.insert(at[0], (BATCH, *found.dims[1]) if beside > 1 else (BATCH,))
        return View(found.value, found.atoms, tuple(dims))

    # --- how values lie ---

    def raw(self, view: View) -> View:
        """The same, as a value that lies as the tensor does: the batch, then its dimensions."""
        return self._rearranged(view, range(1, len(view.dims)))

    def _rearranged(self, view: View, order: Sequence[int]) -> View:
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
        return self._rearranged(view, [dim, *(i for i, d in enumerate(view.dims) if i != dim and d != (BATCH,))])

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
            if drop or start != 0 or step != 1 or stop < _PRIME:
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
                self._rearranged(view, [i for i, d in enumerate(view.dims) if d != (BATCH,)]), dim, start, stop, step
            )
        dims = tuple((0,) if n == dim else tuple(at[i] for i in d) for n, d in enumerate(view.dims))
        return View(value, tuple(kept), dims)._short()


def _lifted(exported: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """Parameters, buffers and constants by the names of their placeholders, in double precision."""
    signature, found = exported.graph_signature, dict[str, Tensor]()
    for names in (signature.inputs_to_parameters, signature.inputs_to_buffers, signature.inputs_to_lifted_tensor_constants):
        for name, source in names.items():
            tensor = exported.state_dict[source] if source in exported.state_dict else exported.constants[source]
            tensor = tensor.detach().cpu().clone()
            found[name] = tensor.double() if tensor.is_floating_point() else tensor
    return found


def _where(node: fx.Node) -> str:
    """The module that a node comes from."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0].removeprefix("L['self'].") if stack else node.name


# --- handlers, one for each operator of PyTorch that an instruction stands for ---

HANDLERS: dict[str, Callable[..., Any]] = {}
"""By the name of an operator of ATen, without its overload and without the underscore of in-place ones."""


BECOMES: dict[str, str] = {}
"""Of each of them what it becomes, for the table in the docs."""


def _handles(*names: str, becomes: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        HANDLERS.update(dict.fromkeys(names, handler))
        BECOMES.update(dict.fromkeys(names, becomes))
        return handler

    return register


def operators_table() -> str:
    """Which operators of ATen become what, as Markdown."""
    by_kind: dict[str, list[str]] = {}
    for name, kind in BECOMES.items():
        by_kind.setdefault(kind, []).append(name)
    rows = [f"| {', '.join(f'`{name}`' for name in sorted(names))} | {kind} |" for kind, names in by_kind.items()]
    return "\n".join(["| operator | becomes |", "|---|---|", *rows])


def _pair(value: Any) -> tuple[int, int]:
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    return (int(numbers[0]), int(numbers[-1]))


def _need(condition: object) -> None:
    if not condition:
        raise NotCompiled


@_handles(
    "contiguous",
    "clone",
    "detach",
    "alias",
    "lift_fresh_copy",
    "_assert_tensor_metadata",
    becomes="nothing",
)
def _same(capture: Capture, node: fx.Node, x: Any, *_: Any, **__: Any) -> Any:
    return x


@_handles("dropout", "feature_dropout", "alpha_dropout", becomes="nothing")
def _dropout(capture: Capture, node: fx.Node, x: Any, p: float, train: bool) -> Any:
    _need(not train)
    return x


@_handles("to", "_to_copy", "type_as", becomes="nothing")
def _to(capture: Capture, node: fx.Node, x: View, *_: Any, **__: Any) -> View:
    _need(node.meta["val"].dtype.is_floating_point)  # whole numbers are floating-point numbers here already
    return x


@_handles(
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "_unsafe_view",
    becomes="nothing, or `Rearrange` where numbers move",
)
def _view(capture: Capture, node: fx.Node, x: View, *_: Any, **__: Any) -> View:
    shape = capture.shape(node)
    found = x.reshaped(shape, _PRIME)
    if found is None:
        found = capture._rearranged(x, [i for i, d in enumerate(x.dims) if d != (BATCH,)]).reshaped(shape, _PRIME)
    _need(found is not None)
    return found  # type: ignore[return-value]


@_handles("permute", becomes="nothing")
def _permute(capture: Capture, node: fx.Node, x: View, order: Sequence[int]) -> View:
    return x.permuted([i % len(x.dims) for i in order])


@_handles("transpose", "swapaxes", becomes="nothing")
def _transpose(capture: Capture, node: fx.Node, x: View, one: int, other: int) -> View:
    order = list(range(len(x.dims)))
    order[one], order[other] = order[other], order[one]
    return x.permuted(order)


@_handles("t", "numpy_T", becomes="nothing")
def _t(capture: Capture, node: fx.Node, x: View) -> View:
    return x.permuted(range(len(x.dims))[::-1])


def _shuffled(capture: Capture, x: View, split: Sequence[int], order: Sequence[int], shape: Sequence[int]) -> View:
    """Dimensions split, in another order, and merged again."""
    for again in (False, True):
        if again:  # as it lies, dimension by dimension
            x = capture._rearranged(x, [i for i, d in enumerate(x.dims) if d != (BATCH,)])
        if (found := x.reshaped(split, _PRIME)) is not None:
            found = found.permuted(order)
            whole = found.reshaped(shape, _PRIME)
            if whole is None:
                found = capture._rearranged(found, [i for i, d in enumerate(found.dims) if d != (BATCH,)])
                whole = found.reshaped(shape, _PRIME)
            _need(whole is not None)
            return whole  # type: ignore[return-value]
    raise NotCompiled


@_handles("channel_shuffle", becomes="nothing")
def _channel_shuffle(capture: Capture, node: fx.Node, x: View, groups: int) -> View:
    batch, channels, *sides = capture.shape(node)
    split = (batch, groups, channels // groups, *sides)
    order = (0, 2, 1, *range(3, len(split)))
    return _shuffled(capture, x, split, order, (batch, channels, *sides))


@_handles("pixel_shuffle", becomes="`Rearrange`")
def _pixel_shuffle(capture: Capture, node: fx.Node, x: View, factor: int) -> View:
    batch, channels, height, width = capture.shape(node)
    split = (batch, channels, factor, factor, height // factor, width // factor)
    return _shuffled(capture, x, split, (0, 1, 4, 2, 5, 3), (batch, channels, height, width))


@_handles("index", becomes="`Pick` of channels, by a constant list")
def _index(capture: Capture, node: fx.Node, x: View, indices: Sequence[Any]) -> View:
    at = [i for i, index in enumerate(indices) if index is not None]
    _need(len(at) == 1 and x.dims[at[0]] != (BATCH,))
    index = indices[at[0]]
    _need(isinstance(index, Tensor) and index.ndim == 1 and not index.is_floating_point() and index.dtype != torch.bool)
    x = capture.channelled(x, at[0])
    size = capture.sizes[x.value]
    made = capture.emit(Pick(torch.arange(size[0])[index.long()]), x.value)
    places = {i: n for n, i in enumerate(x.places, 1)}
    dims = tuple((0,) if n == at[0] else tuple(BATCH if i == BATCH else places[i] for i in d) for n, d in enumerate(x.dims))
    return View(made, ((0, len(index)), *(x.atoms[i] for i in x.places)), dims)._short()


@_handles("expand", becomes="nothing")
def _expand(capture: Capture, node: fx.Node, x: View, *_: Any, **__: Any) -> View:
    shape = tuple(1 if n == _PRIME else n for n in capture.shape(node))
    _need(shape == x.shape)
    return x


@_handles("select", becomes="`Pick` of channels, `Crop` of places")
def _select(capture: Capture, node: fx.Node, x: View, dim: int, index: int) -> View:
    dim %= len(x.dims)
    index %= x.length(x.dims[dim])
    return capture.part(x, dim, index, index + 1, drop=True)


@_handles("slice", becomes="`Pick` of channels, `Crop` of places")
def _slice(capture: Capture, node: fx.Node, x: View, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> View:
    dim %= len(x.dims)
    length = _PRIME if x.dims[dim] == (BATCH,) else x.length(x.dims[dim])
    _need(all(n is None or isinstance(n, int) for n in (start, stop)))
    return capture.part(x, dim, *slice(start, stop, step).indices(length))


def _parts(capture: Capture, node: fx.Node, x: View, dim: int) -> Iterator[View]:
    start = 0
    dim %= len(x.dims)
    for made in node.meta["val"]:
        length = capture._number(made.shape[dim])
        yield capture.part(x, dim, start, start + length)
        start += length


@_handles("chunk", "split", "split_with_sizes", "tensor_split", becomes="`Pick` of channels, `Crop` of places")
def _split(capture: Capture, node: fx.Node, x: View, _: Any, dim: int = 0) -> list[View]:
    return list(_parts(capture, node, x, dim))


@_handles("unbind", becomes="`Pick` of channels, `Crop` of places")
def _unbind(capture: Capture, node: fx.Node, x: View, dim: int = 0) -> list[View]:
    dim %= len(x.dims)
    return [capture.part(x, dim, i, i + 1, drop=True) for i in range(x.length(x.dims[dim]))]


@_handles("cat", "concat", "concatenate", becomes="`Concat`")
def _cat(capture: Capture, node: fx.Node, tensors: Sequence[Any], dim: int = 0) -> View:
    first = next(x for x in tensors if isinstance(x, View))
    dim %= len(first.dims)
    _need(first.dims[0] == (BATCH,) and dim > 0)
    at = first.channels_at() or (len(first.dims) - 1 if len(first.dims) < 4 else 1)
    views = []
    for x in tensors:
        if isinstance(x, Tensor):
            order = [at, *(i for i in range(1, x.ndim) if i != at)]
            made = capture.emit(Restore(torch.empty(0, dtype=torch.int64), x[0].permute([i - 1 for i in order]).double()), 0)
            x = View.of(made, capture.sizes[made]).permuted([0, *(1 + order.index(i) for i in range(1, x.ndim))])
        x = capture.channelled(x, at)
        order = [at, *(i for i in range(1, len(x.dims)) if i != at)]
        size = tuple(x.length(x.dims[i]) for i in order)
        value = x.value
        views.append(capture.resized(value, size))
    order = [at, *(i for i in range(1, len(first.dims)) if i != at)]
    made = capture.emit(Concat(order.index(dim)), *views)
    return View.of(made, capture.sizes[made]).permuted([0, *(1 + order.index(i) for i in range(1, len(order) + 1))])


@_handles("slice_scatter", becomes="`Concat`")
def _slice_scatter(
    capture: Capture, node: fx.Node, x: Any, part: Any, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> View:
    shape = capture.shape(node)
    dim %= len(shape)
    _need(all(n is None or isinstance(n, int) for n in (start, stop)))
    first, last, step = slice(start, stop, step).indices(shape[dim])
    if (first, last, step) == (0, shape[dim], 1):
        _need(isinstance(part, View))
        return part
    _need(step == 1 and first < last and shape[dim] != _PRIME)

    def piece(start: int, stop: int) -> Any:
        return x.narrow(dim, start, stop - start) if isinstance(x, Tensor) else capture.part(x, dim, start, stop)

    before, after = [piece(0, first)] if first else [], [piece(last, shape[dim])] if last < shape[dim] else []
    return _cat(capture, node, [*before, part, *after], dim)


@_handles("select_scatter", becomes="`Concat`")
def _select_scatter(capture: Capture, node: fx.Node, x: Any, part: Any, dim: int, index: int) -> View:
    dim %= len(capture.shape(node))
    index %= capture.shape(node)[dim]
    part = part.unsqueeze(dim) if isinstance(part, Tensor) else replace(part, dims=(*part.dims[:dim], (), *part.dims[dim:]))
    return _slice_scatter(capture, node, x, part, dim, index, index + 1)


@_handles("copy", becomes="nothing")
def _copy(capture: Capture, node: fx.Node, x: Any, other: Any, *_: Any) -> View:
    _need(isinstance(other, View) and other.shape == tuple(1 if n == _PRIME else n for n in capture.shape(node)))
    return other


@_handles("stack", becomes="`Concat`")
def _stack(capture: Capture, node: fx.Node, tensors: Sequence[Any], dim: int = 0) -> View:
    dim %= len(capture.shape(node))
    views = [
        x.unsqueeze(dim) if isinstance(x, Tensor) else replace(x, dims=(*x.dims[:dim], (), *x.dims[dim:])) for x in tensors
    ]
    return _cat(capture, node, views, dim)


@_handles("conv2d", becomes="`Convolution`, `Linear` of single pixels")
def _conv2d(
    capture: Capture,
    node: fx.Node,
    x: View,
    weight: Any,
    bias: Any = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
) -> View:
    _need(isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor)))
    padding = _padding(padding, weight, _pair(dilation))
    if x.shape[2:] == weight.shape[2:] == (1, 1) and groups == 1 and _pair(padding) == (0, 0):
        return _linear_at(capture, x, 1, weight[:, :, 0, 0], bias)
    x = capture.maps(x)
    instruction = Convolution(weight, None, _pair(stride), _pair(padding), groups, _pair(dilation))
    size = instruction.check(capture.sizes[x.value])
    if bias is not None:
        sides = [torch.zeros(n, dtype=torch.int64) for n in size[1:]]
        instruction = replace(
            instruction, constant=Constant(bias, torch.empty(0, dtype=torch.int64), bias.new_zeros(0, 1, 1), *sides)
        )
    return View.of(capture.emit(instruction, x.value), size)


def _padding(padding: Any, weight: Tensor, dilation: tuple[int, int]) -> Any:
    """How many zeros are beside maps, where they are as many on both sides."""
    if not isinstance(padding, str):
        return padding
    both = [d * (k - 1) if padding == "same" else 0 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    _need(not any(n % 2 for n in both))
    return tuple(n // 2 for n in both)


@_handles("conv1d", becomes="`Convolution` of one row")
def _conv1d(
    capture: Capture,
    node: fx.Node,
    x: View,
    weight: Any,
    bias: Any = None,
    stride: Any = (1,),
    padding: Any = (0,),
    dilation: Any = (1,),
    groups: int = 1,
) -> View:
    _need(isinstance(weight, Tensor))
    weight, x = weight[:, :, None], replace(x, dims=(*x.dims[:2], (), *x.dims[2:]))
    padding = _padding(padding, weight, (1, _pair(dilation)[1]))
    sides = (1, _pair(stride)[1]), (0, _pair(padding)[1]), (1, _pair(dilation)[1])
    found = _conv2d(capture, node, x, weight, bias, *sides, groups)
    return replace(found, dims=(*found.dims[:2], *found.dims[3:]))


def _linear_at(capture: Capture, x: View, dim: int, weight: Tensor, bias: Tensor | None) -> View:
    """A matrix along a dimension."""
    x = capture.channelled(x, dim)
    value = capture.emit(Linear(weight, weight.new_zeros(len(weight)) if bias is None else bias), x.value)
    at = {i: n for n, i in enumerate(x.places, 1)}
    dims = tuple((0,) if n == dim else tuple(BATCH if i == BATCH else at[i] for i in d) for n, d in enumerate(x.dims))
    return View(value, ((0, len(weight)), *(x.atoms[i] for i in x.places)), dims)._short()


@_handles("linear", becomes="`Linear`")
def _linear(capture: Capture, node: fx.Node, x: View, weight: Any, bias: Any = None) -> View:
    _need(isinstance(x, View) and isinstance(weight, Tensor) and len(x.dims) > 1)
    return _linear_at(capture, x, len(x.dims) - 1, weight, bias)


@_handles("addmm", becomes="`Linear`")
def _addmm(capture: Capture, node: fx.Node, bias: Any, x: Any, weight: Any) -> View:
    _need(isinstance(bias, Tensor) and bias.ndim == 1 and isinstance(x, View) and isinstance(weight, Tensor))
    return _linear_at(capture, x, len(x.dims) - 1, weight.t(), bias)


@_handles("matmul", "mm", becomes="`Linear`")
def _matmul(capture: Capture, node: fx.Node, x: Any, weight: Any) -> View:
    _need(isinstance(x, View) and isinstance(weight, Tensor) and weight.ndim == 2 and len(x.dims) > 1)
    return _linear_at(capture, x, len(x.dims) - 1, weight.t(), None)


@_handles("batch_norm", becomes="`Affine`, part of the sums before it")
def _batch_norm(
    capture: Capture, node: fx.Node, x: View, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any
) -> View:
    _need(isinstance(mean, Tensor) and isinstance(var, Tensor) and not training and len(x.dims) > 1)
    scale = (1.0 if weight is None else weight) / (var + rest[1]).sqrt()
    shift = (0.0 if bias is None else bias) - mean * scale
    x = capture.channelled(x, 1)
    return capture.like(x, capture.emit(Affine(scale, shift), x.value))


@_handles("_native_batch_norm_legit_no_training", becomes="`Affine`, part of the sums before it")
def _batch_norm_alone(
    capture: Capture, node: fx.Node, x: View, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any
) -> list[View]:
    return [_batch_norm(capture, node, x, weight, bias, mean, var, False, *rest)]


@_handles("_native_batch_norm_legit", "_native_batch_norm_legit_functional", becomes="an error: it mixes the images of a batch")
def _batch_norm_over_images(capture: Capture, node: fx.Node, *_: Any) -> View:
    raise _OverImages(
        f"{capture._where or 'the model'}: a norm over the images of a batch; compiled are norms with running statistics, of "
        "models that were exported in eval mode"
    )


@_handles("instance_norm", becomes="`InstanceNorm`, or as a batch norm")
def _instance_norm(
    capture: Capture, node: fx.Node, x: View, weight: Any, bias: Any, mean: Any, var: Any, own: bool, *rest: Any
) -> View:
    if not own:
        return _batch_norm(capture, node, x, weight, bias, mean, var, False, *rest)
    x = capture.maps(x)
    channels = capture.sizes[x.value][0]
    scale = torch.ones(channels, dtype=torch.float64) if weight is None else weight
    shift = torch.zeros(channels, dtype=torch.float64) if bias is None else bias
    return capture.like(x, capture.emit(InstanceNorm(scale, shift, rest[1]), x.value))


@_handles("layer_norm", becomes="`LayerNorm`, over the last dimension")
def _layer_norm(
    capture: Capture,
    node: fx.Node,
    x: View,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> View:
    _need(len(shape) == 1 and len(x.dims) > 1)
    x = capture.channelled(x, len(x.dims) - 1)
    return _normed(capture, x, weight, bias, eps, 1, False)


@_handles("group_norm", becomes="`LayerNorm`, over places")
def _group_norm(
    capture: Capture, node: fx.Node, x: View, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> View:
    return _normed(capture, capture.channelled(x, 1), weight, bias, eps, groups, True)


def _normed(capture: Capture, x: View, weight: Any, bias: Any, eps: float, groups: int, over_places: bool) -> View:
    channels = capture.sizes[x.value][0]
    scale = torch.ones(channels, dtype=torch.float64) if weight is None else weight
    shift = torch.zeros(channels, dtype=torch.float64) if bias is None else bias
    return capture.like(x, capture.emit(LayerNorm(scale, shift, eps, groups, over_places), x.value))


@_handles("scaled_dot_product_attention", becomes="`Attention`, with a mask that is a constant")
def _attention(
    capture: Capture,
    node: fx.Node,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> View:
    _need(all(isinstance(x, View) and len(x.dims) == 4 for x in (q, k, v)) and not dropout and not enable_gqa)
    _need(all(x.dims[0] == (BATCH,) for x in (q, k, v)))
    heads, width = q.shape[1], q.shape[3]
    values = []
    for x in (q, k, v):
        if (
            x.dims[0] != (BATCH,)
            or (*x.dims[1], *x.dims[3]) != x.whole(0)
            or x.dims[2] != x.places
            or len(capture.sizes[x.value]) != 2
        ):
            x = capture._rearranged(x, [1, 3, 2])
            joined = (x.shape[1] * x.shape[3], x.shape[2])
            values.append(capture.emit(Rearrange(capture.sizes[x.value], (0, 1, 2), joined), x.value))
        else:
            values.append(x.value)
    added = _mask(mask, is_causal, q.shape[2], k.shape[2])
    made = capture.emit(Attention(heads, width**-0.5 if scale is None else float(scale), added), *values)
    channels, tokens = capture.sizes[made]
    return View(made, ((0, heads), (0, channels // heads), (1, tokens)), ((BATCH,), (0,), (2,), (1,)))._short()


def _mask(mask: Any, is_causal: bool, queries: int, keys: int) -> Tensor | None:
    """What is added to the scores of attention, where that is the same for all images and heads."""
    if is_causal:
        _need(mask is None)
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    if mask is None:
        return None
    _need(isinstance(mask, Tensor) and all(n == 1 for n in mask.shape[:-2]))
    mask = mask.reshape(mask.shape[-2:]).expand(queries, keys)
    if mask.dtype == torch.bool:
        mask = torch.zeros(queries, keys, dtype=torch.float64).masked_fill(~mask, -float("inf"))
    return mask.double().clone() if bool(mask.any()) else None


# --- elementwise ---


def _activates(name: str, kind: str, *defaults: float) -> None:
    def handler(capture: Capture, node: fx.Node, x: View, *given: Any, **_: Any) -> View:
        numbers = [default if n is None else float(n) for n, default in zip([*given, *[None] * 2], defaults, strict=False)]
        return capture.like(x, capture.emit(Activation(kind, *numbers), x.value))

    _handles(name, becomes="`Activation`")(handler)


for _name, _kind, _defaults in (
    ("relu", "relu", ()),
    ("hardtanh", "clamp", (-1.0, 1.0)),
    ("leaky_relu", "leaky_relu", (0.01,)),
    ("sigmoid", "sigmoid", ()),
    ("tanh", "tanh", ()),
    ("silu", "silu", ()),
    ("hardswish", "hardswish", ()),
    ("hardsigmoid", "hardsigmoid", ()),
):
    _activates(_name, _kind, *_defaults)


@_handles("relu6", becomes="`Activation`")
def _relu6(capture: Capture, node: fx.Node, x: View) -> View:
    return capture.like(x, capture.emit(Activation("clamp", 0.0, 6.0), x.value))


@_handles("clamp", "clamp_min", "clamp_max", becomes="`Activation`")
def _clamp(capture: Capture, node: fx.Node, x: View, low: Any = None, high: Any = None) -> View:
    if "clamp_max" in str(node.target):
        low, high = None, low
    _need(all(n is None or isinstance(n, (int, float)) for n in (low, high)))
    ends = (-float("inf") if low is None else float(low), float("inf") if high is None else float(high))
    return capture.like(x, capture.emit(Activation("clamp", *ends), x.value))


@_handles("elu", becomes="`Activation`")
def _elu(capture: Capture, node: fx.Node, x: View, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> View:
    _need(scale == 1 and input_scale == 1)
    return capture.like(x, capture.emit(Activation("elu", float(alpha)), x.value))


@_handles("prelu", becomes="`Activation`, `Affine`, `Sum`")
def _prelu(capture: Capture, node: fx.Node, x: View, slope: Any) -> View:
    _need(isinstance(slope, Tensor) and len(x.dims) > 1)
    if slope.numel() == 1:
        return capture.like(x, capture.emit(Activation("leaky_relu", float(slope)), x.value))
    x = capture.channelled(x, 1)
    above = capture.emit(Activation("relu"), x.value)
    below = _affine(
        capture, capture.like(x, capture.emit(Activation("relu"), _affine(capture, x, -1.0, 0.0).value)), -slope, 0.0
    )
    return capture.like(x, capture.emit(Sum(), above, below.value))


@_handles("gelu", becomes="`Activation`")
def _gelu(capture: Capture, node: fx.Node, x: View, approximate: str = "none") -> View:
    return capture.like(x, capture.emit(Activation("gelu" if approximate == "none" else "gelu_tanh"), x.value))


def _affine(capture: Capture, x: View, scale: Tensor | float, shift: Tensor | float) -> View:
    """Numbers per channel, as values lie."""
    channels = capture.sizes[x.value][0]
    scale, shift = (torch.as_tensor(t, dtype=torch.float64).reshape(-1).expand(channels).clone() for t in (scale, shift))
    return capture.like(x, capture.emit(Affine(scale, shift), x.value))


def _paired(capture: Capture, x: View, y: View) -> tuple[View, View]:
    """Two tensors of one shape, or one of them with numbers per channel, as values that lie in the same way."""
    if x.pattern() == y.pattern():
        size, other = capture.sizes[x.value], capture.sizes[y.value]
        return x, (y if size == other else replace(y, value=capture.resized(y.value, size)))
    _need(len(x.dims) == len(y.dims) and x.dims[0] == y.dims[0] == (BATCH,))
    if x.shape != y.shape:
        large, small = (x, y) if len(x.atoms) >= len(y.atoms) else (y, x)
        at = [i for i in range(1, len(x.dims)) if small.shape[i] != large.shape[i]]
        if len(at) == 1 and small.shape[at[0]] == 1 and any(small.dims[1:]):  # the same for all channels
            large, small = capture.channelled(large, at[0]), capture.channelled(small, at[0])
            size = capture.sizes[large.value]
            value = capture.resized(small.value, (1, *size[1:]))
            small = capture.like(large, capture.emit(Pick(torch.zeros(size[0], dtype=torch.int64)), value))
            return (large, small) if large.shape == x.shape else (small, large)
        at = [i for i in range(1, len(x.dims)) if small.shape[i] != 1]
        _need(len(at) == 1 and small.shape[at[0]] == large.shape[at[0]])
        large, small = capture.channelled(large, at[0]), capture.channelled(small, at[0])
        if len(capture.sizes[small.value]) > 1:
            size = capture.sizes[small.value]
            small = replace(small, value=capture.resized(small.value, size[:1]))
        return (large, small) if large.shape == x.shape else (small, large)
    where = next((i for i in (x.channels_at(), y.channels_at()) if i is not None), 1)
    order = [where, *(i for i in range(1, len(x.dims)) if i != where)]
    x, y = capture.channelled(x, where), capture.channelled(y, where)
    if x.pattern() != y.pattern() or capture.sizes[x.value] != capture.sizes[y.value]:
        x, y = capture._rearranged(x, order), capture._rearranged(y, order)
    return x, y


def _joined(capture: Capture, instruction: Instruction, x: View, y: View) -> View:
    x, y = _paired(capture, x, y)
    made = capture.emit(instruction, x.value, y.value)
    return capture.like(x if len(capture.sizes[x.value]) >= len(capture.sizes[y.value]) else y, made)


@_handles("add", becomes="`Sum`; of constants `Affine`, `Shift`")
def _add(capture: Capture, node: fx.Node, x: Any, y: Any, alpha: float = 1.0) -> View:
    if isinstance(x, View) and isinstance(y, View):
        return _joined(capture, Sum(), x, y if alpha == 1 else _affine(capture, y, alpha, 0.0))
    if not isinstance(x, View):
        _need(alpha == 1 or not isinstance(x, Tensor))
        x, y = (y if alpha == 1 else _affine(capture, y, alpha, 0.0)), x
        alpha = 1.0
    return _shifted(capture, node, x, y * alpha)


def _shifted(capture: Capture, node: fx.Node, x: View, constant: Any) -> View:
    if not isinstance(constant, Tensor) or constant.numel() == 1:
        return _affine(capture, x, 1.0, float(constant))
    _need(tuple(1 if n == _PRIME else n for n in capture.shape(node)) == x.shape)
    laid = capture.laid(constant, x)
    if laid.numel() == len(laid):
        return _affine(capture, x, 1.0, laid)
    return capture.like(x, capture.emit(Shift(laid.expand(capture.sizes[x.value]).clone()), x.value))


@_handles("sub", becomes="`Sum`; of constants `Affine`, `Shift`")
def _sub(capture: Capture, node: fx.Node, x: Any, y: Any, alpha: float = 1.0) -> View:
    if isinstance(y, View):
        return _add(capture, node, _affine(capture, y, -float(alpha), 0.0), x)
    return _shifted(capture, node, x, -y * alpha)


@_handles("rsub", becomes="`Sum`; of constants `Affine`, `Shift`")
def _rsub(capture: Capture, node: fx.Node, x: View, y: Any, alpha: float = 1.0) -> View:
    return _add(capture, node, _affine(capture, x, -float(alpha), 0.0), y)


@_handles("neg", becomes="`Affine`")
def _neg(capture: Capture, node: fx.Node, x: View) -> View:
    return _affine(capture, x, -1.0, 0.0)


@_handles("mul", becomes="`Product`; of constants `Affine`")
def _mul(capture: Capture, node: fx.Node, x: Any, y: Any) -> View:
    if isinstance(x, View) and isinstance(y, View):
        return _joined(capture, Product(), x, y)
    x, y = (x, y) if isinstance(x, View) else (y, x)
    if not isinstance(y, Tensor) or y.numel() == 1:
        return _affine(capture, x, float(y), 0.0)
    _need(tuple(1 if n == _PRIME else n for n in capture.shape(node)) == x.shape)
    laid = capture.laid(y, x)
    if laid.numel() == len(laid):
        return _affine(capture, x, laid, 0.0)
    whole = laid.expand(capture.sizes[x.value]).clone()  # another number at each place
    made = capture.emit(Restore(torch.empty(0, dtype=torch.int64), whole), x.value)
    return capture.like(x, capture.emit(Product(), x.value, made))


@_handles("pow", "square", becomes="`Product`, of the powers 2 and 3")
def _pow(capture: Capture, node: fx.Node, x: Any, power: Any = 2) -> View:
    _need(isinstance(x, View) and power in (2, 3))
    made = capture.emit(Product(), x.value, x.value)
    return capture.like(x, made if power == 2 else capture.emit(Product(), made, x.value))


@_handles("div", becomes="`Affine`")
def _div(capture: Capture, node: fx.Node, x: Any, y: Any, **settings: Any) -> View:
    _need(isinstance(x, View) and not isinstance(y, View) and not settings)
    return _mul(capture, node, x, 1 / y)


# --- windows ---


@_handles("pad", becomes="`Pad`, with zeros")
def _pad(
    capture: Capture, node: fx.Node, x: View, pads: Sequence[int], mode: str = "constant", value: float | None = None
) -> View:
    _need(mode == "constant" and not value)
    return _constant_pad(capture, node, x, pads)


@_handles("constant_pad_nd", becomes="`Pad`, with zeros")
def _constant_pad(capture: Capture, node: fx.Node, x: View, pads: Sequence[int], value: float = 0.0) -> View:
    _need(not value)
    left, right, top, bottom = (*pads, *[0] * (4 - len(pads)))[:4]
    _need(min(left, right, top, bottom) >= 0 and not any(pads[4:]))
    x = capture.maps(x)
    return capture.view(capture.emit(Pad(top, bottom, left, right), x.value))


@_handles("max_pool2d", becomes="`Pool`")
def _max_pool(
    capture: Capture,
    node: fx.Node,
    x: View,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil: bool = False,
) -> View:
    x = capture.maps(x)
    made = capture.emit(Pool(True, _pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation), ceil), x.value)
    return capture.view(made)


@_handles("avg_pool2d", becomes="`Pool`")
def _avg_pool(
    capture: Capture,
    node: fx.Node,
    x: View,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil: bool = False,
    padded: bool = True,
    divisor: Any = None,
) -> View:
    _need(divisor is None)
    x = capture.maps(x)
    made = capture.emit(Pool(False, _pair(kernel), _pair(stride or kernel), _pair(padding), (1, 1), ceil, padded), x.value)
    return capture.view(made)


@_handles("adaptive_avg_pool2d", becomes="`PlaceMean`, `AdaptiveMean`")
def _adaptive(capture: Capture, node: fx.Node, x: View, size: Sequence[int]) -> View:
    if tuple(size) == x.shape[2:]:
        return x
    if tuple(size) == (1, 1):
        return _mean_over(capture, x, (2, 3), True)
    x = capture.maps(x)
    return capture.view(capture.emit(AdaptiveMean(*_pair(size)), x.value))


@_handles("upsample_nearest2d", becomes="`AdaptiveMean`, by whole factors")
def _upsample(capture: Capture, node: fx.Node, x: View, *_: Any) -> View:
    sides = capture.shape(node)[2:]
    _need(all(n % before == 0 for n, before in zip(sides, x.shape[2:], strict=True)))
    x = capture.maps(x)
    return capture.view(capture.emit(AdaptiveMean(*_pair(sides)), x.value))  # the mean of one pixel


def _mean_over(capture: Capture, x: View, dims: Sequence[int], keep: bool) -> View:
    left = [i for i in range(len(x.dims)) if i not in dims]
    _need(x.dims[0] == (BATCH,) and 0 in left)
    wide = [i for i in left[1:] if x.dims[i]]
    _need(len(wide) <= 1)
    at = wide[0] if wide else left[-1]
    _need(at > 0)
    x = capture.channelled(x, at)
    value = capture.emit(PlaceMean(), x.value) if len(capture.sizes[x.value]) > 1 else x.value
    found = View(
        value,
        ((0, capture.sizes[value][0]),),
        tuple((BATCH,) if i == 0 else (0,) if i == at else () for i in range(len(x.dims))),
    )
    if not keep:
        found = replace(found, dims=tuple(found.dims[i] for i in left))
    return found._short()


@_handles("mean", becomes="`PlaceMean`, over all places")
def _mean(capture: Capture, node: fx.Node, x: View, dims: Any = None, keepdim: bool = False, **_: Any) -> View:
    _need(dims is not None)
    dims = [dims] if isinstance(dims, int) else dims
    return _mean_over(capture, x, [d % len(x.dims) for d in dims], keepdim)


_FILLED = {"new_zeros": 0, "zeros_like": 0, "new_ones": 1, "ones_like": 1}
"""Operators that make constants of the shape of something, with their number."""
_FILLED_WITH = {"fill": 1, "full_like": 1, "new_full": 2}
"""The same, with the place of the argument that is their number."""
_OF_SHAPES = (
    _view,
    _expand,
    _slice,
    _same,
    _permute,
    _transpose,
    _t,
    _select,
    _split,
    _unbind,
    _upsample,
    _slice_scatter,
    _copy,
)
"""Handlers to which the batch is only part of a shape."""
