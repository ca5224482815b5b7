"""Any model, compiled: the passes in order.

Contract: the model is left as it was. What comes out computes what the model computes in eval mode, on any number of images of
the example's size; that it does is tried before it is given out, on the example and on others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dnw._checks import listing
from dnw.compile._capture import Given, Returned, captured, dtype_of, evaluating
from dnw.compile._file import save_program
from dnw.compile._layers import Concat
from dnw.compile._measure import Timing, measured
from dnw.compile._native import Runtime
from dnw.compile._pieces import foreign, is_native, name_of
from dnw.compile._plan import model_of
from dnw.compile._program import Convolution, Linear, Program, Size
from dnw.compile._shrink import shrunk

CLOSE = 1e-4
"""How far outputs may be from the model's, as a fraction of the largest."""


@dataclass(frozen=True)
class ReportRow:
    """One instruction with weights, or one that PyTorch runs.

    Attributes:
        name: of its module.
        kind: convolution, matrix, or the operator of PyTorch.
        size, out: of what comes in and goes out.
        weights, density: how many weights are not 0, and which fraction of all.
        way: "sparse", "dense", "apart" (a convolution per channel) or "PyTorch".
        timing: where both ways were measured.
    """

    name: str
    kind: str
    size: Size
    out: Size
    weights: int
    density: float
    way: str
    timing: Timing | None = None

    def __str__(self) -> str:
        sizes = f"{'x'.join(map(str, self.size))} -> {'x'.join(map(str, self.out))}"
        if self.way == "PyTorch":
            return f"{self.name}: {self.kind}, {sizes}: in PyTorch"
        kept = ""
        if self.timing is not None:
            times = f"{self.timing.sparse * 1e3:.2f} ms sparse, {self.timing.dense * 1e3:.2f} ms dense"
            kept = f" ({times}{'; keep it dense' if self.way == 'dense' else ''})"
        return f"{self.name}: {self.kind}, {sizes}, density {self.density:.1%}: {self.way}{kept}"


@dataclass(frozen=True)
class Report:
    """What compiling a model did; ``print`` it.

    Attributes:
        channels: of all values, before and after what has no effect was left out.
        parameters: numbers that are not 0, before and after.
        multiply_adds: with weights that are not 0, of one input, before and after.
        zeros: multiply-adds with weights that are 0, besides, in what runs dense.
        rows: of what has weights, and of what PyTorch runs.
        foreign: the fraction of the time that PyTorch takes for its part.
        error: of outputs on the example, as a fraction of the largest.
        kind: "native", or "torch" where the kernels are not built.
    """

    channels: tuple[int, int]
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    zeros: int
    rows: tuple[ReportRow, ...]
    foreign: float
    error: float
    kind: str

    def way(self, way: str) -> tuple[ReportRow, ...]:
        """Rows that run in a way: "sparse", "dense", "apart" or "PyTorch"."""
        return tuple(row for row in self.rows if row.way == way)

    def __str__(self) -> str:
        lines = []
        for what in ("channels", "parameters", "multiply_adds"):
            before, after = getattr(self, what)
            share = f" ({after / before:.1%})" if before else ""
            lines.append(f"{what.replace('_', '-')}: {before:,} -> {after:,}{share}")
        if self.zeros:
            lines.append(f"besides {self.zeros:,} multiply-adds with weights that are 0, in layers that run dense")
        counts = [f"{len(self.way(way))} {way}" for way in ("sparse", "dense", "apart") if self.way(way)]
        lines.append(
            f"layers: {', '.join(counts) or 'none'}" + ("" if self.kind == "native" else "; all in PyTorch (no kernels)")
        )
        lines += [f"  {row}" for row in self.rows if row.way != "PyTorch"]
        if others := self.way("PyTorch"):
            lines.append(f"in PyTorch: {len(others)} operators, {self.foreign:.0%} of the time")
            lines += [f"  {row}" for row in others]
        lines.append(f"outputs on the example: within {self.error:.1e} of the model's, of the largest")
        return "\n".join(lines)


class _Ends(NamedTuple):
    """How what the model takes and returns becomes what a program takes and returns, and back.

    Attributes:
        given: of each input.
        returned: of each output: how, or what it is where it is the same for all inputs.
        spec: how outputs are packed.
    """

    given: tuple[Given, ...]
    returned: tuple[Any, ...]
    spec: pytree.TreeSpec

    def taken(self, inputs: Sequence[Any]) -> Iterator[Any]:
        """What the program is given."""
        if len(inputs) != len(self.given):
            raise ValueError(f"{len(inputs)} inputs for a network of {len(self.given)}")
        for i, (given, x) in enumerate(zip(self.given, inputs, strict=True)):
            yield given.floats(x, i)

    def run(self, runtime: Runtime, inputs: Sequence[Any]) -> Any:
        found = runtime(*self.taken(inputs))
        values = iter(found if isinstance(found, tuple) else (found,))
        outputs = [one.packed(next(values)) if isinstance(one, Returned) else one for one in self.returned]
        if not isinstance(inputs[0], Tensor):  # whole numbers are tensors by now
            outputs = [x.numpy() if isinstance(x, Tensor) else x for x in outputs]
        return pytree.tree_unflatten(outputs, self.spec)


class CompiledNetwork:
    """A compiled model: give it inputs, get its outputs.

    Attributes:
        program: what is computed.
        runtime: what runs it.
        report: what compiling did.
    """

    def __init__(self, program: Program, runtime: Runtime, report: Report, ends: Any) -> None:
        self.program, self.runtime, self.report, self._ends = program, runtime, report, ends

    def __call__(self, *inputs: Any) -> Any:
        """Inputs ``[batch, ...]`` like the example, tensors or NumPy arrays of any batch, to what the model returns.

        Floating-point numbers are float32, whole numbers and truth values of the model's kind.

        Raises:
            ValueError: other shapes than the model was compiled for, or numbers of another kind.
        """
        return self._ends.run(self.runtime, inputs)

    def save(self, path: str | Path) -> int:
        """Writes it to a file, which ``load_program`` reads; returns the number of bytes.

        Raises:
            ValueError: PyTorch runs a part of it, which files do not hold.
        """
        return save_program(self.program, path)

    def __repr__(self) -> str:
        return f"CompiledNetwork({self.program!r})"


def compile(
    model: nn.Module | torch.export.ExportedProgram,
    example: Tensor | Sequence[Tensor],
    *,
    threads: int = 1,
    strict: bool = False,
) -> CompiledNetwork:
    """Compiles a model for inputs of one size and any batch: smaller where parts have no effect, faster where weights are 0.

    >>> network = compile(model, images)
    >>> logits = network(images)
    >>> print(network.report)

    Args:
        model: any model that ``torch.export`` takes, of whatever precision, or what it has made of one with a free batch; it
            is read as in eval mode and not changed. Where its rule evaluates with other weights than it trains with, compile
            inside ``wiring.settled()``.
        example: an input ``[batch, ...]``, or several for a model that takes several, of floating-point or whole numbers or
            truth values. Real ones: what is compiled is tried on them.
        threads: how many work at once: on an image each, or together on one where there are fewer images.
        strict: whether it is an error that PyTorch runs a part of it.

    Returns:
        What computes the same on any number of inputs of the example's size, with ``program``, ``runtime`` and ``report``.

    Raises:
        ValueError: the model cannot be captured, does not take the example, or with ``strict`` has operators that are not
            compiled.
        RuntimeError: its rule evaluates with other weights than it trains with, outside of ``wiring.settled()``; or outputs
            differ from the model's.
    """
    inputs = _inputs(example)
    network = model_of(_module(model))
    with torch.device("cpu"):
        program, before, ends = _read(network, inputs)
        if strict and (beyond := foreign(program)):
            names = listing(sorted({f"{name_of(node.instruction)} in {node.name or 'the model'}" for node in beyond}))
            raise ValueError(f"strict=True, and this would run in PyTorch: {names}")
        program, timings = measured(program)
        runtime = Runtime(program, threads=threads)
        error = _checked(network, runtime, inputs, ends)
        report = _report(before, program, timings, runtime, list(ends.taken(inputs)), error)
    return CompiledNetwork(program, runtime, report, ends)


def _inputs(example: Any) -> tuple[Tensor, ...]:
    inputs = (example,) if isinstance(example, Tensor) else tuple(example) if isinstance(example, (tuple, list)) else ()
    if not inputs or not all(isinstance(x, Tensor) and x.ndim and not x.is_complex() and len(x) for x in inputs):
        given = [f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in inputs or (example,)]
        raise ValueError(
            f"example: {listing(given)}; expected a tensor [batch, ...] of numbers, of at least one image, or several of them"
        )
    return tuple(x.detach().to("cpu", torch.float32 if x.is_floating_point() else x.dtype).clone() for x in inputs)


def _module(model: nn.Module | torch.export.ExportedProgram) -> nn.Module:
    if not isinstance(model, torch.export.ExportedProgram):
        return model
    found = model.module()
    for module in found.modules():
        module.training = False  # it has no modes, and says that it trains
    return found


class _Before(NamedTuple):
    """What there is before anything is left out."""

    channels: int
    parameters: int
    multiply_adds: int


def _read(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Program, _Before, _Ends]:
    """The compacted model."""
    capture = captured(network, inputs)
    whole, ends = capture.program(), _Ends(tuple(capture.given), tuple(capture.returned), capture.spec)
    return shrunk(whole), _Before(_channels(whole), whole.num_parameters, whole.multiply_adds), ends


# --- whether it computes what the model computes ---


def _checked(network: nn.Module, runtime: Runtime, inputs: tuple[Tensor, ...], ends: _Ends) -> float:
    """How far outputs are from the model's, on the example and on three other inputs of its kind.

    Raises:
        RuntimeError: too far.
    """
    close = CLOSE if dtype_of(network) in (torch.float32, torch.float64) else 0.05
    error = _error(_expected(network, inputs), runtime, inputs, ends, close)
    others = _others(inputs)
    try:
        expected = _expected(network, others)
    except Exception:  # the model does not take just anything
        return error
    return max(error, _error(expected, runtime, others, ends, close))


def _others(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Three inputs that are drawn between the least and the largest number of the example, each another."""
    generator, found = torch.Generator().manual_seed(0), []
    for x in inputs:
        size = (3, *x.shape[1:])
        if x.dtype == torch.bool:
            found.append(x[:1].expand(size).clone())
        elif not x.is_floating_point():
            found.append(torch.randint(int(x.min()), int(x.max()) + 1, size, generator=generator, dtype=x.dtype))
        else:
            low, high = float(x.min()), float(x.max())
            low, high = (low, high) if low < high else (low - 1, high + 1)
            found.append(low + (high - low) * torch.rand(size, generator=generator))
    return tuple(found)


def _expected(network: nn.Module, inputs: tuple[Tensor, ...]) -> list[Any]:
    """What the model returns, as leaves; inputs, parameters and buffers stay as they are."""
    kind = dtype_of(network)
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    own = [*network.parameters(), *network.buffers()]
    kept = [tensor.detach().clone() for tensor in own]
    given = [x.clone().to(device, kind) if x.is_floating_point() else x.clone().to(device) for x in inputs]
    try:
        with evaluating(network), torch.no_grad():
            return pytree.tree_leaves(network(*given))
    finally:
        with torch.no_grad():
            for tensor, before in zip(own, kept, strict=True):
                if not torch.equal(tensor, before):
                    tensor.copy_(before)


def _error(expected: list[Any], runtime: Runtime, inputs: tuple[Tensor, ...], ends: _Ends, close: float) -> float:
    """How far outputs are from the model's, as a fraction of the largest, or of a thousandth where all are smaller.

    Raises:
        RuntimeError: too far.
    """
    worst = 0.0
    for a, b in zip(pytree.tree_leaves(ends.run(runtime, inputs)), expected, strict=True):
        if isinstance(b, Tensor) and a.shape != b.shape:
            raise RuntimeError(
                f"an output of the compiled model is {tuple(a.shape)} and the model's {tuple(b.shape)}; it is not given out: "
                "please report it as a fault of dnw"
            )
        if isinstance(b, Tensor) and b.numel():
            a, b = a.float(), b.detach().to("cpu", torch.float32)
            apart = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
            worst = max(worst, float(apart.max()) / max(1e-3, float(b.nan_to_num(0, 0, 0).abs().max())), key=_nan_is_most)
    if not worst < close:
        raise RuntimeError(
            f"outputs of the compiled model differ from the model's by {worst:.1e} of the largest; it is not given out. A "
            "model that draws random numbers in eval mode does that, and one that goes another way for other inputs, as "
            "nn.TransformerEncoder does with padding; otherwise please report it as a fault of dnw"
        )
    return worst


def _nan_is_most(error: float) -> float:
    return math.inf if math.isnan(error) else error


# --- the report ---


def _report(
    before: _Before, program: Program, timings: Sequence[Timing], runtime: Runtime, inputs: list[Tensor], error: float
) -> Report:
    multiply_adds = program.multiply_adds
    return Report(
        channels=(before.channels, _channels(program)),
        parameters=(before.parameters, program.num_parameters),
        multiply_adds=(before.multiply_adds, multiply_adds),
        zeros=sum(i.multiply_adds(*sizes, zeros=True) for i, sizes in program.walk()) - multiply_adds,
        rows=tuple(_rows(program, {timing.node: timing for timing in timings})),
        foreign=_foreign_share(runtime, inputs),
        error=error,
        kind=runtime.kind,
    )


def _channels(program: Program) -> int:
    """Of all values that are made; those that only stand side by side in others count once."""
    made = zip(program.nodes, program.sizes()[len(program.input_sizes) :], strict=True)
    return sum(size[0] if size else 1 for node, size in made if not isinstance(node.instruction, Concat))


def _rows(program: Program, timings: dict[int, Timing]) -> list[ReportRow]:
    sizes, first, rows = program.sizes(), len(program.input_sizes), []
    for number, node in enumerate(program.nodes):
        instruction, size, out = node.instruction, sizes[node.reads[0]], sizes[first + number]
        name = node.name or f"instruction {number}"
        row = ReportRow(name, "", size, out, 0, 0.0, "")
        if not is_native(node, sizes, first + number):
            rows.append(replace(row, kind=name_of(instruction), way="PyTorch"))
        elif isinstance(instruction, (Convolution, Linear)):
            weights = int(instruction.weight.count_nonzero())
            apart = isinstance(instruction, Convolution) and instruction.apart
            groups = 1 if apart or isinstance(instruction, Linear) else instruction.groups
            kernel = "x".join(map(str, instruction.weight.shape[2:]))
            kind = f"convolution {kernel}" if isinstance(instruction, Convolution) else "matrix"
            way = "apart" if apart else "sparse" if instruction.sparse or groups > 1 else "dense"
            density = weights / max(1, instruction.weight.numel() * groups)
            rows.append(replace(row, kind=kind, weights=weights, density=density, way=way, timing=timings.get(number)))
    return rows


def _foreign_share(runtime: Runtime, inputs: list[Tensor]) -> float:
    """Which fraction of the time PyTorch takes, on the example."""
    if runtime.kind == "torch":
        return 1.0
    if not foreign(runtime.program):
        return 0.0
    seconds = [0.0, 0.0]
    for warm in (False, True):
        for native, taken in runtime.timed(inputs):
            seconds[native] += taken if warm else 0.0
    return seconds[False] / (sum(seconds) or 1.0)
