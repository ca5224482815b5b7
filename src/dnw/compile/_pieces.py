"""A program cut where PyTorch takes over: pieces that kernels run, and pieces that PyTorch runs between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dnw.compile._program import Instruction, Node, Program, Size
from dnw.compile._tasks import EMITTERS
from dnw.compile._torch import Foreign


@dataclass(frozen=True)
class Piece:
    """Some nodes of a program.

    Attributes:
        native: whether kernels run it.
        reads, writes: the values that come from outside of it, and those that are read outside of it.
        program: of those nodes alone.
        sizes: of what it writes.
    """

    native: bool
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    program: Program
    sizes: tuple[Size, ...]


def is_native(node: Node, sizes: list[Size], made: int) -> bool:
    """Whether kernels run a node."""
    return type(node.instruction) in EMITTERS and all(0 < len(sizes[i]) <= 3 for i in (*node.reads, made))


def foreign(program: Program) -> list[Node]:
    """What PyTorch runs."""
    sizes, first = program.sizes(), len(program.input_sizes)
    return [node for number, node in enumerate(program.nodes) if not is_native(node, sizes, first + number)]


def name_of(instruction: Instruction) -> str:
    """What something that PyTorch runs is called."""
    return instruction.name if isinstance(instruction, Foreign) else f"{type(instruction).__name__.lower()} of many dimensions"


def pieces(program: Program) -> list[Piece]:
    """All nodes, in order. A program of native nodes alone is one piece."""
    sizes, first = program.sizes(), len(program.input_sizes)
    kinds = [is_native(node, sizes, first + number) for number, node in enumerate(program.nodes)]
    cuts = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
    bounds = list(zip([0, *cuts], [*cuts, len(kinds)], strict=True))
    return [_piece(program, sizes, kinds[start] if kinds else True, start, stop) for start, stop in bounds]


def _piece(program: Program, sizes: list[Size], native: bool, start: int, stop: int) -> Piece:
    first = len(program.input_sizes)
    inside = range(first + start, first + stop)
    nodes = program.nodes[start:stop]
    reads = tuple(dict.fromkeys(i for node in nodes for i in node.reads if i not in inside))
    later = {i for node in program.nodes[stop:] for i in node.reads} | set(program.outputs)
    if start == 0 and stop == len(program.nodes):
        return Piece(native, tuple(range(first)), program.outputs, program, program.output_sizes)
    writes = tuple(i for i in inside if i in later)
    at = {i: n for n, i in enumerate([*reads, *inside])}
    inner = tuple(Node(node.instruction, tuple(at[i] for i in node.reads)) for node in nodes)
    made = Program(inner, tuple(sizes[i] for i in reads), tuple(at[i] for i in writes))
    return Piece(native, reads, writes, made, made.output_sizes)


def flattened(values: list[Tensor], sizes: tuple[Size, ...]) -> Tensor:
    """Inputs of a batch one after the other, each image's together."""
    if len(values) == 1:
        return values[0]
    return torch.cat([value.reshape(len(value), math.prod(size)) for value, size in zip(values, sizes, strict=True)], dim=1)


def unflattened(flat: Tensor, sizes: tuple[Size, ...]) -> Iterator[Tensor]:
    """Outputs of a batch, apart again."""
    start, flat = 0, flat.reshape(len(flat), sum(map(math.prod, sizes)))
    for size in sizes:
        count = math.prod(size)
        yield flat[:, start : start + count].reshape(len(flat), *size)
        start += count
