"""Real images in: digits (in the package), MNIST, CIFAR-10 and image folders, with augmentation in batch.

Contract: files are data. No pickle is run, a damaged file is named, and what fits in memory is decoded once and kept as
bytes on the training device.
"""

from dnw.data._augment import Augment, crop_and_flip
from dnw.data._batches import Batches, InMemory, Streaming
from dnw.data._folder import FolderImages, list_folder
from dnw.data._images import Images
from dnw.data._load import DATASETS, load
from dnw.data._readers import read_cifar10, read_digits, read_mnist

__all__ = [
    "DATASETS",
    "Augment",
    "Batches",
    "FolderImages",
    "Images",
    "InMemory",
    "Streaming",
    "crop_and_flip",
    "list_folder",
    "load",
    "read_cifar10",
    "read_digits",
    "read_mnist",
]
