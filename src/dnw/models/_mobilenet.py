"""MobileNetV1, plain and as a chain of static graphs (Wortsman et al., 2019, section 4.2; Howard et al., 2017).

Contract: stages are data. A chain's graph may connect any level of its stage to any later one, and its budget is the number
of edges that the stage of a MobileNetV1 of some width would have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from dnw.graphs import StaticGraph


@dataclass(frozen=True)
class Stage:
    """One static graph of a chain.

    Attributes:
        inputs: number of input nodes.
        width: number of nodes of every inner level, and of outputs.
        stride: of the inputs' convolution.
        levels: levels of nodes with a function, the inputs' included.
    """

    inputs: int
    width: int
    stride: int
    levels: int

    def num_edges(self, width: float) -> int:
        """The edges of this stage in a MobileNetV1 of a width multiplier: its 1x1 convolutions, rounded up."""
        return math.ceil(width * width * (self.inputs * self.width + (self.levels - 1) * self.width * self.width))


STAGES = (Stage(32, 64, 1, 1), Stage(64, 128, 2, 2), Stage(128, 256, 2, 2), Stage(256, 512, 2, 6), Stage(512, 1024, 2, 2))
"""MobileNetV1 as five graphs."""

_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""(outputs, stride) of the depthwise separable blocks of MobileNetV1."""


class GraphChain(nn.Module):
    """Images to logits through a chain of static graphs: conv, graphs, norm, ReLU, mean over the map, linear classifier.

    Args:
        num_classes: of the classifier.
        image_stride: of the first convolution: 2 for 224 px, 1 for 32 px.
        stages: the graphs.
        learned_classifier: whether the classifier is a matrix of edges too ("Small"): without bias, to be wired with them.
        rank_all_entries: see :class:`dnw.graphs.StaticGraph`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        image_stride: int = 2,
        stages: tuple[Stage, ...] = STAGES,
        learned_classifier: bool = False,
        rank_all_entries: bool = False,
    ) -> None:
        super().__init__()
        for before, after in pairwise(stages):
            if before.width != after.inputs:
                raise ValueError(f"{after} follows {before}, which has {before.width} outputs; they must be its inputs")
        self.stages = stages
        self.conv = nn.Conv2d(3, stages[0].inputs, 3, stride=image_stride, padding=1, bias=False)
        self.graphs = nn.Sequential(
            *(
                StaticGraph(
                    (s.inputs, *[s.width] * (s.levels - 1)), s.width, stride=s.stride, rank_all_entries=rank_all_entries
                )
                for s in stages
            )
        )
        self.norm = nn.BatchNorm2d(stages[-1].width)
        self.relu = nn.ReLU()
        self.classifier = nn.Linear(stages[-1].width, num_classes, bias=not learned_classifier)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.relu(self.norm(self.graphs(self.conv(images)))).mean(dim=(2, 3)))

    def num_edges(self, width: float) -> dict[str, int]:
        """The budget of each graph, for :func:`dnw.wire`: the edges that MobileNetV1 of a width multiplier has there.

        Args:
            width: the multiplier, in (0, 1]; 0.225 gives 104, 1,245, 4,977, 72,991 and 79,627 edges.
        """
        if not 0 < width <= 1:
            raise ValueError(f"width={width}: a width multiplier lies in (0, 1]")
        return {f"graphs.{i}.weight": stage.num_edges(width) for i, stage in enumerate(self.stages)}


def mobilenet_v1(num_classes: int = 1000, *, width: float = 1.0, image_stride: int = 2) -> nn.Sequential:
    """Plain MobileNetV1.

    Args:
        num_classes: of the classifier.
        width: multiplier of the number of channels.
        image_stride: of the first convolution: 2 for 224 px, 1 for 32 px.
    """

    def channels(number: int) -> int:
        scaled = int(number * width)
        if scaled < 1:
            raise ValueError(f"width={width}: leaves no channel of {number}")
        return scaled

    inputs = channels(32)
    layers: list[nn.Module] = [
        nn.Conv2d(3, inputs, 3, stride=image_stride, padding=1, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
    ]
    for wanted, stride in _BLOCKS:
        outputs = channels(wanted)
        layers.append(
            nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs),
                nn.ReLU(),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            )
        )
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))
