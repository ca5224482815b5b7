"""Augmentation of whole batches on the device they are on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """What training images go through.

    Attributes:
        crop_padding: pixels of zeros around an image before a crop of its own size is drawn; 0 for none.
        flip: whether half of the images are mirrored left to right.
    """

    crop_padding: int = 0
    flip: bool = False


def crop_and_flip(images: Tensor, draws: Tensor, augment: Augment) -> Tensor:
    """Crops and mirrors each image of a batch by its own draws.

    Args:
        images: ``[batch, channels, height, width]``, any dtype.
        draws: uniform draws in [0, 1), ``[batch, 3]``: row offset, column offset, mirror.
        augment: what to do.

    Returns:
        Images of the same shape and dtype.
    """
    batch, _, height, width = images.shape
    if augment.crop_padding:
        pad = augment.crop_padding
        offset = (draws[:, :2] * (2 * pad + 1)).long()
        rows = offset[:, :1] + torch.arange(height, device=images.device)
        columns = offset[:, 1:] + torch.arange(width, device=images.device)
        padded = F.pad(images, (pad, pad, pad, pad))
        each = torch.arange(batch, device=images.device)[:, None, None]
        images = padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if augment.flip:
        images = torch.where((draws[:, 2] < 0.5)[:, None, None, None], images.flip(3), images)
    return images
