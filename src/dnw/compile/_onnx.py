"""Compacted networks as ONNX: convolutions, sums and ReLU, nothing that would remind of masks.

Contract: edges become dense 1x1 convolutions, since no runtime for ONNX gains from zeros. The batch is free, heights and
widths are those that the program was compiled for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnw._files import write_whole
from dnw.compile._program import (
    Affine,
    Constant,
    Convolution,
    Edges,
    Graph,
    InstanceNorm,
    Instruction,
    Linear,
    Mean,
    Pick,
    Program,
    Rectify,
    Restore,
    Size,
    require_program,
)

_OPSET, _IR_VERSION = 18, 10


def save_onnx(program: Program, path: str | Path) -> int:
    """Writes a compacted network as an ONNX file of one input, ``images``, and one output; returns the number of bytes.

    Raises:
        ValueError: no compacted network.
        ModuleNotFoundError: the package ``onnx`` is not installed (``pip install dnw[onnx]``).
    """
    require_program(program)
    try:
        from onnx import checker
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("ONNX files need the package onnx: pip install dnw[onnx]", name=error.name) from None
    model = _Writer(program).model()
    checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    write_whole(Path(path), content)
    return len(content)


class _Writer:
    """Collects the nodes and numbers of an ONNX graph."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[Any] = []
        self.numbers: list[Any] = []

    def model(self) -> Any:
        from onnx import TensorProto, helper

        x, size = "images", tuple(self.program.input_size)
        for instruction in self.program.instructions:
            x, size = self._add(instruction, x, size), instruction.check(size)
        self._node("Identity", x, name="outputs")
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *sides])
            for name, sides in (("images", self.program.input_size), ("outputs", size))
        ]
        graph = helper.make_graph(self.nodes, "dnw", ends[:1], ends[1:], self.numbers)
        opset = helper.make_opsetid("", _OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="dnw")

    def _add(self, instruction: Instruction, x: str, size: Size) -> str:
        """Appends an instruction on maps of a size; returns the name of what comes out."""
        ones = [1] * (len(size) - 1)
        if isinstance(instruction, Graph):
            return self._graph(instruction, x, size)
        if isinstance(instruction, Edges):
            return self._sums(x, instruction.matrix()[:, :, None, None], instruction.constant)
        if isinstance(instruction, Convolution):
            rows, columns = instruction.padding
            settings: dict[str, Any] = {
                "strides": instruction.stride,
                "pads": (rows, columns, rows, columns),
                "group": instruction.groups,
            }
            return self._sums(x, instruction.weight, instruction.constant, **settings)
        if isinstance(instruction, Affine):
            scale, shift = (self._number(t.view(-1, *ones)) for t in (instruction.scale, instruction.shift))
            return self._node("Add", self._node("Mul", x, scale), shift)
        if isinstance(instruction, InstanceNorm):
            scale, shift = self._number(instruction.scale), self._number(instruction.shift)
            return self._node("InstanceNormalization", x, scale, shift, epsilon=instruction.eps)
        if isinstance(instruction, Rectify):
            return self._node("Relu", x)
        if isinstance(instruction, Mean):
            return self._mean(instruction, x, size)
        if isinstance(instruction, Linear):
            return self._node("Gemm", x, self._number(instruction.weight), self._number(instruction.bias), transB=1)
        if isinstance(instruction, Pick):
            return self._node("Gather", x, self._number(instruction.channels), axis=1)
        assert isinstance(instruction, Restore)
        return self._restore(instruction, x)

    def _sums(self, x: str, weight: Tensor, constant: Constant | None, **settings: Any) -> str:
        inputs = [x, self._number(weight)]
        if constant is not None and not len(constant.channels):
            inputs.append(self._number(constant.base))
        sums = self._node("Conv", *inputs, kernel_shape=tuple(weight.shape[2:]), **settings)
        if constant is None or not len(constant.channels):
            return sums
        return self._node("Add", sums, self._number(constant.maps()[None]))

    def _graph(self, graph: Graph, x: str, size: Size) -> str:
        for instruction in graph.inputs:
            x, size = self._add(instruction, x, size), instruction.check(size)
        states = x
        for edges, node in graph.levels:
            new, width = self._add(edges, states, size), edges.check(size)
            for instruction in node:
                new, width = self._add(instruction, new, width), instruction.check(width)
            states, size = self._node("Concat", states, new, axis=1), (size[0] + width[0], *size[1:])
        return self._add(graph.outputs, states, size)

    def _mean(self, mean: Mean, x: str, size: Size) -> str:
        if mean.start or mean.stop < max(size[1:]):
            ends = [[mean.start] * 2, [min(mean.stop, side) for side in size[1:]], [2, 3]]
            x = self._node("Slice", x, *(self._number(torch.tensor(end)) for end in ends))
        return self._node("ReduceMean", x, self._number(torch.tensor([2, 3])), keepdims=0)

    def _restore(self, restore: Restore, x: str) -> str:
        """What comes in beside the constant channels, in the right order."""
        batch = self._node("Shape", x, start=0, end=1)
        shape = self._node("Concat", batch, self._number(torch.tensor(restore.constant.shape)), axis=0)
        whole = self._node("Expand", self._number(restore.constant[None]), shape)
        if not len(restore.channels):
            return whole
        order = torch.arange(len(restore.constant))
        order[restore.channels] = len(order) + torch.arange(len(restore.channels))
        return self._node("Gather", self._node("Concat", whole, x, axis=1), self._number(order), axis=1)

    def _number(self, values: Tensor) -> str:
        from onnx import numpy_helper

        name = f"n{len(self.numbers)}"
        self.numbers.append(numpy_helper.from_array(values.cpu().contiguous().numpy(), name))
        return name

    def _node(self, kind: str, *inputs: str, name: str | None = None, **settings: Any) -> str:
        from onnx import helper

        name = name or f"x{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **settings))
        return name
