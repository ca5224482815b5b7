"""Fewer threads per test process, so that tests that run side by side do not fight over the cores.

A torchvision that was built for CUDA cannot be imported beside a torch without it, for want of two operators that no test
uses; they are declared here.
"""

import importlib.util

import torch

torch.set_num_threads(1)
_OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _declare_operators() -> list[torch.library.Library]:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for definition in _OPERATORS.values():
            library.define(definition)
        return [library]
    return []


KEPT = _declare_operators() if importlib.util.find_spec("torchvision") else []
