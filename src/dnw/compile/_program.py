"""A compacted network: instructions on maps, with all their numbers inside.

Contract: plain data that runs on any device with PyTorch alone. What an instruction leaves out (dead and constant channels) has
been folded into others; a program computes what its network computes in eval mode. Sizes are ``(channels, height, width)`` or
``(channels,)``, without the batch.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, ...]
Indices = Annotated[Tensor, "int64"]
"""What a field of whole numbers is declared as; all other tensors of a program hold weights."""


class Instruction(ABC):
    """One instruction of a program."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Runs on ``[batch, *size]``."""

    @abstractmethod
    def check(self, size: Size) -> Size:
        """The size of what goes out; raises ``ValueError`` where the instruction's numbers do not fit together or the input."""

    def multiply_adds(self, size: Size, *, zeros: bool = False) -> int:
        """Of products with weights that are not 0, for one input of a size; or also with the zeros that it computes with."""
        return 0


def _num_weights(weight: Tensor, zeros: bool) -> int:
    return weight.numel() if zeros else int(weight.count_nonzero())


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


@dataclass(frozen=True, eq=False)
class Constant:
    """Maps that are added to sums: one number per channel, and for some channels a map besides.

    Such maps are made by constant nodes. They are the same but for pixels near the border, so rows and columns that are
    equal in all of them are stored once.

    Attributes:
        base: ``[channels]``.
        channels: int64: those that have a map.
        core: ``[maps, distinct rows, distinct columns]``, beside the base.
        rows, columns: int64 ``[h]`` and ``[w]``: which of the core's rows and columns stand where.
    """

    base: Tensor
    channels: Indices
    core: Tensor
    rows: Indices
    columns: Indices

    @classmethod
    def of(cls, maps: Tensor) -> Constant | None:
        """From maps ``[channels, h, w]``; None where they are 0."""
        if not maps.any():
            return None
        base = maps[:, maps.shape[1] // 2, maps.shape[2] // 2]
        beside = maps - base[:, None, None]
        channels = beside.flatten(1).any(1).nonzero().flatten()
        beside = beside[channels]
        rows, columns = _runs(beside.transpose(0, 1)), _runs(beside.permute(2, 0, 1))
        core = beside[:, rows.unique_consecutive(return_counts=True)[1].cumsum(0) - 1]
        core = core[:, :, columns.unique_consecutive(return_counts=True)[1].cumsum(0) - 1]
        return cls(base.float(), channels, core.float(), rows, columns)

    def maps(self) -> Tensor:
        """``[channels, h, w]``."""
        whole = self.base[:, None, None].expand(-1, len(self.rows), len(self.columns)).clone()
        whole[self.channels] += self.core[:, self.rows][:, :, self.columns]
        return whole

    def added(self, x: Tensor) -> Tensor:
        """Maps ``[batch, channels, h, w]`` with it added."""
        x = x + self.base[:, None, None]
        if len(self.channels):
            x[:, self.channels] += self.core[:, self.rows][:, :, self.columns]
        return x

    def check(self, size: Size) -> None:
        """Raises ``ValueError`` unless it fits maps of a size."""
        ints = (self.channels, self.rows, self.columns)
        _require(all(t.ndim == 1 and t.dtype == torch.int64 for t in ints), "constants of another form")
        _require(self.base.ndim == 1, "constants of another form")
        _require((len(self.base), len(self.rows), len(self.columns)) == size, f"constants for maps {size}")
        _require(self.core.ndim == 3 and len(self.core) == len(self.channels), "constants without their maps")
        limits = (size[0], *self.core.shape[1:])
        inside = all(not len(t) or 0 <= int(t.min()) <= int(t.max()) < n for t, n in zip(ints, limits, strict=True))
        _require(inside or not len(self.channels), "constants for other maps")


def _runs(lines: Tensor) -> Tensor:
    """Numbers for lines ``[lines, ...]``, the same for a line that equals the one before it."""
    new = (lines[1:] != lines[:-1]).flatten(1).any(1)
    return torch.cat([new.new_zeros(1), new]).long().cumsum(0)


@dataclass(frozen=True, eq=False)
class Edges(Instruction):
    """Sums along edges, from ``num_sources`` maps to as many as there are targets.

    Attributes:
        starts: int64 ``[targets + 1]``: the edges of target t are those from ``starts[t]`` to ``starts[t + 1]``.
        sources: int64 ``[edges]``, increasing within each target.
        weight: ``[edges]``.
        num_sources: channels that come in.
        constant: what constant nodes add to the targets.
        dense: whether it is run as a matrix with zeros, because that is faster where there are few of them.
    """

    starts: Indices
    sources: Indices
    weight: Tensor
    num_sources: int
    constant: Constant | None
    dense: bool = False

    @classmethod
    def of(cls, matrix: Tensor, constant: Constant | None) -> Edges:
        """From a matrix ``[targets, sources]``, whose zeros are no edges."""
        targets, sources = matrix.nonzero(as_tuple=True)
        starts = torch.zeros(matrix.shape[0] + 1, dtype=torch.int64)
        starts[1:] = targets.bincount(minlength=matrix.shape[0]).cumsum(0)
        return cls(starts, sources, matrix[targets, sources].float(), matrix.shape[1], constant)

    @property
    def num_targets(self) -> int:
        return len(self.starts) - 1

    def matrix(self) -> Tensor:
        """The weights as a matrix ``[targets, sources]``."""
        targets = torch.repeat_interleave(torch.arange(self.num_targets, device=self.starts.device), self.starts.diff())
        dense = self.weight.new_zeros(self.num_targets, self.num_sources)
        dense[targets, self.sources] = self.weight
        return dense

    def __call__(self, x: Tensor) -> Tensor:
        if self.dense:
            sums = F.conv2d(x, self.matrix()[:, :, None, None])
            return sums if self.constant is None else self.constant.added(sums)
        batch, _, height, width = x.shape
        _silence_sparse_tensors()
        shape = (self.num_targets, self.num_sources)
        sparse = torch.sparse_csr_tensor(self.starts, self.sources, self.weight, shape, check_invariants=False)
        sums = sparse @ x.transpose(0, 1).reshape(self.num_sources, batch * height * width)
        sums = sums.view(self.num_targets, batch, height, width).transpose(0, 1)
        return sums if self.constant is None else self.constant.added(sums)

    def check(self, size: Size) -> Size:
        starts, sources = self.starts, self.sources
        _require(len(size) == 3 and size[0] == self.num_sources, f"edges from {self.num_sources} maps, given {size}")
        _require(starts.ndim == sources.ndim == self.weight.ndim == 1 and len(starts) > 1, "edges in lists of another form")
        _require(starts.dtype == sources.dtype == torch.int64, "edges of another type")
        _require(
            int(starts[0]) == 0 and bool((starts.diff() >= 0).all()) and int(starts[-1]) == len(sources) == len(self.weight),
            "edges that begin or end where they must not",
        )
        _require(not len(sources) or 0 <= int(sources.min()) <= int(sources.max()) < self.num_sources, "edges from no node")
        first = torch.zeros(len(sources) + 1, dtype=torch.bool, device=sources.device)
        first[starts] = True
        _require(bool((first[1:-1] | (sources.diff() > 0)).all()), "edges in another order")
        out = (self.num_targets, *size[1:])
        if self.constant is not None:
            self.constant.check(out)
        return out

    def multiply_adds(self, size: Size, *, zeros: bool = False) -> int:
        weights = self.num_targets * self.num_sources if zeros and self.dense else len(self.weight)
        return weights * size[1] * size[2]


@cache
def _silence_sparse_tensors() -> None:
    """Lets torch say once, unheard, that sparse tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


@dataclass(frozen=True, eq=False)
class Affine(Instruction):
    """Scale and shift of each channel."""

    scale: Tensor
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)

    def check(self, size: Size) -> Size:
        _require(tuple(self.scale.shape) == tuple(self.shift.shape) == size[:1], f"a norm of {len(self.scale)}, given {size}")
        return size


@dataclass(frozen=True, eq=False)
class InstanceNorm(Instruction):
    """Normalisation of each map of each image by its own mean and variance, then scale and shift."""

    scale: Tensor
    shift: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, weight=self.scale, bias=self.shift, eps=self.eps)

    def check(self, size: Size) -> Size:
        _require(tuple(self.scale.shape) == tuple(self.shift.shape) == size[:1], f"a norm of {len(self.scale)}, given {size}")
        _require(len(size) == 3 and self.eps > 0, f"an instance norm with eps={self.eps} for maps {size}")
        return size


@dataclass(frozen=True, eq=False)
class Rectify(Instruction):
    """ReLU."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def check(self, size: Size) -> Size:
        return size


@dataclass(frozen=True, eq=False)
class Convolution(Instruction):
    """A convolution, dense or one per channel, and what is added: per channel, per pixel, or nothing."""

    weight: Tensor
    constant: Constant | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix: from all maps to all maps, pixel by pixel."""
        return self.weight.shape[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1

    def __call__(self, x: Tensor) -> Tensor:
        sums = F.conv2d(x, self.weight, stride=self.stride, padding=self.padding, groups=self.groups)
        return sums if self.constant is None else self.constant.added(sums)

    def check(self, size: Size) -> Size:
        _require(len(size) == 3 and self.weight.ndim == 4, f"a convolution of {tuple(self.weight.shape)}, given {size}")
        targets, sources, *kernel = self.weight.shape
        _require(self.groups == 1 or (self.groups == targets and sources == 1), f"a convolution of {self.groups} groups")
        _require(max(*self.stride, *self.padding) < 1 << 15, f"stride {self.stride}, padding {self.padding}")
        _require(sources * self.groups == size[0], f"a convolution of {sources * self.groups} maps, given {size}")
        _require(min(self.stride) > 0 and min(self.padding) >= 0, f"stride {self.stride}, padding {self.padding}")
        sides = zip(size[1:], kernel, self.stride, self.padding, strict=True)
        height, width = ((side + 2 * pad - k) // stride + 1 for side, k, stride, pad in sides)
        _require(min(height, width) > 0, f"a kernel of {tuple(kernel)} for maps {size}")
        if self.constant is not None:
            self.constant.check((targets, height, width))
        return targets, height, width

    def multiply_adds(self, size: Size, *, zeros: bool = False) -> int:
        return _num_weights(self.weight, zeros) * math.prod(self.check(size)[1:])


@dataclass(frozen=True, eq=False)
class Mean(Instruction):
    """The mean of rows and columns ``start`` to ``stop`` of each map: one number per channel."""

    start: int
    stop: int

    def __call__(self, x: Tensor) -> Tensor:
        return x[:, :, self.start : self.stop, self.start : self.stop].mean(dim=(2, 3))

    def check(self, size: Size) -> Size:
        _require(len(size) == 3 and 0 <= self.start < min(self.stop, *size[1:]), f"a mean from {self.start} of maps {size}")
        return size[:1]


@dataclass(frozen=True, eq=False)
class Linear(Instruction):
    """A matrix ``[targets, sources]`` and a bias."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def check(self, size: Size) -> Size:
        shape = tuple(self.weight.shape)
        _require(
            len(shape) == 2 and shape[1:] == size and tuple(self.bias.shape) == shape[:1], f"a matrix {shape}, given {size}"
        )
        return shape[:1]

    def multiply_adds(self, size: Size, *, zeros: bool = False) -> int:
        return _num_weights(self.weight, zeros)


@dataclass(frozen=True, eq=False)
class Graph(Instruction):
    """A static graph, level by level: each level's nodes read all earlier levels; the outputs are sums.

    Attributes:
        inputs: what the input nodes do with what comes in.
        levels: for each later level the edges into it, from the states of all earlier levels one after the other, and what its
            nodes do with the sums.
        outputs: the edges into the outputs, from the states of all levels.
    """

    inputs: tuple[Instruction, ...]
    levels: tuple[tuple[Edges, tuple[Instruction, ...]], ...]
    outputs: Edges

    def __call__(self, x: Tensor) -> Tensor:
        states = run(self.inputs, x)
        for edges, node in self.levels:
            states = torch.cat([states, run(node, edges(states))], dim=1)
        return self.outputs(states)

    def _walk(self, size: Size) -> Iterator[tuple[Instruction, Size]]:
        """Every instruction inside with the size that comes to it; checked on the way."""
        states = yield from self._node(self.inputs, size)
        for edges, node in self.levels:
            yield edges, states
            new = yield from self._node(node, edges.check(states))
            _require(new[1:] == states[1:], f"states {new} beside {states}")
            states = (states[0] + new[0], *states[1:])
        yield self.outputs, states

    @staticmethod
    def _node(node: tuple[Instruction, ...], size: Size) -> Generator[tuple[Instruction, Size], None, Size]:
        """A node function, which ends with a convolution and keeps its channels apart."""
        _require(bool(node) and isinstance(node[-1], Convolution), "nodes that do not end with a convolution")
        for instruction in node:
            known = isinstance(instruction, (Affine, InstanceNorm, Rectify))
            apart = isinstance(instruction, Convolution) and instruction.weight.shape[:2] == (size[0], 1)
            _require(known or apart, f"nodes with {type(instruction).__name__}")
            yield instruction, size
            size = instruction.check(size)
        return size

    def check(self, size: Size) -> Size:
        out = size
        for instruction, inner in self._walk(size):
            out = instruction.check(inner)
        return out

    def multiply_adds(self, size: Size, *, zeros: bool = False) -> int:
        return sum(instruction.multiply_adds(inner, zeros=zeros) for instruction, inner in self._walk(size))

    @property
    def num_edges(self) -> int:
        return sum(len(edges.weight) for edges, _ in self.levels) + len(self.outputs.weight)


@dataclass(frozen=True, eq=False)
class Pick(Instruction):
    """Some of the channels, int64 ``[channels]``."""

    channels: Indices

    def __call__(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.channels)

    def check(self, size: Size) -> Size:
        channels = self.channels
        _require(channels.dtype == torch.int64 and channels.ndim == 1 and len(channels) > 0, "channels of another form")
        _require(0 <= int(channels.min()) <= int(channels.max()) < size[0], f"channels beyond {size[0]}")
        return (len(channels), *size[1:])


@dataclass(frozen=True, eq=False)
class Restore(Instruction):
    """Puts channels back among constant ones.

    Attributes:
        channels: int64: where what comes in belongs. Where it is empty, whatever comes in is left out.
        constant: of all channels, those that come in not counted.
    """

    channels: Indices
    constant: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        whole = self.constant.expand(x.shape[0], *self.constant.shape).clone()
        if len(self.channels):
            whole[:, self.channels] = x
        return whole

    def check(self, size: Size) -> Size:
        channels, shape = self.channels, tuple(self.constant.shape)
        _require(len(shape) in (1, 3) and min(shape) > 0, f"constants of {shape}")
        _require(channels.dtype == torch.int64 and channels.ndim == 1, "channels of another type")
        if len(channels):
            _require((len(channels), *shape[1:]) == size, f"{len(channels)} of channels {shape}, given {size}")
            _require(0 <= int(channels.min()) <= int(channels.max()) < shape[0], f"channels beyond {shape[0]}")
        return shape


def run(instructions: tuple[Instruction, ...], x: Tensor) -> Tensor:
    """One instruction after the other."""
    for instruction in instructions:
        x = instruction(x)
    return x


@dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A compacted network.

    Attributes:
        instructions: run one after the other.
        input_size: channels, height and width of one input.
    """

    instructions: tuple[Instruction, ...]
    input_size: tuple[int, int, int]

    def __repr__(self) -> str:
        sizes = ("x".join(map(str, size)) for size in (self.input_size, self.output_size))
        numbers = f"{self.num_parameters:,} parameters, {self.multiply_adds:,} multiply-adds"
        return f"Program({' to '.join(sizes)}: {len(self.instructions)} instructions, {numbers})"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images ``[batch, channels, height, width]`` to outputs ``[batch, ...]``, in float32.

        Raises:
            ValueError: another shape than the network was compiled for, no floating-point numbers, or no dense tensor.
        """
        self.check_images(images)
        return run(self.instructions, images.float())

    def check_images(self, images: Tensor) -> None:
        """Raises ``ValueError`` unless images have the shape that the network was compiled for."""
        if not isinstance(images, Tensor):
            raise ValueError(self.refusal(type(images).__name__, getattr(images, "shape", ())))
        if images.is_nested or images.layout is not torch.strided or images.is_meta:
            kind = "nested" if images.is_nested else "meta" if images.is_meta else str(images.layout)
            raise ValueError(f"a tensor that is {kind} gives no images; make a dense one that holds its numbers")
        if images.ndim != 4 or tuple(images.shape[1:]) != self.input_size or not images.is_floating_point():
            raise ValueError(self.refusal(images.dtype, images.shape))

    def refusal(self, dtype: object, shape: Sequence[int]) -> str:
        """What is said of images of another dtype or shape."""
        return (
            f"expected floating-point images [batch, {', '.join(map(str, self.input_size))}], got {dtype} of shape "
            f"{tuple(shape)}; a network is compiled for one size, and takes batches"
        )

    def walk(self) -> Iterator[tuple[Instruction, Size]]:
        """Every instruction with the size that comes to it.

        Raises:
            ValueError: instructions that do not fit together.
        """
        size: Size = self.input_size
        _require(min(size) > 0, f"inputs of {size}")
        for instruction in self.instructions:
            yield instruction, size
            size = instruction.check(size)
            _require(math.prod(size) < 1 << 31, f"maps of {size}")

    @property
    def output_size(self) -> Size:
        """Of one output."""
        out: Size = self.input_size
        for instruction, size in self.walk():
            out = instruction.check(size)
        return out

    @property
    def multiply_adds(self) -> int:
        """Of products with weights that are not 0, for one input."""
        return sum(instruction.multiply_adds(size) for instruction, size in self.walk())

    @property
    def num_parameters(self) -> int:
        """Numbers that it computes with and that are not 0."""
        return sum(int(t.count_nonzero()) for t in tensors(self) if t.is_floating_point())


def require_program(given: object) -> None:
    """Raises ``ValueError`` unless it is a compacted network."""
    if not isinstance(given, Program):
        raise ValueError(
            f"a {type(given).__name__} is not a compacted network; plan(model, input_size).apply(model) makes one of a model, "
            "load_program(path) reads one"
        )


def in_memory(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of a tensor, as a dtype, one after the other where ``data_ptr`` of what is returned points.

    Raises:
        ValueError: it holds none, as tensors do that PyTorch only traces or transforms.
    """
    found = tensor.detach().to("cpu", dtype).contiguous()
    try:
        if type(found) is not Tensor or found.is_neg() or found.is_conj() or not found.data_ptr():  # not as memory has it
            given, found = found, torch.empty(found.shape, dtype=dtype, device="cpu")
            found.copy_(given)
    except (RuntimeError, AssertionError):
        kind = type(tensor).__name__
        raise ValueError(f"a {kind} that holds no numbers of its own in memory, which native code reads") from None
    return found


def tensors(thing: object) -> Iterator[Tensor]:
    """All tensors inside a program or instruction, in order."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (tuple, list)):
        for item in thing:
            yield from tensors(item)
    elif isinstance(thing, (Instruction, Program, Constant)):
        for value in vars(thing).values():
            yield from tensors(value)
