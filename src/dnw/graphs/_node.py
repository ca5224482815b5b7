"""The node function: normalisation, ReLU, one 3x3 convolution per channel (Wortsman et al., 2019, section 2.3)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Node(nn.Module):
    """The function f_v of ``num_nodes`` nodes at once, on maps ``[batch, nodes, height, width]``.

    Args:
        num_nodes: number of nodes (channels).
        norm: makes the normalisation of that many channels, ``torch.nn.BatchNorm2d`` for one; None for none.
        stride: of the convolution.
    """

    def __init__(self, num_nodes: int, norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d, stride: int = 1) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm(num_nodes)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(num_nodes, num_nodes, 3, stride=stride, padding=1, groups=num_nodes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.relu(self.norm(x)))
