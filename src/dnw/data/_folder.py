"""Trees of images, one folder a class: ``root/train/<class>/*`` and ``root/val/<class>/*`` (or ``test``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dnw.data._images import Images, sizes_text

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

    def at(self, indices: torch.Tensor) -> FolderImages:
        """Those at some indices, in that order."""
        chosen = indices.tolist()
        return FolderImages(tuple(self.paths[i] for i in chosen), tuple(self.labels[i] for i in chosen), self.classes)


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
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file whose header has been read, and not yet its pixels.

    Raises:
        ValueError: a damaged file, or one that says it has more pixels than Pillow takes for harmless; named.
    """
    try:
        with Image.open(path) as image:
            if too_large(*image.size):  # of twice as many Pillow makes an error itself; up to there it only warns
                raise ValueError(f"{sizes_text(image.size)} pixels, more than Pillow's limit of {Image.MAX_IMAGE_PIXELS:,}")
            yield image
    except Exception as error:  # whatever damage makes a decoder stumble over
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as an image ({reason}); mend or remove it") from None


def too_large(width: float, height: float) -> bool:
    """Whether an image has so many pixels that a small file may have been made to fill the memory."""
    return Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS


def open_image(path: Path) -> Image.Image:
    """An image file as RGB.

    Raises:
        ValueError: a damaged file, or one of too many pixels; named.
    """
    with _opened(path) as image:
        return image.convert("RGB")


def decode(folder: FolderImages, size: int) -> Images:
    """All images of a tree, decoded once: uint8 ``[n, 3, size, size]``."""
    images = np.empty((len(folder), size, size, 3), np.uint8)

    def read(span: Sequence[int]) -> None:
        for i in span:
            image = open_image(folder.paths[i])
            if image.size != (size, size):
                raise ValueError(f"{folder.paths[i]}: is {sizes_text(image.size)} pixels, the others are {size}x{size}")
            images[i] = np.asarray(image)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, (range(i, min(i + 512, len(folder))) for i in range(0, len(folder), 512))):
            pass
    return Images(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(folder.labels), folder.classes)
