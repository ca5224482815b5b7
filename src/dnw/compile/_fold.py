"""Scales and shifts become part of the sums that come before them: one instruction less, the same numbers.

Contract: what a program computes stays the same, up to rounding; the products are made in double precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from dnw.compile._program import Affine, Constant, Convolution, Edges, Graph, Instruction, Linear, Size


def folded(instructions: Iterable[Instruction], size: Size) -> tuple[Instruction, ...]:
    """Instructions for inputs of a size, without the scales and shifts that directly follow sums."""
    found: list[Instruction] = []
    for instruction in instructions:
        out = instruction.check(size)
        if isinstance(instruction, Graph):
            instruction = replace(instruction, levels=tuple(_level(edges, node, out[1:]) for edges, node in instruction.levels))
            first = instruction.inputs[0] if instruction.inputs else None
            if isinstance(first, Affine) and _absorb(found, first, size):
                instruction = replace(instruction, inputs=instruction.inputs[1:])
        elif isinstance(instruction, Affine) and _absorb(found, instruction, size):
            size = out
            continue
        found.append(instruction)
        size = out
    return tuple(found)


def _level(edges: Edges, node: tuple[Instruction, ...], sides: Size) -> tuple[Edges, tuple[Instruction, ...]]:
    if node and isinstance(node[0], Affine):
        return _scaled(edges, node[0], sides), node[1:]
    return edges, node


def _absorb(found: list[Instruction], affine: Affine, size: Size) -> bool:
    """Makes a scale and shift part of the last instruction, where that one adds up; says whether it has."""
    last = found[-1] if found else None
    if isinstance(last, Graph):
        found[-1] = replace(last, outputs=_scaled(last.outputs, affine, size[1:]))
    elif isinstance(last, Edges):
        found[-1] = _scaled(last, affine, size[1:])
    elif isinstance(last, Convolution):
        weight, constant = _times(last.weight, affine.scale), _constant(last.constant, affine, size[1:])
        found[-1] = replace(last, weight=weight, constant=constant)
    elif isinstance(last, Linear):
        bias = last.bias.double() * affine.scale.double() + affine.shift.double()
        found[-1] = Linear(_times(last.weight, affine.scale), bias.float())
    else:
        return False
    return True


def _scaled(edges: Edges, affine: Affine, sides: Size) -> Edges:
    scale = torch.repeat_interleave(affine.scale, edges.starts.diff())
    return replace(edges, weight=_times(edges.weight, scale), constant=_constant(edges.constant, affine, sides))


def _constant(constant: Constant | None, affine: Affine, sides: Size) -> Constant:
    """What is added to sums that are maps of some height and width, scaled and shifted."""
    if constant is None:
        nothing = torch.empty(0, dtype=torch.int64)
        rows, columns = (torch.zeros(side, dtype=torch.int64) for side in sides)
        return Constant(affine.shift, nothing, affine.shift.new_zeros(0, 1, 1), rows, columns)
    base = constant.base.double() * affine.scale.double() + affine.shift.double()
    return replace(constant, base=base.float(), core=_times(constant.core, affine.scale[constant.channels]))


def _times(numbers: Tensor, scale: Tensor) -> Tensor:
    """Each row times its scale."""
    return (numbers.double() * scale.double().view(-1, *[1] * (numbers.ndim - 1))).float()
