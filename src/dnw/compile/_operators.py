"""The operators of a network, and what each does with channels: which vary with the image, are wanted, are constant.

Contract: in double precision, on the CPU. Each operator is asked three times (_analysis.py): forwards for what varies and the
values of what does not, backwards for what is wanted, and forwards again for its instructions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnw.compile._program import (
    Affine,
    Constant,
    Convolution,
    Edges,
    InstanceNorm,
    Instruction,
    Linear,
    Mean,
    Rectify,
)
from dnw.models import Window

_SPARSE_BELOW = 0.5
"""Density below which a 1x1 convolution becomes sums along edges."""


@dataclass(frozen=True, eq=False)
class Interface:
    """The channels between two operators.

    Attributes:
        varies: boolean ``[channels]``: whether a channel depends on the image.
        value: ``[channels, h, w]`` or ``[channels]``, double: of those that do not; 0 elsewhere.
        pooled: whether numbers are maps of one pixel to PyTorch, until they are flattened.
    """

    varies: Tensor
    value: Tensor
    pooled: bool = False

    @classmethod
    def of(cls, varies: Tensor, value: Tensor, pooled: bool = False) -> Interface:
        mask = varies.view(-1, *[1] * (value.ndim - 1))
        return cls(varies, value.masked_fill(mask, 0.0), pooled)

    def require_maps(self, what: str) -> None:
        """Raises ``ValueError`` where these are numbers."""
        if self.value.ndim != 3:
            raise ValueError(f"{what} after the maps have become numbers is not compiled")


class Operator(ABC):
    """One operator of a network, on all channels."""

    source: Interface
    """What came in, noted by ``forward``."""

    @abstractmethod
    def forward(self, x: Interface) -> Interface: ...

    def backward(self, wanted: Tensor) -> Tensor:
        """Which of the channels that come in and vary are wanted, from those wanted of what goes out."""
        return wanted & self.source.varies

    @abstractmethod
    def emit(self, taken: Tensor, sent: Tensor) -> Iterator[Instruction]:
        """Instructions from the kept channels that it takes to those that it sends on, boolean masks."""


class Norm(Operator):
    """Normalisation in eval mode, channel by channel."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.instance = isinstance(module, nn.InstanceNorm2d)
        assert isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d))
        size = module.num_features
        weight = torch.ones(size) if module.weight is None else module.weight
        bias = torch.zeros(size) if module.bias is None else module.bias
        self.scale, self.shift, self.eps = double(weight), double(bias), module.eps
        if module.running_mean is not None and module.running_var is not None:
            self.instance = False
            self.scale = self.scale / (double(module.running_var) + module.eps).sqrt()
            self.shift = self.shift - double(module.running_mean) * self.scale
        elif not self.instance:
            raise ValueError(f"{name}: a batch norm without running statistics depends on the other images; it is not compiled")

    def forward(self, x: Interface) -> Interface:
        self.source = x
        if len(self.scale) != len(x.varies):
            raise ValueError(f"a norm of {len(self.scale)} channels is given {len(x.varies)}")
        if self.instance:
            x.require_maps("an instance norm")
        if x.value.ndim == 1 and not x.pooled:
            raise ValueError("a norm of maps is given numbers")
        return Interface.of(x.varies & (self.scale != 0), self.normalised(x.value), x.pooled)

    def normalised(self, value: Tensor) -> Tensor:
        shape = (-1, *[1] * (value.ndim - 1))
        if self.instance:
            spread = value.var(dim=(1, 2), keepdim=True, unbiased=False)
            value = (value - value.mean(dim=(1, 2), keepdim=True)) / (spread + self.eps).sqrt()
        return value * self.scale.view(shape) + self.shift.view(shape)

    def emit(self, taken: Tensor, sent: Tensor) -> Iterator[Instruction]:
        scale, shift = self.scale[sent].float(), self.shift[sent].float()
        yield InstanceNorm(scale, shift, self.eps) if self.instance else Affine(scale, shift)


class Relu(Operator):
    def forward(self, x: Interface) -> Interface:
        self.source = x
        return Interface(x.varies, x.value.relu(), x.pooled)

    def emit(self, taken: Tensor, sent: Tensor) -> Iterator[Instruction]:
        yield Rectify()


class Depthwise(Operator):
    """A convolution of each channel by itself."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.weight, self.stride, self.padding = double(module.weight), pair(module.stride), pair(module.padding)
        self.bias = None if module.bias is None else double(module.bias)

    def forward(self, x: Interface) -> Interface:
        self.source = x
        x.require_maps("a convolution")
        value = F.conv2d(
            x.value[None], self.weight, self.bias, stride=self.stride, padding=self.padding, groups=len(self.weight)
        )[0]
        self.sides = value.shape[1:]
        return Interface.of(x.varies & self.weight.flatten(1).any(1), value)

    def emit(self, taken: Tensor, sent: Tensor) -> Iterator[Instruction]:
        constant = None
        if self.bias is not None:
            constant = Constant.of(self.bias[sent].view(-1, 1, 1).expand(-1, *self.sides))
        yield Convolution(self.weight[sent].float(), constant, self.stride, self.padding, int(sent.count_nonzero()))


class Mix(Operator):
    """A convolution or a matrix from all channels to all channels; constant channels become part of what is added."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        on_numbers: bool = False,
    ):
        self.weight = double(weight)
        self.bias = None if bias is None else double(bias)
        self.stride, self.padding, self.on_numbers = stride, padding, on_numbers
        self.reads = self.weight != 0 if weight.ndim == 2 else self.weight.flatten(2).any(2)

    def forward(self, x: Interface) -> Interface:
        self.source = x
        if self.on_numbers:
            if x.value.ndim != 1 or x.pooled:
                raise ValueError("a linear layer on maps is not compiled; flatten pooled maps with nn.Flatten()")
            self.constant = F.linear(x.value, self.weight, self.bias)
        else:
            x.require_maps("a convolution")
            weight = self.weight[:, :, None, None] if self.weight.ndim == 2 else self.weight
            self.constant = F.conv2d(x.value[None], weight, self.bias, stride=self.stride, padding=self.padding)[0]
        return Interface.of(self.reads[:, x.varies].any(1), self.constant)

    def backward(self, wanted: Tensor) -> Tensor:
        return self.reads[wanted].any(0) & self.source.varies

    def emit(self, taken: Tensor, sent: Tensor) -> Iterator[Instruction]:
        weight, constant = self.weight[sent][:, taken], self.constant[sent]
        if constant.ndim == 1:
            yield Linear(weight.float(), constant.float())
            return
        pointwise = weight.ndim == 2 or (weight.shape[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0))
        matrix = weight.flatten(1) if pointwise else weight
        if pointwise and int(matrix.count_nonzero()) < _SPARSE_BELOW * matrix.numel():
            yield Edges.of(matrix, Constant.of(constant))
        else:
            weight = weight[:, :, None, None] if weight.ndim == 2 else weight
            yield Convolution(weight.float(), Constant.of(constant), self.stride, self.padding, 1)


class Average(Operator):
    """The mean over a square window, or over the whole map."""

    def __init__(self, start: int, stop: int | None, pooled: bool = False) -> None:
        self.start, self.stop, self.pooled = start, stop, pooled

    def forward(self, x: Interface) -> Interface:
        self.source = x
        x.require_maps("a mean over maps")
        self.end = max(x.value.shape[1:]) if self.stop is None else self.stop
        if self.start >= min(self.end, *x.value.shape[1:]):
            raise ValueError(f"a window from {self.start} to {self.end} is not in maps of {tuple(x.value.shape[1:])}")
        return Interface(x.varies, x.value[:, self.start : self.end, self.start : self.end].mean(dim=(1, 2)), self.pooled)

    def emit(self, taken: Tensor, sent: Tensor) -> Iterator[Instruction]:
        yield Mean(self.start, self.end)


class Flatten(Operator):
    """From each channel's one number to a vector of them."""

    def forward(self, x: Interface) -> Interface:
        self.source = x
        self.from_maps = x.value.ndim == 3
        if self.from_maps and x.value.shape[1:] != (1, 1):
            raise ValueError(f"flattening maps of {tuple(x.value.shape[1:])} pixels is not compiled; pool them first")
        return Interface(x.varies, x.value.flatten())

    def emit(self, taken: Tensor, sent: Tensor) -> Iterator[Instruction]:
        if self.from_maps:
            yield Mean(0, 1)


def double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def pair(value: int | str | tuple[int, ...]) -> tuple[int, int]:
    assert not isinstance(value, str)
    return (value, value) if isinstance(value, int) else (value[0], value[1])


# --- which operator a module is ---


def _convolution(module: nn.Conv2d, where: str) -> Operator:
    same = module.groups == module.in_channels == module.out_channels
    if module.groups > 1 and not same:
        raise ValueError(f"{where}: convolutions in {module.groups} groups are not compiled; one or one per channel are")
    if pair(module.dilation) != (1, 1) or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError(f"{where}: only convolutions without dilation, padded with a number of zeros, are compiled")
    if same:
        return Depthwise(module)
    return Mix(module.weight, module.bias, pair(module.stride), pair(module.padding))


def _pooling(module: nn.AdaptiveAvgPool2d, where: str) -> Operator:
    if module.output_size not in (1, (1, 1)):
        raise ValueError(f"{where}: pooling to {module.output_size} pixels is not compiled; to one is")
    return Average(0, None, pooled=True)


def _flattening(module: nn.Flatten, where: str) -> Operator:
    if (module.start_dim, module.end_dim) not in ((1, -1), (1, 3)):
        raise ValueError(f"{where}: flattening from {module.start_dim} to {module.end_dim} is not compiled; from 1 to -1 is")
    return Flatten()


OPERATORS: dict[type[nn.Module], Callable[[Any, str], Operator | None]] = {
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: Norm,
    nn.InstanceNorm2d: Norm,
    nn.ReLU: lambda module, where: Relu(),
    nn.Linear: lambda module, where: Mix(module.weight, module.bias, on_numbers=True),
    Window: lambda module, where: Average(module.start, module.stop),
    nn.AdaptiveAvgPool2d: _pooling,
    nn.Flatten: _flattening,
    nn.Identity: lambda module, where: None,
    nn.Dropout: lambda module, where: None,
    nn.Dropout2d: lambda module, where: None,
}
"""Of modules that hold no others: which operator one is, given it and its name; None for one that does nothing in eval mode."""
