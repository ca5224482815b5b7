"""Compacted networks as ONNX: convolutions, sums and ReLU, nothing that would remind of masks.

Contract: edges become dense 1x1 convolutions, since no runtime for ONNX gains from zeros. The batch is free, heights and
widths are those that the program was compiled for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnw._files import write_whole
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
    Beside,
    Constant,
    Convolution,
    InstanceNorm,
    Instruction,
    Linear,
    Pick,
    Program,
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
        from onnx import helper

        sizes, program = self.program.sizes(), self.program
        one = len(program.input_sizes) == 1
        names = ["images" if one else f"inputs_{i}" for i in range(len(program.input_sizes))]
        ends = [self._end(name, size) for name, size in zip(names, program.input_sizes, strict=True)]
        count = len(names)
        for node, made in zip(program.nodes, sizes[count:], strict=True):
            self._made = made
            names.append(self.add(node.instruction, [names[i] for i in node.reads], [sizes[i] for i in node.reads]))
        outputs = []
        for number, i in enumerate(program.outputs):
            name = "outputs" if len(program.outputs) == 1 else f"outputs_{number}"
            self._node("Identity", names[i], name=name)
            outputs.append(self._end(name, sizes[i]))
        graph = helper.make_graph(self.nodes, "dnw", ends, outputs, self.numbers)
        opset = helper.make_opsetid("", _OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="dnw")

    @staticmethod
    def _end(name: str, size: Size) -> Any:
        from onnx import TensorProto, helper

        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *size])

    def add(self, instruction: Instruction, names: Sequence[str], sizes: Sequence[Size]) -> str:
        """Appends an instruction on values of some sizes; returns the name of what comes out."""
        emitter = EMITTERS.get(type(instruction))
        if emitter is None:
            raise ValueError(
                f"PyTorch runs {getattr(instruction, 'name', type(instruction).__name__)}, which is not written as ONNX"
            )
        return emitter(self, instruction, names, sizes)

    def _affine(self, instruction: Affine, names: Sequence[str], sizes: Sequence[Size]) -> str:
        ones = [1] * (len(sizes[0]) - 1)
        scale, shift = (self._number(t.view(-1, *ones)) for t in (instruction.scale, instruction.shift))
        return self._node("Add", self._node("Mul", names[0], scale), shift)

    def _convolution(self, instruction: Convolution, names: Sequence[str], sizes: Sequence[Size]) -> str:
        rows, columns = instruction.padding
        settings: dict[str, Any] = {
            "strides": instruction.stride,
            "pads": (rows, columns, rows, columns),
            "dilations": instruction.dilation,
            "group": instruction.groups,
        }
        return self._sums(names[0], instruction.weight, instruction.constant, **settings)

    def _linear(self, instruction: Linear, names: Sequence[str], sizes: Sequence[Size]) -> str:
        x, ones = names[0], len(sizes[0]) - 1
        if not ones:
            return self._node("Gemm", x, self._number(instruction.weight), self._number(instruction.bias), transB=1)
        weight = self._number(instruction.weight.reshape(*instruction.weight.shape, *[1] * ones))
        return self._node("Conv", x, weight, self._number(instruction.bias), kernel_shape=[1] * ones)

    def _activation(self, instruction: Activation, names: Sequence[str], sizes: Sequence[Size]) -> str:
        x, kind = names[0], instruction.kind
        if kind == "clamp":
            ends = (self._number(torch.tensor(max(-3.4e38, min(3.4e38, end)))) for end in instruction.numbers)
            return self._node("Clip", x, *ends)
        if kind == "silu":
            return self._node("Mul", x, self._node("Sigmoid", x))
        if kind.startswith("gelu"):
            return self._gelu(x, kind == "gelu_tanh")
        names_ = {"relu": "Relu", "leaky_relu": "LeakyRelu", "elu": "Elu", "sigmoid": "Sigmoid", "tanh": "Tanh"}
        names_ |= {"hardswish": "HardSwish", "hardsigmoid": "HardSigmoid"}
        settings: dict[str, Any] = {"alpha": instruction.first} if kind in ("leaky_relu", "elu") else {}
        settings |= {"alpha": 1 / 6} if kind == "hardsigmoid" else {}
        return self._node(names_[kind], x, **settings)

    def _gelu(self, x: str, by_tanh: bool) -> str:
        def number(value: float) -> str:
            return self._number(torch.tensor(value))

        if by_tanh:
            cube = self._node("Mul", self._node("Mul", x, x), self._node("Mul", x, number(0.044715)))
            inner = self._node("Tanh", self._node("Mul", self._node("Add", x, cube), number(0.7978845608)))
        else:
            inner = self._node("Erf", self._node("Mul", x, number(0.7071067812)))
        return self._node("Mul", self._node("Mul", x, number(0.5)), self._node("Add", inner, number(1.0)))

    def _joined(self, kind: str, names: Sequence[str], sizes: Sequence[Size]) -> str:
        ndim = max(map(len, sizes))
        spread = []
        for name, size in zip(names, sizes, strict=True):
            more = list(range(1 + len(size), 1 + ndim))
            spread.append(self._node("Unsqueeze", name, self._number(torch.tensor(more))) if more else name)
        return self._node(kind, *spread)

    def _pool(self, pool: Pool, names: Sequence[str], sizes: Sequence[Size]) -> str:
        (size,) = sizes
        windows = [d * (k - 1) + 1 for k, d in zip(pool.kernel, pool.dilation, strict=True)]
        steps = list(zip(pool.check(size)[1:], pool.stride, windows, size[1:], pool.padding, strict=True))
        ends = [max(0, (count - 1) * stride + window - side - pad) for count, stride, window, side, pad in steps]
        explicit = pool.largest or not pool.padded or all(end <= pad for end, pad in zip(ends, pool.padding, strict=True))
        if not (pool.ceil and explicit):  # runtimes disagree about windows that begin beyond the end, so we say where it is
            ends = list(pool.padding)
        if pool.ceil and not explicit and any(-(-(n + 2 * p - w) // s) + 1 != count for count, s, w, n, p in steps):
            raise ValueError("a mean of windows with ceil_mode=True, the last of which PyTorch leaves out; ONNX has none")
        settings: dict[str, Any] = {
            "kernel_shape": pool.kernel,
            "strides": pool.stride,
            "pads": (*pool.padding, *ends),
            "ceil_mode": int(pool.ceil and not explicit),
        }
        if pool.largest:
            return self._node("MaxPool", names[0], dilations=pool.dilation, **settings)
        return self._node("AveragePool", names[0], count_include_pad=int(pool.padded), **settings)

    def _adaptive_mean(self, mean: AdaptiveMean, names: Sequence[str], sizes: Sequence[Size]) -> str:
        x = names[0]
        for axis, (side, count) in enumerate(zip(sizes[0][1:], (mean.height, mean.width), strict=True), 2):
            matrix = torch.zeros(side, count)
            for i in range(count):
                start, stop = i * side // count, -(-(i + 1) * side // count)
                matrix[start:stop, i] = 1 / (stop - start)
            if axis == 2:
                x = self._node("MatMul", self._number(matrix.t()), x)
            else:
                x = self._node("MatMul", x, self._number(matrix))
        return x

    def _layer_norm(self, norm: LayerNorm, names: Sequence[str], sizes: Sequence[Size]) -> str:
        size, x = sizes[0], names[0]
        whole = self._number(torch.tensor([0, *size]))
        apart = [0, norm.groups, -1] if norm.over_places else [0, norm.groups, size[0] // norm.groups, *size[1:]]
        x = self._node("Reshape", x, self._number(torch.tensor(apart)))
        axes = self._number(torch.tensor([2]))
        centred = self._node("Sub", x, self._node("ReduceMean", x, axes, keepdims=1))
        spread = self._node("ReduceMean", self._node("Mul", centred, centred), axes, keepdims=1)
        spread = self._node("Sqrt", self._node("Add", spread, self._number(torch.tensor(norm.eps))))
        x = self._node("Reshape", self._node("Div", centred, spread), whole)
        return self._affine(Affine(norm.scale, norm.shift), [x], sizes)

    def _attention(self, attention: Attention, names: Sequence[str], sizes: Sequence[Size]) -> str:
        heads = [
            self._node("Reshape", name, self._number(torch.tensor([0, attention.heads, size[0] // attention.heads, size[1]])))
            for name, size in zip(names, sizes, strict=True)
        ]
        queries = self._node(
            "Mul", self._node("Transpose", heads[0], perm=[0, 1, 3, 2]), self._number(torch.tensor(attention.scale))
        )
        scores = self._node("MatMul", queries, heads[1])
        if attention.mask is not None:
            scores = self._node("Add", scores, self._number(attention.mask))
        weights = self._node("Softmax", scores, axis=-1)
        found = self._node("MatMul", heads[2], self._node("Transpose", weights, perm=[0, 1, 3, 2]))
        return self._node("Reshape", found, self._number(torch.tensor([0, *self._made])))

    def _crop(self, crop: Crop, names: Sequence[str], sizes: Sequence[Size]) -> str:
        ends = ([crop.start], [crop.stop], [1 + crop.axis], [crop.step])
        return self._node("Slice", names[0], *(self._number(torch.tensor(end)) for end in ends))

    def _rearrange(self, rearrange: Rearrange, names: Sequence[str], sizes: Sequence[Size]) -> str:
        x = self._node("Reshape", names[0], self._number(torch.tensor([0, *rearrange.split])))
        x = self._node("Transpose", x, perm=[0, *(1 + axis for axis in rearrange.order)])
        return self._node("Reshape", x, self._number(torch.tensor([0, *rearrange.size])))

    def _place_mean(self, mean: PlaceMean, names: Sequence[str], sizes: Sequence[Size]) -> str:
        axes = torch.arange(2, 1 + len(sizes[0]))
        return self._node("ReduceMean", names[0], self._number(axes), keepdims=0)

    def _sums(self, x: str, weight: Tensor, constant: Constant | None, **settings: Any) -> str:
        inputs = [x, self._number(weight)]
        if constant is not None and not len(constant.channels):
            inputs.append(self._number(constant.base))
        sums = self._node("Conv", *inputs, kernel_shape=tuple(weight.shape[2:]), **settings)
        if constant is None or not len(constant.channels):
            return sums
        return self._node("Add", sums, self._number(constant.maps()[None]))

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


EMITTERS: dict[type[Instruction], Callable[..., str]] = {
    Convolution: _Writer._convolution,
    Affine: _Writer._affine,
    InstanceNorm: lambda writer, norm, names, sizes: writer._node(
        "InstanceNormalization", names[0], writer._number(norm.scale), writer._number(norm.shift), epsilon=norm.eps
    ),
    Activation: _Writer._activation,
    PlaceMean: _Writer._place_mean,
    Linear: _Writer._linear,
    Beside: lambda writer, beside, names, sizes: writer._node(
        "Add", writer._linear(beside.linear, names, sizes), writer._number(beside.constant[None])
    ),
    Sum: lambda writer, _, names, sizes: writer._joined("Add", names, sizes),
    Product: lambda writer, _, names, sizes: writer._joined("Mul", names, sizes),
    Shift: lambda writer, shift, names, sizes: writer._node("Add", names[0], writer._number(shift.constant[None])),
    Pad: lambda writer, pad, names, sizes: writer._node(
        "Pad", names[0], writer._number(torch.tensor([0, 0, pad.top, pad.left, 0, 0, pad.bottom, pad.right]))
    ),
    Pool: _Writer._pool,
    AdaptiveMean: _Writer._adaptive_mean,
    Concat: lambda writer, concat, names, sizes: writer._node("Concat", *names, axis=1 + concat.axis),
    Crop: _Writer._crop,
    Rearrange: _Writer._rearrange,
    LayerNorm: _Writer._layer_norm,
    Attention: _Writer._attention,
    Pick: lambda writer, pick, names, sizes: writer._node("Gather", names[0], writer._number(pick.channels), axis=1),
    Restore: lambda writer, restore, names, sizes: writer._restore(restore, names[0]),
}
"""What each instruction becomes: the table of ONNX."""
