"""The paper's own count of a chain of graphs, to the last digit, to compare with published figures.

Contract: the authors count edges as the real number that a width multiplier gives, not those there are, leave out norms and
biases, and count a pooled position as one multiply-add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from dnw.count._live import graphs_of, parameter_of


class Chain(Protocol):
    """What the count needs to know of a chain of graphs (:class:`dnw.models.GraphChain`)."""

    stages: Sequence[Any]
    graphs: nn.Sequential
    conv: nn.Conv2d
    classifier: nn.Linear


def published_count(model: Chain, active: Mapping[str, Tensor], *, width: float, image_size: int = 224) -> tuple[int, int]:
    """Multiply-adds and parameters as the authors' code prints them.

    Args:
        model: the chain.
        active: the active edges of its graphs, by parameter name.
        width: the multiplier that its budget came from.
        image_size: side of the images in pixels.

    Returns:
        (multiply-adds, parameters). Of the first convolution and of the pooled maps only channels count that an edge leaves
        or reaches, of the nodes' convolutions only those of nodes with an outgoing edge.
    """
    side = image_size // model.conv.stride[0]
    masks = [active[f"graphs.{parameter_of(*graph)}"].bool().cpu() for graph in graphs_of(model.graphs).items()]
    inputs = int(masks[0].any(0)[: model.stages[0].inputs].count_nonzero())
    outputs = int(masks[-1].any(1)[-model.stages[-1].width :].count_nonzero())
    products, parameters = 27.0 * inputs * side * side, 27 * inputs
    for stage, mask in zip(model.stages, masks, strict=True):
        side //= stage.stride
        edges = width * width * (stage.inputs * stage.width + (stage.levels - 1) * stage.width**2)
        sending = int(mask.any(0).count_nonzero())
        products += (edges + 9 * sending) * side * side
        parameters += int(edges) + 9 * sending
    products += side * side * outputs
    classes = model.classifier.out_features
    if model.classifier.bias is None:  # learned: 1 - (1 - width) is what the authors' float arithmetic makes of the width
        classifier = int((1 - (1 - width)) * classes * model.classifier.in_features)
    else:
        classifier = classes * outputs
    return int(products + classifier), parameters + classifier
