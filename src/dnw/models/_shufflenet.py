"""ShuffleNet with pointwise convolutions in groups, and its relative without groups (Zhang et al., 2018).

Contract: a unit adds what a bottleneck makes of its input to it, or puts the two side by side where maps become smaller.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = {1: (144, 288, 576), 3: (240, 480, 960)}
"""Channels of the three stages by the number of groups (Zhang et al., 2018, table 1)."""
_UNITS = (4, 8, 4)
_STEM = 24


class ShuffleUnit(nn.Module):
    """1x1 in groups, shuffle, 3x3 channel by channel, 1x1 in groups, beside the input (Zhang et al., 2018, figure 2).

    Args:
        inputs, outputs: channels.
        stride: with 2 the mean of 3x3 pixels of the input is put beside what the bottleneck makes; with 1 the two are added.
        groups: of the second pointwise convolution.
        first_groups: of the first; by default the same.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, first_groups: int | None = None) -> None:
        super().__init__()
        inner, made = outputs // 4, outputs - inputs if stride == 2 else outputs
        self.stride, self.groups = stride, groups
        self.reduce = nn.Conv2d(inputs, inner, 1, groups=first_groups or groups, bias=False)
        self.reduce_norm = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(inner)
        self.expand = nn.Conv2d(inner, made, 1, groups=groups, bias=False)
        self.expand_norm = nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.reduce_norm(self.reduce(x)))
        if self.groups > 1:
            inner = F.channel_shuffle(inner, self.groups)
        made = self.expand_norm(self.expand(self.depthwise_norm(self.depthwise(inner))))
        if self.stride == 1:
            return F.relu(x + made)
        return F.relu(torch.cat([F.avg_pool2d(x, 3, stride=2, padding=1), made], dim=1))


def shufflenet_v1(num_classes: int = 1000, *, width: float = 1.0, groups: int = 3, image_stride: int = 2) -> nn.Sequential:
    """ShuffleNet (Zhang et al., 2018): for images ``[batch, 3, height, width]``.

    Args:
        num_classes: of the classifier.
        width: multiplier of all channels.
        groups: 3, or 1 for what that paper compares with as Xception-like: the same without groups and without shuffling.
        image_stride: of the first convolution; with 1, for small images, there is no pooling after it either.

    Raises:
        ValueError: another number of groups, or a width that leaves channels which do not fall into groups.
    """
    if groups not in _STAGES:
        raise ValueError(f"groups={groups}: allowed are 1 and 3")
    stem, *widths = (int(width * channels) for channels in (_STEM, *_STAGES[groups]))
    if any(n % (4 * groups) for n in widths) or widths[0] <= stem:
        raise ValueError(
            f"width={width}: stages of {widths} channels; they must be more than {stem} and multiples of {4 * groups}"
        )
    layers: list[nn.Module] = [
        nn.Conv2d(3, stem, 3, stride=image_stride, padding=1, bias=False),
        nn.BatchNorm2d(stem),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1) if image_stride > 1 else nn.Identity(),
    ]
    inputs = stem
    for stage, (outputs, units) in enumerate(zip(widths, _UNITS, strict=True)):
        for unit in range(units):
            first = 1 if stage == unit == 0 else groups  # few channels come in
            layers.append(ShuffleUnit(inputs, outputs, 1 if unit else 2, groups, first))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))
