"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dnw.data._folder import FolderImages, decode, fits_in_memory, list_folder
from dnw.data._images import Images, sizes_text
from dnw.data._places import check_folder, find_cifar10
from dnw.data._readers import read_cifar10, read_digits, read_mnist

Pair = tuple[Images, Images] | tuple[FolderImages, FolderImages]


def _digits(folder: Path, size: int, testing: bool) -> Pair:
    return read_digits()


def _mnist(folder: Path, size: int, testing: bool) -> Pair:
    return read_mnist(folder)


def _cifar10(folder: Path, size: int, testing: bool) -> Pair:
    inner, pickled = find_cifar10(folder)
    return read_cifar10(inner) if pickled else _folder(inner, size, testing)


def _folder(folder: Path, size: int, testing: bool) -> Pair:
    check_folder(folder)
    train, test = list_folder(folder)
    if not (fits_in_memory(train, size) and fits_in_memory(test, size)):
        return train, test
    decoded = decode(test, size)
    return (decoded if testing else decode(train, size)), decoded


_SPLIT_SEED = 0
"""Of the images that are held out: the same ones whatever the seed of a run."""

DATASETS: dict[str, Callable[[Path, int, bool], Pair]] = {
    "digits": _digits,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "folder": _folder,
}


def load(name: str, folder: Path, size: int, *, testing: bool = False) -> Pair:
    """The training and test images of a data set: decoded where they fit in memory, else as lists of files.

    Args:
        name: one of ``DATASETS``.
        folder: where the data is; not used by "digits".
        size: side in pixels of the square images that the network gets.
        testing: nothing is trained, so training images that would have to be decoded one by one need not be: the test
            images may stand in their place.

    Raises:
        ValueError: missing or damaged data, images of another size, or a wrong layout; the message says what was looked for.
    """
    pair = DATASETS[name](folder, size, testing)
    for part in pair:
        if isinstance(part, Images) and part.images.shape[2:] != (size, size):
            found = sizes_text(part.images.shape[2:])
            raise ValueError(f"data.image_size={size}: the images of data.name={name} are {found} pixels and are not resized")
    return pair


def hold_out(train: Images | FolderImages, number: int) -> Pair:
    """Training images in two parts: what is left to train with, and a number of them, drawn once for all, to measure on.

    Settings are tuned on the second part, so that the test images are left for the end.

    Raises:
        ValueError: not fewer than there are.
    """
    if not 0 < number < len(train):
        raise ValueError(f"data.validation={number:,}: allowed is a number below that of the training images, {len(train):,}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    held, rest = (part.sort().values for part in (order[:number], order[number:]))
    return train.at(rest), train.at(held)  # type: ignore[return-value]
