"""Trees of images, one folder a class: ``root/train/<class>/*`` and ``root/val/<class>/*`` (or ``test``)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from dnw.data._images import Images

_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm"}
_IN_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True)
class FolderImages:
    """A tree of image files, not yet decoded."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)


def list_folder(root: Path) -> tuple[FolderImages, FolderImages]:
    """The training and test images of a tree.

    Raises:
        ValueError: a wrong layout; the message says what was looked for.
    """
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise ValueError(f"{root}: expected the folders train/<class>/ and val/<class>/ (or test/<class>/) in it")
    parts = [_list(root / "train"), _list(test)]
    if parts[0].classes != parts[1].classes:
        odd = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise ValueError(f"{root}: train and {test.name} hold different classes; {odd[0]!r} is in one only")
    return parts[0], parts[1]


def _list(folder: Path) -> FolderImages:
    classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))
    if not classes:
        raise ValueError(f"{folder}: expected one folder of images per class in it, found none")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in _ENDINGS)
        if not found:
            raise ValueError(f"{folder / name}: holds no images ({', '.join(sorted(_ENDINGS))})")
        paths += found
        labels += [label] * len(found)
    return FolderImages(tuple(paths), tuple(labels), classes)


def fits_in_memory(folder: FolderImages, size: int) -> bool:
    """Whether the images are of the wanted size already (going by the first of each class) and small enough to be kept."""
    first = [folder.paths[folder.labels.index(label)] for label in range(len(folder.classes))]
    return len(folder) * 3 * size * size <= _IN_MEMORY_BYTES and all(_size(p) == (size, size) for p in first)


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (UnidentifiedImageError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: cannot be read as an image ({error}); mend or remove it")


def open_image(path: Path) -> Image.Image:
    """An image file as RGB.

    Raises:
        ValueError: a damaged file, named.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _damaged(path, error) from None


def decode(folder: FolderImages, size: int) -> Images:
    """All images of a tree, decoded once: uint8 ``[n, 3, size, size]``."""
    images = np.empty((len(folder), size, size, 3), np.uint8)

    def read(span: Sequence[int]) -> None:
        for i in span:
            image = open_image(folder.paths[i])
            if image.size != (size, size):
                raise ValueError(f"{folder.paths[i]}: is {image.size[0]}x{image.size[1]} pixels, the others are {size}x{size}")
            images[i] = np.asarray(image)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, (range(i, min(i + 512, len(folder))) for i in range(0, len(folder), 512))):
            pass
    return Images(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(folder.labels), folder.classes)
