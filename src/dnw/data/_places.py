"""Where the files of a data set lie in a folder.

Contract: needs no torch, so that missing data is said before anything is loaded.
"""

from __future__ import annotations

from pathlib import Path

MNIST_FILES = tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))


def find_mnist(folder: Path, name: str) -> Path:
    """One of ``MNIST_FILES``, plain or gzipped.

    Raises:
        ValueError: there is none; the folders that were looked into are named.
    """
    folders = [folder / "MNIST" / "raw", folder / "raw", folder]
    for place in folders:
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    tried = ", ".join(map(str, folders))
    raise ValueError(f"no MNIST file {name} (or {name}.gz) in {tried}; name the folder with --data-dir")


def find_cifar10(folder: Path) -> tuple[Path, bool]:
    """The folder of CIFAR-10, and whether it holds the pickled batches; else it is an image tree.

    Raises:
        ValueError: there is none.
    """
    for inner in (folder / "cifar-10-batches-py", folder):
        if (inner / "data_batch_1").is_file():
            return inner, True
    for inner in (folder / "cifar10", folder):
        if (inner / "train").is_dir():
            return inner, False
    raise ValueError(
        f"no CIFAR-10 in {folder}: expected cifar-10-batches-py/data_batch_1 to 5 and test_batch, or an image tree "
        "cifar10/train/<class>/ and cifar10/test/<class>/; name the folder with --data-dir"
    )


def check_there(name: str, folder: Path) -> None:
    """Raises ``ValueError`` where a data set is not in a folder at all."""
    if name == "mnist":
        for file in MNIST_FILES:
            find_mnist(folder, file)
    elif name == "cifar10":
        find_cifar10(folder)
    elif name == "folder":
        check_folder(folder)


def check_folder(folder: Path) -> None:
    """Raises ``ValueError`` where there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name it with --data-dir")
