"""Images in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Images:
    """Decoded images and their labels.

    Attributes:
        images: uint8 ``[n, channels, height, width]``.
        labels: int64 ``[n]``.
        classes: name of each class, in the order of the labels.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return self.labels.numel()

    def at(self, indices: Tensor) -> Images:
        """Those at some indices, in that order."""
        return Images(self.images[indices], self.labels[indices], self.classes)


def sizes_text(sizes: Sequence[int]) -> str:
    """Sizes as an error names them, such as ``28x28``."""
    return "x".join(map(str, sizes))
