"""A compacted network: instructions on maps, with all their numbers inside.

Contract: plain data that runs on any device with PyTorch alone. What an instruction leaves out (dead and constant channels) has
been folded into others; a program computes what its network computes in eval mode. Sizes are ``(channels, height, width)`` or
``(channels,)``, without the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, ...]
Indices = Annotated[Tensor, "int64"]
"""What a field of whole numbers is declared as; all other tensors of a program hold weights."""


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of a value for every input.

    Attributes:
        varies: boolean ``[channels]``: whether a channel depends on the input.
        value: ``[channels, *places]``, double: of those that do not, and 0 of those that do; None where it is all 0.
    """

    varies: Tensor
    value: Tensor | None

    def numbers(self, size: Size) -> Tensor:
        """``value``, written out."""
        return torch.zeros(size, dtype=torch.float64) if self.value is None else self.value


class Instruction(ABC):
    """One instruction of a program.

    What it does with channels is the default for those that keep channels apart: a channel of what goes out is made of the
    same channel of what comes in. Others say what they do instead.
    """

    @abstractmethod
    def __call__(self, *inputs: Any) -> Tensor:
        """Runs on ``[batch, *size]`` of each value that it reads."""

    @abstractmethod
    def check(self, *sizes: Any) -> Size:
        """The size of what goes out; raises ``ValueError`` where its numbers do not fit together or the inputs."""

    def multiply_adds(self, *sizes: Any, **settings: Any) -> int:
        """Of products with weights that are not 0, for one input of a size; or also with the zeros that it computes with."""
        return 0

    def varying(self, *facts: Facts) -> Tensor:
        """Boolean ``[channels]``: which of those that go out depend on the input."""
        return torch.stack([known.varies for known in facts]).any(0)

    def settled(self, taken: list[Tensor], sent: Tensor, facts: Sequence[Facts]) -> tuple[list[Tensor], Tensor]:
        """Which channels come in and go out, boolean, so that it fits: at least those that are given."""
        union = torch.stack([*taken, sent]).any(0)
        return [union] * len(taken), union

    def shrunk(self, taken: Sequence[Tensor], sent: Tensor, facts: Sequence[Facts]) -> Instruction:
        """The same on some of the channels only, in single precision."""
        return self


def every(*masks: Tensor) -> list[Tensor]:
    """All channels of each."""
    return [torch.ones_like(mask) for mask in masks]


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
        beside = torch.where(maps == base[:, None, None], 0.0, maps - base[:, None, None])  # infinity less itself is NaN
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

    def picked(self, channels: Tensor) -> Constant:
        """Of some of the channels, boolean."""
        position, kept = channels.cumsum(0) - 1, channels[self.channels]
        return replace(self, base=self.base[channels], channels=position[self.channels[kept]], core=self.core[kept])

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

    def varying(self, *facts: Facts) -> Tensor:
        return facts[0].varies & (self.scale != 0)

    def shrunk(self, taken: Sequence[Tensor], sent: Tensor, facts: Sequence[Facts]) -> Affine:
        return Affine(self.scale[sent], self.shift[sent])


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

    def varying(self, *facts: Facts) -> Tensor:
        return facts[0].varies & (self.scale != 0)

    def shrunk(self, taken: Sequence[Tensor], sent: Tensor, facts: Sequence[Facts]) -> InstanceNorm:
        return InstanceNorm(self.scale[sent], self.shift[sent], self.eps)


@dataclass(frozen=True, eq=False)
class Convolution(Instruction):
    """A convolution, and what is added: per channel, per pixel, or nothing.

    Attributes:
        weight: ``[targets, sources of a group, rows, columns]``.
        constant: what is added.
        stride, padding, dilation: of rows and columns.
        groups: of channels; as many as there are channels: one convolution per channel.
        sparse: whether it is run weight by weight, without those that are 0.
    """

    weight: Tensor
    constant: Constant | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    dilation: tuple[int, int] = (1, 1)
    sparse: bool = False

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix: from all maps to all maps, pixel by pixel."""
        return self.weight.shape[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1

    @property
    def apart(self) -> bool:
        """Whether it keeps channels apart."""
        return len(self.weight) == self.groups and self.weight.shape[1] == 1

    def whole(self) -> Tensor:
        """The weight ``[targets, sources, rows, columns]``, with zeros between groups."""
        targets, sources, *kernel = self.weight.shape
        if self.groups == 1:
            return self.weight
        whole = self.weight.new_zeros(self.groups, targets // self.groups, self.groups, sources, *kernel)
        groups = torch.arange(self.groups, device=whole.device)
        whole[groups, :, groups] = self.weight.view(self.groups, -1, sources, *kernel)
        return whole.view(targets, self.groups * sources, *kernel)

    def __call__(self, x: Tensor) -> Tensor:
        sums = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        return sums if self.constant is None else self.constant.added(sums)

    def check(self, size: Size) -> Size:
        _require(len(size) == 3 and self.weight.ndim == 4, f"a convolution of {tuple(self.weight.shape)}, given {size}")
        targets, sources, *kernel = self.weight.shape
        _require(self.groups > 0 and targets % self.groups == 0, f"a convolution of {self.groups} groups")
        steps = f"stride {self.stride}, padding {self.padding}, dilation {self.dilation}"
        _require(max(*self.stride, *self.padding, *self.dilation) < 1 << 15, steps)
        _require(sources * self.groups == size[0], f"a convolution of {sources * self.groups} maps, given {size}")
        _require(min(*self.stride, *self.dilation) > 0 and min(self.padding) >= 0, steps)
        sides = zip(size[1:], kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((side + 2 * pad - d * (k - 1) - 1) // stride + 1 for side, k, stride, pad, d in sides)
        _require(min(height, width) > 0 and min(kernel) > 0, f"a kernel of {tuple(kernel)} for maps {size}")
        if self.constant is not None:
            self.constant.check((targets, height, width))
        return targets, height, width

    def multiply_adds(self, size: Size, *, zeros: bool = False) -> int:
        return _num_weights(self.weight, zeros and not self.sparse) * math.prod(self.check(size)[1:])

    def _reads(self) -> Tensor:
        """Which channel goes into which, boolean ``[targets, sources]``."""
        return self.whole().flatten(2).any(2)

    def varying(self, *facts: Facts) -> Tensor:
        if self.apart:
            return facts[0].varies & self.weight.flatten(1).any(1)
        return (self._reads() & facts[0].varies).any(1)

    def settled(self, taken: list[Tensor], sent: Tensor, facts: Sequence[Facts]) -> tuple[list[Tensor], Tensor]:
        if self.apart:
            return super().settled(taken, sent, facts)
        return [taken[0] | (self._reads()[sent].any(0) & facts[0].varies)], sent

    def shrunk(self, taken: Sequence[Tensor], sent: Tensor, facts: Sequence[Facts]) -> Convolution:
        constant = None if self.constant is None else self.constant.picked(sent)
        if self.apart:
            return replace(self, weight=self.weight[sent], constant=constant, groups=int(sent.count_nonzero()))
        (known,), weight = facts, self.whole()
        if known.value is not None:
            silent = replace(self, weight=weight[sent], constant=None, groups=1)(known.value[None])[0]
            constant = Constant.of(silent if constant is None else constant.added(silent[None])[0])
        weight = weight.masked_fill(~known.varies.view(-1, 1, 1), 0.0)
        return replace(self, weight=weight[sent][:, taken[0]], constant=constant, groups=1)


@dataclass(frozen=True, eq=False)
class Linear(Instruction):
    """A matrix ``[targets, sources]`` and a bias, at each place.

    Attributes:
        weight, bias: its numbers.
        sparse: whether it is run weight by weight, without those that are 0.
    """

    weight: Tensor
    bias: Tensor
    sparse: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)

    def check(self, size: Size) -> Size:
        shape = tuple(self.weight.shape)
        _require(
            len(shape) == 2 and shape[1:] == size[:1] and tuple(self.bias.shape) == shape[:1], f"a matrix {shape}, given {size}"
        )
        return shape[0], *size[1:]

    def multiply_adds(self, size: Size, *, zeros: bool = False) -> int:
        return _num_weights(self.weight, zeros and not self.sparse) * math.prod(size[1:])

    def varying(self, *facts: Facts) -> Tensor:
        return ((self.weight != 0) & facts[0].varies).any(1)

    def settled(self, taken: list[Tensor], sent: Tensor, facts: Sequence[Facts]) -> tuple[list[Tensor], Tensor]:
        return [taken[0] | ((self.weight[sent] != 0).any(0) & facts[0].varies)], sent

    def shrunk(self, taken: Sequence[Tensor], sent: Tensor, facts: Sequence[Facts]) -> Instruction:
        (known,), bias = facts, self.bias[sent]
        weight = self.weight[sent].masked_fill(~known.varies, 0.0)[:, taken[0]]
        if known.value is None:
            return Linear(weight, bias, self.sparse)
        silent = Linear(self.weight[sent], bias)(known.value[None])[0]
        places = silent.reshape(len(silent), -1)
        at = places.mean(1)
        if bool(((places - at[:, None]).abs() > 1e-10 * (1 + at[:, None].abs())).any()):  # more than rounding
            return Beside(Linear(weight, torch.zeros_like(bias), self.sparse), silent)
        return Linear(weight, at, self.sparse)


@dataclass(frozen=True, eq=False)
class Beside(Instruction):
    """A matrix at each place, and a constant ``[targets, *places]`` added to what it makes."""

    linear: Linear
    constant: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.constant

    def check(self, size: Size) -> Size:
        found = self.linear.check(size)
        _require(tuple(self.constant.shape) == found, f"constants of {tuple(self.constant.shape)}, given {size}")
        return found

    def multiply_adds(self, size: Size, *, zeros: bool = False) -> int:
        return self.linear.multiply_adds(size, zeros=zeros)


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

    def varying(self, *facts: Facts) -> Tensor:
        return facts[0].varies[self.channels]

    def settled(self, taken: list[Tensor], sent: Tensor, facts: Sequence[Facts]) -> tuple[list[Tensor], Tensor]:
        found = taken[0].clone()
        found[self.channels[sent]] = True
        return [found], sent

    def shrunk(self, taken: Sequence[Tensor], sent: Tensor, facts: Sequence[Facts]) -> Pick:
        return Pick((taken[0].cumsum(0) - 1)[self.channels[sent]])


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
        _require(len(shape) > 0 and min(shape) > 0, f"constants of {shape}")
        _require(channels.dtype == torch.int64 and channels.ndim == 1, "channels of another type")
        if len(channels):
            _require((len(channels), *shape[1:]) == size, f"{len(channels)} of channels {shape}, given {size}")
            _require(0 <= int(channels.min()) <= int(channels.max()) < shape[0], f"channels beyond {shape[0]}")
        return shape

    def varying(self, *facts: Facts) -> Tensor:
        varies = torch.zeros(len(self.constant), dtype=torch.bool)
        if len(self.channels):
            varies[self.channels] = facts[0].varies
        return varies

    def settled(self, taken: list[Tensor], sent: Tensor, facts: Sequence[Facts]) -> tuple[list[Tensor], Tensor]:
        return ([taken[0] | sent[self.channels]] if len(self.channels) else taken), sent

    def shrunk(self, taken: Sequence[Tensor], sent: Tensor, facts: Sequence[Facts]) -> Restore:
        if not len(self.channels):
            return Restore(self.channels, self.constant[sent])
        assert bool(sent[self.channels[taken[0]]].all()), "channels that come in and do not go out"
        return Restore((sent.cumsum(0) - 1)[self.channels[taken[0]]], self.constant[sent])


@dataclass(frozen=True, eq=False)
class Node:
    """An instruction in a program.

    Attributes:
        instruction: what is computed.
        reads: the numbers of the values that it reads.
        name: of the module that it comes from, where that is known.
    """

    instruction: Instruction
    reads: tuple[int, ...]
    name: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A compacted network: a graph of instructions, each of which makes one value of earlier ones.

    Attributes:
        nodes: run in this order. Values are numbered: first the inputs, then what each node makes.
        input_sizes: of each input, without the batch: channels, height and width of images.
        outputs: the values that are returned.
    """

    nodes: tuple[Node, ...]
    input_sizes: tuple[Size, ...]
    outputs: tuple[int, ...]

    @classmethod
    def chain(cls, instructions: Iterable[Instruction], input_size: Size) -> Program:
        """Of instructions of which each reads what the one before it makes."""
        nodes = tuple(Node(instruction, (number,)) for number, instruction in enumerate(instructions))
        return cls(nodes, (tuple(input_size),), (len(nodes),))

    def __repr__(self) -> str:
        sizes = (", ".join("x".join(map(str, size)) for size in sizes) for sizes in (self.input_sizes, self.output_sizes))
        numbers = f"{self.num_parameters:,} parameters, {self.multiply_adds:,} multiply-adds"
        return f"Program({' to '.join(sizes)}: {len(self.nodes)} instructions, {numbers})"

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """Of all nodes, in order."""
        return tuple(node.instruction for node in self.nodes)

    @property
    def input_size(self) -> Size:
        """Of the first input."""
        return self.input_sizes[0]

    @torch.no_grad()
    def __call__(self, *images: Tensor) -> Any:
        """Inputs ``[batch, *size]``, one of each size, to the output ``[batch, ...]`` in float32, or to a tuple of several.

        Raises:
            ValueError: other shapes than the network was compiled for, no floating-point numbers, or no dense tensor.
        """
        self.check_images(*images)
        outputs = self.run(*(x.float() for x in images))
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    @torch.no_grad()
    def run(self, *images: Tensor) -> list[Tensor]:
        """Inputs that are known to fit to all outputs."""
        values = list(images)
        left = list(self.last_reads())
        for node, over in zip(self.nodes, left, strict=True):
            values.append(node.instruction(*(values[i] for i in node.reads)))
            for i in over:
                values[i] = values[0][:0]
        return [values[i] for i in self.outputs]

    def readers(self) -> list[int]:
        """How often each value is read; an output once more."""
        counts = [0] * (len(self.input_sizes) + len(self.nodes))
        for i in (*(i for node in self.nodes for i in node.reads), *self.outputs):
            counts[i] += 1
        return counts

    def last_reads(self) -> list[tuple[int, ...]]:
        """Of each node the values that it reads and nobody after it."""
        seen, found = {0, *self.outputs}, list[tuple[int, ...]]()
        for node in reversed(self.nodes):
            found.append(tuple(dict.fromkeys(i for i in node.reads if i not in seen)))
            seen.update(node.reads)
        return found[::-1]

    def check_images(self, *images: Tensor) -> None:
        """Raises ``ValueError`` unless inputs have the shapes that the network was compiled for."""
        if len(images) != len(self.input_sizes):
            raise ValueError(f"{len(images)} inputs for a network of {len(self.input_sizes)}")
        for given, size in zip(images, self.input_sizes, strict=True):
            if not isinstance(given, Tensor):
                raise ValueError(self.refusal(type(given).__name__, getattr(given, "shape", ()), size))
            if given.is_nested or given.layout is not torch.strided or given.is_meta:
                kind = "nested" if given.is_nested else "meta" if given.is_meta else str(given.layout)
                raise ValueError(f"a tensor that is {kind} gives no images; make a dense one that holds its numbers")
            if given.ndim != len(size) + 1 or tuple(given.shape[1:]) != size or not given.is_floating_point():
                raise ValueError(self.refusal(given.dtype, given.shape, size))
        if len({len(given) for given in images}) > 1:
            raise ValueError(f"inputs of {', '.join(str(len(given)) for given in images)} in a batch; all must be as many")

    def refusal(self, dtype: object, shape: Sequence[int], size: Size) -> str:
        """What is said of images of another dtype or shape."""
        return (
            f"expected floating-point images [batch, {', '.join(map(str, size))}], got {dtype} of shape "
            f"{tuple(shape)}; a network is compiled for one size, and takes batches"
        )

    def sizes(self) -> list[Size]:
        """Of all values.

        Raises:
            ValueError: instructions that do not fit together.
        """
        found = [tuple(size) for size in self.input_sizes]
        _require(bool(found) and min(min(size, default=1) for size in found) > 0, f"inputs of {found}")
        for node in self.nodes:
            _require(bool(node.reads) and 0 <= min(node.reads) <= max(node.reads) < len(found), f"reads {node.reads}")
            size = node.instruction.check(*(found[i] for i in node.reads))
            _require(math.prod(size) < 1 << 31, f"maps of {size}")
            found.append(size)
        _require(bool(self.outputs) and 0 <= min(self.outputs) <= max(self.outputs) < len(found), f"outputs {self.outputs}")
        return found

    def walk(self) -> Iterator[tuple[Instruction, tuple[Size, ...]]]:
        """Every instruction with the sizes that come to it.

        Raises:
            ValueError: instructions that do not fit together.
        """
        sizes = self.sizes()
        for node in self.nodes:
            yield node.instruction, tuple(sizes[i] for i in node.reads)

    @property
    def output_sizes(self) -> tuple[Size, ...]:
        """Of all outputs."""
        sizes = self.sizes()
        return tuple(sizes[i] for i in self.outputs)

    @property
    def output_size(self) -> Size:
        """Of the first output."""
        return self.output_sizes[0]

    @property
    def multiply_adds(self) -> int:
        """Of products with weights that are not 0, for one input."""
        return sum(instruction.multiply_adds(*sizes) for instruction, sizes in self.walk())

    @property
    def num_parameters(self) -> int:
        """Numbers that it computes with and that are not 0."""
        distinct = {id(t): t for t in tensors(self)}  # operators of PyTorch with several results have them for each
        return sum(int(t.count_nonzero()) for t in distinct.values() if t.is_floating_point())


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
    elif isinstance(thing, (Instruction, Program, Node, Constant)):
        for value in vars(thing).values():
            yield from tensors(value)
