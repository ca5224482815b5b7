"""LeNet-300-100: the ordinary fully connected network that pruning is tried on first."""

from __future__ import annotations

from torch import nn


def lenet_300_100(num_classes: int = 10, image_size: int = 28) -> nn.Sequential:
    """Two hidden layers of 300 and 100 units on grey images ``[batch, 1, image_size, image_size]``.

    Source: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998, section III.C.3.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(image_size * image_size, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, num_classes),
    )
