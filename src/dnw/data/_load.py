"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dnw.data._folder import FolderImages, decode, fits_in_memory, list_folder
from dnw.data._images import Images, sizes_text
from dnw.data._readers import read_cifar10, read_digits, read_mnist

Pair = tuple[Images, Images] | tuple[FolderImages, FolderImages]


def _digits(folder: Path, size: int) -> Pair:
    return read_digits()


def _mnist(folder: Path, size: int) -> Pair:
    return read_mnist(folder)


def _cifar10(folder: Path, size: int) -> Pair:
    for inner in (folder / "cifar-10-batches-py", folder):
        if (inner / "data_batch_1").is_file():
            return read_cifar10(inner)
    for inner in (folder / "cifar10", folder):
        if (inner / "train").is_dir():
            return _folder(inner, size)
    raise ValueError(
        f"no CIFAR-10 in {folder}: expected cifar-10-batches-py/data_batch_1 to 5 and test_batch, or an image tree "
        "cifar10/train/<class>/ and cifar10/test/<class>/; name the folder with --data-dir"
    )


def _folder(folder: Path, size: int) -> Pair:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name it with --data-dir")
    train, test = list_folder(folder)
    if fits_in_memory(train, size) and fits_in_memory(test, size):
        return decode(train, size), decode(test, size)
    return train, test


DATASETS: dict[str, Callable[[Path, int], Pair]] = {
    "digits": _digits,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "folder": _folder,
}


def load(name: str, folder: Path, size: int) -> Pair:
    """The training and test images of a data set: decoded where they fit in memory, else as lists of files.

    Args:
        name: one of ``DATASETS``.
        folder: where the data is; not used by "digits".
        size: side in pixels of the square images that the network gets.

    Raises:
        ValueError: missing or damaged data, images of another size, or a wrong layout; the message says what was looked for.
    """
    pair = DATASETS[name](folder, size)
    for part in pair:
        if isinstance(part, Images) and part.images.shape[2:] != (size, size):
            found = sizes_text(part.images.shape[2:])
            raise ValueError(f"data.image_size={size}: the images of data.name={name} are {found} pixels and are not resized")
    return pair
