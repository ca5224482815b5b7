"""From any PyTorch model to a program of all its channels, by ``torch.export``.

Contract: the model is not changed. The program is what the model computes in eval mode, in double precision, with a free batch;
nothing is left out yet (_shrink.py). What no instruction stands for is kept as an operator of PyTorch.
"""

from __future__ import annotations

import io
import logging
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from dnw.compile._graphs import gathering
from dnw.compile._operators import OPERATORS
from dnw.compile._program import Restore, Size
from dnw.compile._shapes import SHAPES
from dnw.compile._torch import EXACT, SYMBOLS, Cast, Foreign, Spread, numbers
from dnw.compile._traced import PRIME, NotCompiled, OverImages, Traced
from dnw.compile._views import BATCH, View
from dnw.graphs import ContinuousTimeGraph


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of its parameters, and so of what it takes."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def captured(model: nn.Module, example: tuple[Tensor, ...]) -> Capture:
    """A model, in whatever mode, captured as in eval mode for inputs like the examples.

    Raises:
        ValueError: it cannot be exported, or not with a free batch.
    """
    for name, module in model.named_modules():
        if isinstance(module, ContinuousTimeGraph):
            where = name or "the model"
            raise ValueError(f"{where} is a graph in continuous time, of as many steps as its solver takes; it is not compiled")
    kind = dtype_of(model)
    two = tuple(x[:1].detach().expand(2, *x.shape[1:]).clone() for x in example)
    two = tuple(x.to(kind) if x.is_floating_point() else x for x in two)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    two = tuple(x.to(device) for x in two)
    with evaluating(model), gathering(model), silence():
        try:
            return Capture(_exported(_Held(model), two))
        except OverImages as error:
            raise ValueError(str(error)) from None


def _exported(model: nn.Module, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    shapes, reason = tuple({0: torch.export.Dim.AUTO} for _ in example), ""
    for strict in (False, True):
        try:
            found = torch.export.export(model, example, dynamic_shapes=(shapes,), strict=strict)
        except Exception as error:  # whatever the model itself raises while it is traced
            reason = reason or _first_line(error)
            continue
        if _is_free(found):
            try:
                return found.run_decompositions({}) if _changes(found) else found  # into plain values
            except Exception as error:
                reason = reason or _first_line(error)
                continue
        reason = "its code fixes the number of images in a batch, by len(x) or int(x.shape[0]), say; x.shape[0] leaves it free"
    try:
        with torch.no_grad():
            model(*(x.clone() for x in example))
    except Exception as error:
        sizes = " and ".join("x".join(map(str, x.shape[1:])) for x in example)
        raise ValueError(f"the model does not take inputs of {sizes} ({_first_line(error)})") from None
    raise ValueError(f"the model cannot be exported by torch.export, which compiling begins with ({reason})")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"


def _changes(exported: torch.export.ExportedProgram) -> bool:
    """Whether something is changed in place, or may be where the graph does not show it."""
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    return any(not _is_plain(target) or (getattr(target, "_schema", None) and target._schema.is_mutable) for target in targets)


def _is_plain(target: Any) -> bool:
    """Whether something that is called is an operator of PyTorch, or computes with sizes; nothing else is called here."""
    module = getattr(target, "__module__", "") or ""
    return isinstance(target, torch._ops.OpOverload) or module in ("_operator", "operator", "math", "builtins", "torch")


def _is_free(exported: torch.export.ExportedProgram) -> bool:
    """Whether every input has a batch of any size."""
    inputs = set(exported.graph_signature.user_inputs)
    firsts = [node.meta["val"].shape[:1] for node in exported.graph.nodes if node.op == "placeholder" and node.name in inputs]
    return all(isinstance(n, torch.SymInt) and not n.node.expr.is_number for first in firsts for n in first)


class _Held(nn.Module):
    """A model inside another one: torch.export stumbles over models with a child that is called ``graph``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs)


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
def silence() -> Iterator[None]:
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


class Capture(Traced):
    """A program of an exported model, and which parts of it PyTorch runs.

    Attributes:
        given: how each input is taken.
        returned: of all that the model returns how, or what it is where it is the same for all inputs.
        spec: how that is packed.
    """

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.given: list[Given] = []
        self.returned: list[Any] = []
        self.spec = exported.call_spec.out_spec
        self._env: dict[fx.Node, Any] = {}
        self._signature = exported.graph_signature
        lifted = _lifted(exported)
        for node in exported.graph.nodes:
            self.where = _where(node)
            if node.op == "placeholder":
                self._env[node] = lifted[node.name] if node.name in lifted else self._input(node)
            elif node.op == "output":
                self._finish(node.args[0])
            elif node.op == "call_function" and not isinstance(node.target, torch._ops.HigherOrderOperator):
                self._run(node)
            else:
                raise ValueError(f"{self.where or 'the model'}: {node.target} is not compiled")

    # --- nodes ---

    def _input(self, node: fx.Node) -> View:
        given = node.meta["val"]
        if not isinstance(given, Tensor):
            raise ValueError(f"the input {node.name} is a {type(given).__name__}; compiled are networks on tensors")
        if given.is_complex():
            raise ValueError(f"the input {node.name} holds complex numbers, which are not compiled")
        first: Any = given.shape[0]
        self.batches[first.node.expr] = PRIME
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
            raise ValueError(f"{self.where}: the batch is merged with other dimensions of an output; that is not compiled")
        found = self.raw(view.permuted([at[0], *(i for i in range(len(view.dims)) if i != at[0])]))
        self.outputs.append(found.value)
        return Returned(found.shape[1:], at[0], None if dtype.is_floating_point else dtype)

    def _run(self, node: fx.Node) -> None:
        target: Any = node.target
        if not _is_plain(target):
            raise ValueError(f"{self.where or 'the model'}: {getattr(target, '__name__', target)} is not compiled")
        args, kwargs = self._given(node)
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, View) for leaf in leaves) and any(isinstance(leaf, Uneven) for leaf in leaves):
            args, kwargs = self._made(node)
            leaves = pytree.tree_leaves((args, kwargs))
        made = node.meta.get("val")
        if isinstance(made, (*SYMBOLS, int, float)):
            is_read = any(isinstance(leaf, Tensor) for leaf in leaves)  # from a constant, as by item()
            known = is_read and not any(isinstance(leaf, (View, Spread, Uneven, *SYMBOLS)) for leaf in leaves)
            self._env[node] = target(*args, **kwargs) if known else made
            return
        if any(isinstance(x, Tensor) and x.is_complex() for x in pytree.tree_leaves(made)):
            raise ValueError(f"{self.where or 'the model'}: {target} makes complex numbers, which are not compiled")
        if target is operator.getitem and isinstance(args[0], (list, tuple)):
            self._env[node] = args[0][args[1]]
            return
        if not any(isinstance(leaf, View) for leaf in leaves):
            self._env[node] = self._constant(node, target, args, kwargs)
            return
        name = (target.name() if isinstance(target, torch._ops.OpOverload) else str(target)).split("::")[-1].split(".")[0]
        number = args[_FILLED_WITH[name]] if name in _FILLED_WITH else _FILLED.get(name)
        number = number.item() if isinstance(number, Tensor) and number.numel() == 1 else number
        if isinstance(number, (int, float)) and all(n % PRIME or n == PRIME for n in self.shape(node)):
            self._env[node] = self._filled(node, number)
            return
        handler = HANDLERS.get(name)
        before = len(self.nodes)
        try:
            moves = name in _OF_SHAPES and not (name == "view" and any(isinstance(leaf, torch.dtype) for leaf in leaves))
            if handler is None or not (
                moves or handler is HANDLERS["to"] or not (self._is_of_batch(leaves) or self._is_whole(node))
            ):
                raise NotCompiled
            of_one = pytree.tree_map(lambda leaf: leaf.tensor if isinstance(leaf, Spread) else leaf, (args, kwargs))
            found = handler(self, node, *of_one[0], **of_one[1])
        except (
            NotCompiled,
            ValueError,
            ArithmeticError,
            LookupError,
            TypeError,
            RuntimeError,
        ):  # what instructions do not take
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
            [1 if n == PRIME else n for n in shape], number, dtype=torch.float64 if dtype.is_floating_point else dtype
        )
        return Spread(one, shape.index(PRIME)) if PRIME in shape else one

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
                return numbers(leaf, dict.fromkeys(self.batches, batch)) if isinstance(leaf, SYMBOLS) else leaf

            given = pytree.tree_map(filled, (args, kwargs))
            made = target(*given[0], **given[1])
            return made.double() if isinstance(made, Tensor) and made.is_floating_point() else made

        if not any(isinstance(leaf, (Spread, Uneven, *SYMBOLS)) for leaf in pytree.tree_leaves((args, kwargs))):
            return of(1)
        found, more = of(2), of(3)
        if not isinstance(found, Tensor):
            raise ValueError(f"{self.where or 'the model'}: {target} depends on the size of the batch; that is not compiled")
        shape = tuple(self.number(n) for n in node.meta["val"].shape)
        if found.shape == more.shape and torch.equal(found, more):
            return found
        if shape.count(PRIME) == 1:
            at = shape.index(PRIME)
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
        shape = tuple(self.number(n) for n in made.shape)
        at = [i for i, n in enumerate(shape) if n and n % PRIME == 0]
        joins = str(target).removeprefix("aten.").split(".")[0] in ("cat", "concat", "stack")
        if len(at) != 1 or shape[at[0]] // PRIME % PRIME == 0 or (joins and shape[at[0]] != PRIME):
            raise ValueError(f"{self.where or 'the model'}: {target} mixes the images of a batch; that is not compiled")
        beside = shape[at[0]] // PRIME  # the batch is the outer one of the two
        size = (beside, *(n for i, n in enumerate(shape) if i != at[0]))
        size = size if beside > 1 else size[1:]
        values = list(dict.fromkeys(view.value for view in views)) or [0]  # of an input the size of the batch, at least

        def inside(leaf: Any) -> Any:
            if isinstance(leaf, Cast):
                return replace(leaf, view=inside(leaf.view))
            return replace(leaf, value=values.index(leaf.value)) if isinstance(leaf, View) else leaf

        args, kwargs = pytree.tree_map(inside, (args, kwargs))
        instruction = Foreign(target, args, kwargs, len(values), size or (1,), at[0], item, tuple(self.batches))
        found = self.shown(self.emit(instruction, *values), size)
        dims = list(found.dims[1 + (beside > 1) :])
        dims.insert(at[0], (BATCH, *found.dims[1]) if beside > 1 else (BATCH,))
        return View(found.value, found.atoms, tuple(dims))


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
    name: str = next(reversed(stack.values()))[0].removeprefix("L['self'].") if stack else node.name
    return name.removeprefix("model").removeprefix(".")


_FILLED = {"new_zeros": 0, "zeros_like": 0, "new_ones": 1, "ones_like": 1}
"""Operators that make constants of the shape of something, with their number."""
_FILLED_WITH = {"fill": 1, "full_like": 1, "new_full": 2}
"""The same, with the place of the argument that is their number."""


def operators_table() -> str:
    """Which operators of ATen become what, as Markdown."""
    by_kind: dict[str, list[str]] = {}
    for name, kind in {**SHAPES.becomes, **OPERATORS.becomes}.items():
        by_kind.setdefault(kind, []).append(name)
    rows = [f"| {', '.join(f'`{name}`' for name in sorted(names))} | {kind} |" for kind, names in by_kind.items()]
    return "\n".join(["| operator | becomes |", "|---|---|", *rows])


_OF_SHAPES = SHAPES.of_shapes | OPERATORS.of_shapes
HANDLERS = {**SHAPES.by_name, **OPERATORS.by_name}
