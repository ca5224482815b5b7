"""Real data in: digits (in the package), MNIST, CIFAR-10 and image folders, with augmentation in batch; Python's own code.

Contract: files are data. No pickle is run, a damaged file is named, and what fits in memory is decoded once and kept as
bytes on the training device. The names are loaded when first used, so that missing data is found without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "DATASETS": "_load",
    "Augment": "_augment",
    "Batches": "_batches",
    "FolderImages": "_folder",
    "Images": "_images",
    "InMemory": "_batches",
    "Streaming": "_batches",
    "crop_and_flip": "_augment",
    "hold_out": "_load",
    "list_folder": "_folder",
    "load": "_load",
    "read_cifar10": "_readers",
    "read_digits": "_readers",
    "read_mnist": "_readers",
    "read_python_source": "_source",
}

__all__ = list(_PUBLIC)

if TYPE_CHECKING:
    from dnw.data._augment import Augment as Augment
    from dnw.data._augment import crop_and_flip as crop_and_flip
    from dnw.data._batches import Batches as Batches
    from dnw.data._batches import InMemory as InMemory
    from dnw.data._batches import Streaming as Streaming
    from dnw.data._folder import FolderImages as FolderImages
    from dnw.data._folder import list_folder as list_folder
    from dnw.data._images import Images as Images
    from dnw.data._load import DATASETS as DATASETS
    from dnw.data._load import hold_out as hold_out
    from dnw.data._load import load as load
    from dnw.data._readers import read_cifar10 as read_cifar10
    from dnw.data._readers import read_digits as read_digits
    from dnw.data._readers import read_mnist as read_mnist
    from dnw.data._source import read_python_source as read_python_source


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"dnw.data.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'dnw.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
