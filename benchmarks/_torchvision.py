"""torchvision's networks, also beside a torch that its operators were not built for."""

from __future__ import annotations

from typing import Any

import torch

_BOXES = "Tensor dets, Tensor scores, float iou_threshold"
_kept: list[Any] = []  # a library that is let go takes its operators with it


def models() -> Any:
    """The module ``torchvision.models``; its networks need none of the two operators that a build for CUDA misses on a CPU."""
    if not _kept:
        try:
            import torchvision
        except RuntimeError:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}({_BOXES}) -> Tensor")
            _kept.append(library)
            import torchvision
        _kept.append(torchvision.models)
    return _kept[-1]
