"""Readers of the data sets' own file formats: digits (npz), MNIST (IDX), CIFAR-10 (pickled batches, never unpickled freely)."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import zlib
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnw.data._images import Images, sizes_text
from dnw.data._places import find_mnist

_DIGITS = tuple("0123456789")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_MOST_BYTES = 1 << 30
"""Of the values of an IDX file; those of MNIST are 47 million."""


def read_digits() -> tuple[Images, Images]:
    """The handwritten digits in the package: 1,257 training and 540 test images, uint8 ``[n, 1, 8, 8]``.

    The last 30 % of the file are the test images; the file is ordered by writer, so most of them are by other writers.
    """
    raw = resources.files("dnw.data").joinpath("digits.npz").read_bytes()
    with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
        pixels = np.rint(archive["images"].astype(np.float32) * (255 / 16)).astype(np.uint8)
        labels = archive["labels"].astype(np.int64)
    images, targets = torch.from_numpy(pixels[:, None]), torch.from_numpy(labels)
    return Images(images[:1257], targets[:1257], _DIGITS), Images(images[1257:], targets[1257:], _DIGITS)


def read_mnist(folder: Path) -> tuple[Images, Images]:
    """MNIST from its four IDX files, plain or gzipped, in ``folder`` or ``folder/MNIST/raw``.

    Raises:
        ValueError: a missing, cut-off or foreign file, one without images, one that says it holds more than a gigabyte, or
            a label above 9; the file is named.
    """
    parts = []
    for part in ("train", "t10k"):
        path = find_mnist(folder, f"{part}-images-idx3-ubyte")
        images = _idx(path, 3)
        if not images.size:
            raise ValueError(f"{path}: holds no images (its header says {sizes_text(images.shape)})")
        path = find_mnist(folder, f"{part}-labels-idx1-ubyte")
        labels = _idx(path, 1)
        if len(images) != len(labels):
            raise ValueError(f"MNIST in {folder}: {len(images):,} {part} images but {len(labels):,} labels")
        if labels.max() >= len(_DIGITS):
            raise ValueError(f"{path}: label {labels.argmax():,} is {labels.max()}, not a digit from 0 to {len(_DIGITS) - 1}")
        parts.append(Images(torch.from_numpy(images[:, None]), torch.from_numpy(labels.astype(np.int64)), _DIGITS))
    return parts[0], parts[1]


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of bytes: two zeros, type 8, number of dimensions, the sizes (big-endian), the values.

    Of a gzipped file no more is unpacked than its header says that there is.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(4 + 4 * dimensions)
            if start[:4] != bytes((0, 0, 8, dimensions)):
                foreign = f"not an IDX file of {dimensions}-dimensional bytes (it starts with {start[:4].hex(' ')})"
                raise ValueError(f"{path}: {foreign}")
            if len(start) < 4 + 4 * dimensions:
                raise ValueError(f"{path}: cut off in its header, after {len(start)} bytes")
            sizes = tuple(int.from_bytes(start[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
            wanted = math.prod(sizes)
            if wanted > _MOST_BYTES:
                raise ValueError(
                    f"{path}: its header says {sizes_text(sizes)} bytes of values; at most {_MOST_BYTES:,} are read"
                )
            raw = file.read(wanted)
            found = f"{len(raw):,}" if len(raw) < wanted else f"more than {wanted:,}" if file.read(1) else None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None
    if found:
        raise ValueError(f"{path}: cut off or damaged: {found} bytes of values, its header says {wanted:,}")
    return np.frombuffer(raw, np.uint8).reshape(sizes).copy()


def read_cifar10(folder: Path) -> tuple[Images, Images]:
    """CIFAR-10 from its pickled batches in ``folder`` (``data_batch_1`` to ``5``, ``test_batch``).

    Raises:
        ValueError: a missing or damaged file, or one whose pickle is not the plain data of such a batch.
    """
    train = [_cifar_batch(folder / f"data_batch_{i}") for i in range(1, 6)]
    images = Images(torch.cat([t[0] for t in train]), torch.cat([t[1] for t in train]), CIFAR10_CLASSES)
    test = _cifar_batch(folder / "test_batch")
    return images, Images(test[0], test[1], CIFAR10_CLASSES)


def _cifar_batch(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the CIFAR-10 batches are data_batch_1 to 5 and test_batch")
    content = read_plain_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary, found a {type(content).__name__}")
    data, labels = (content.get(key, content.get(key.encode())) for key in ("data", "labels"))
    if not isinstance(data, _Array) or not data.is_matrix(columns=3072):
        raise ValueError(f"{path}: no image bytes [n, 3072] under 'data'")
    images = data.to_numpy(path)
    if not len(images):
        raise ValueError(f"{path}: holds no images")
    if not isinstance(labels, list) or len(labels) != len(images):
        raise ValueError(f"{path}: 'labels' does not give one label for each of {len(images):,} images")
    for i, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < len(CIFAR10_CLASSES):  # True is an int too, and no label
            raise ValueError(f"{path}: label {i:,} is not a whole number from 0 to {len(CIFAR10_CLASSES) - 1}")
    return torch.from_numpy(images).view(-1, 3, 32, 32), torch.tensor(labels)


class _DType:
    """Records which NumPy type a pickle names."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Records the shape and the bytes of an array that a pickle holds; runs nothing."""

    shape: Any = None

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.columns_first, self.raw = state

    def is_matrix(self, columns: int) -> bool:
        shape = self.shape
        return isinstance(shape, tuple) and [type(n) for n in shape] == [int, int] and shape[0] >= 0 and shape[1] == columns

    def to_numpy(self, path: Path) -> np.ndarray:
        code = getattr(self.dtype, "code", None)
        try:
            raw = self.raw.encode("latin-1") if isinstance(self.raw, str) else self.raw
        except UnicodeEncodeError:
            raw = None
        if code not in ("u1", b"u1") or self.columns_first or not isinstance(raw, bytes) or len(raw) != math.prod(self.shape):
            raise ValueError(f"{path}: its array is not the plain bytes of images")
        return np.frombuffer(raw, np.uint8).reshape(self.shape).copy()


def _latin1(text: str, encoding: str = "latin-1") -> bytes:
    return text.encode("latin-1")


_RECORDERS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _latin1,
}


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers, text and recorded arrays. Every name in the file is looked up in our own table only."""

    def find_class(self, module: str, name: str) -> Any:
        recorder = _RECORDERS.get((module, name))
        if recorder is None:
            raise pickle.UnpicklingError(f"its pickle names {module}.{name}, which could run code")
        return recorder


def read_plain_pickle(path: Path) -> Any:
    """A pickle of plain data; nothing that the file names is imported or run.

    Raises:
        ValueError: a damaged file, or a pickle that names anything else than NumPy arrays.
    """
    try:
        return _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin-1").load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused: {error}") from None
    except Exception as error:
        raise ValueError(f"{path}: damaged or no pickle ({type(error).__name__})") from None
