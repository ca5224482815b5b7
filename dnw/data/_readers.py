"""Readers of the data sets' own file formats: digits (npz), MNIST (IDX), CIFAR-10 (pickled batches, never unpickled freely)."""

from __future__ import annotations

import gzip
import io
import pickle
import zlib
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnw.data._images import Images

_DIGITS = tuple("0123456789")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


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
        ValueError: a missing, cut-off or foreign file, named.
    """
    places = [folder / "MNIST" / "raw", folder / "raw", folder]
    parts = []
    for part in ("train", "t10k"):
        images = _idx(_find(places, f"{part}-images-idx3-ubyte"), 3)
        labels = _idx(_find(places, f"{part}-labels-idx1-ubyte"), 1)
        if len(images) != len(labels):
            raise ValueError(f"MNIST in {folder}: {len(images):,} {part} images but {len(labels):,} labels")
        parts.append(Images(torch.from_numpy(images[:, None]), torch.from_numpy(labels.astype(np.int64)), _DIGITS))
    return parts[0], parts[1]


def _find(places: list[Path], name: str) -> Path:
    for place in places:
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    tried = ", ".join(str(p) for p in dict.fromkeys(places))
    raise ValueError(f"no MNIST file {name} (or {name}.gz) in {tried}; name the folder with --data-dir")


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of bytes: two zeros, type 8, number of dimensions, the sizes (big-endian), the values."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None
    if raw[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{path}: not an IDX file of {dimensions}-dimensional bytes (it starts with {raw[:4].hex(' ')})")
    sizes = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    start = 4 + 4 * dimensions
    wanted = int(np.prod(sizes, dtype=np.int64))
    if len(raw) - start != wanted:
        raise ValueError(f"{path}: cut off or damaged: {len(raw) - start:,} bytes of values, its header says {wanted:,}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes).copy()


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
    entries = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
    data, labels = entries.get("data"), entries.get("labels")
    if not isinstance(data, _Array) or data.shape is None or len(data.shape) != 2 or data.shape[1] != 3072:
        raise ValueError(f"{path}: no image bytes [n, 3072] under 'data'")
    if not isinstance(labels, list) or len(labels) != data.shape[0]:
        raise ValueError(f"{path}: 'labels' does not give one label for each of {data.shape[0]:,} images")
    targets = torch.tensor(labels, dtype=torch.int64)
    if bool(((targets < 0) | (targets > 9)).any()):
        raise ValueError(f"{path}: a label lies outside 0 to 9")
    return torch.from_numpy(data.to_numpy(path)).view(-1, 3, 32, 32), targets


class _DType:
    """Records which NumPy type a pickle names."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Records the shape and the bytes of an array that a pickle holds; runs nothing."""

    shape: tuple[int, ...] | None = None

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.columns_first, self.raw = state

    def to_numpy(self, path: Path) -> np.ndarray:
        raw = self.raw.encode("latin-1") if isinstance(self.raw, str) else self.raw
        code = getattr(self.dtype, "code", None)
        size = int(np.prod(self.shape or (), dtype=np.int64))
        if code not in ("u1", b"u1") or self.columns_first or not isinstance(raw, bytes) or len(raw) != size:
            raise ValueError(f"{path}: its array is not the plain bytes of images")
        return np.frombuffer(raw, np.uint8).reshape(self.shape or ()).copy()


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
