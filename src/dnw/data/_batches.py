"""Batches of an epoch: in an order and with draws that depend on seed and epoch alone.

Contract: the same epoch gives the same batches whenever it is run, in a first run or after a resume. With several
processes each global batch is dealt out to them, every process gets as many batches, and the random draws belong to the
image, not to the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dnw.data._augment import Augment, crop_and_flip
from dnw.data._folder import FolderImages, open_image, too_large
from dnw.data._images import Images, sizes_text

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """Training and test batches: images float ``[batch, channels, height, width]``, labels int64 ``[batch]``."""

    @property
    def num_batches(self) -> int:
        """Training batches per epoch."""
        ...

    def train(self, epoch: int) -> Iterator[Batch]: ...

    def test(self) -> Iterator[Batch]: ...


def epoch_order(num: int, seed: int, epoch: int, draws: int = 3) -> tuple[Tensor, Tensor]:
    """The order of an epoch's images, int64 ``[num]``, and their random draws, ``[num, draws]`` in order of appearance."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(num, generator=generator), torch.rand(num, draws, generator=generator)


def deal(num: int, batch_size: int, rank: int, world: int, whole: bool) -> list[slice]:
    """The positions that one process takes of each global batch.

    With ``whole`` no position is left over (evaluation), and what is less than one for each process goes with the batch before;
    else the last batch is cut to a multiple of the number of processes. So all of them take the same number of steps.

    Raises:
        ValueError: fewer than one for each process.
    """
    if num < world:
        raise ValueError(f"{num} images for {world} processes: give fewer processes, or more images")
    starts = list(range(0, num, batch_size))
    if whole and num - starts[-1] < world:
        del starts[-1]
    spans = []
    for start, stop in zip(starts, [*starts[1:], num], strict=True):
        end = stop if whole else stop - (stop - start) % world
        if end > start:
            spans.append(slice(start + rank, end, world))
    return spans


class InMemory:
    """Images kept as bytes on the device, augmented in batch there.

    Args:
        train, test: decoded images.
        batch_size: images per step over all processes.
        seed: of the order and the draws.
        augment: what training images go through.
        mean, std: per channel, in units of the full range.
        device: where images are kept and batches are made.
        rank, world: this process among how many.
    """

    def __init__(
        self,
        train: Images,
        test: Images,
        *,
        batch_size: int,
        seed: int,
        augment: Augment,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._sets = [(x.images.to(device), x.labels.to(device)) for x in (train, test)]
        self._batch_size, self._seed, self._augment = batch_size, seed, augment
        self._mean = torch.tensor(mean, device=device)[:, None, None]
        self._std = torch.tensor(std, device=device)[:, None, None]
        self._device, self._rank, self._world = device, rank, world

    @property
    def num_batches(self) -> int:
        return len(deal(len(self._sets[0][1]), self._batch_size, self._rank, self._world, whole=False))

    def train(self, epoch: int) -> Iterator[Batch]:
        images, labels = self._sets[0]
        order, draws = (x.to(self._device) for x in epoch_order(len(labels), self._seed, epoch))
        for span in deal(len(labels), self._batch_size, self._rank, self._world, whole=False):
            picked = order[span]
            yield self._normalise(crop_and_flip(images[picked], draws[span], self._augment)), labels[picked]

    def test(self) -> Iterator[Batch]:
        images, labels = self._sets[1]
        for span in deal(len(labels), max(self._batch_size, 500), self._rank, self._world, whole=True):
            yield self._normalise(images[span]), labels[span]

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self._mean) / self._std


class _Decoder(Dataset[tuple[Tensor, int]]):
    """Decodes, crops and resizes one image file in a worker; item ``(index, draws)``."""

    def __init__(self, folder: FolderImages, size: int, training: bool) -> None:
        self.folder, self.size, self.training = folder, size, training

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, item: tuple[int, list[float]]) -> tuple[Tensor, int]:
        from PIL import Image

        index, draws = item
        image = open_image(self.folder.paths[index])
        width, height = image.size
        if self.training:
            box = _random_box(width, height, draws)
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
            if draws[4] < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            image = _centre(image, self.size, self.folder.paths[index])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), self.folder.labels[index]


def _random_box(width: int, height: int, draws: Sequence[float]) -> tuple[float, float, float, float]:
    """A box of 8 to 100 % of the area and a ratio of sides from 3/4 to 4/3, within the image."""
    area = (0.08 + 0.92 * draws[0]) * width * height
    ratio = (3 / 4) * ((4 / 3) / (3 / 4)) ** draws[1]
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = draws[2] * (width - w), draws[3] * (height - h)
    return left, top, left + w, top + h


def _centre(image, size: int, path: Path):  # type: ignore[no-untyped-def]
    """Resizes the shorter side to 8/7 of the size (256 for 224) and takes the centre."""
    from PIL import Image

    scale = size * 8 / 7 / min(image.size)
    width, height = (max(size, round(x * scale)) for x in image.size)
    if too_large(width, height):  # resizing a thin strip fills the memory as a large image does
        raise ValueError(f"{path}: is {sizes_text(image.size)} pixels, too thin a strip to be resized; remove it")
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Streaming:
    """Image files decoded by worker processes: random resized crop and flip to train, centre crop to test.

    Arguments as for :class:`InMemory`; ``size`` is the side of the square images that the network gets.
    """

    def __init__(
        self,
        train: FolderImages,
        test: FolderImages,
        *,
        size: int,
        batch_size: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        workers: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._train, self._test, self._size = train, test, size
        self._batch_size, self._seed, self._workers = batch_size, seed, workers
        self._mean = torch.tensor(mean, device=device)[:, None, None]
        self._std = torch.tensor(std, device=device)[:, None, None]
        self._device, self._rank, self._world = device, rank, world

    @property
    def num_batches(self) -> int:
        return len(deal(len(self._train), self._batch_size, self._rank, self._world, whole=False))

    def train(self, epoch: int) -> Iterator[Batch]:
        order, draws = epoch_order(len(self._train), self._seed, epoch, draws=5)
        items = list(zip(order.tolist(), draws.tolist(), strict=True))
        spans = deal(len(items), self._batch_size, self._rank, self._world, whole=False)
        return self._load(_Decoder(self._train, self._size, training=True), [items[span] for span in spans])

    def test(self) -> Iterator[Batch]:
        spans = deal(len(self._test), self._batch_size, self._rank, self._world, whole=True)
        batches: list[list[tuple[int, list[float]]]] = [[(i, []) for i in range(len(self._test))[span]] for span in spans]
        return self._load(_Decoder(self._test, self._size, training=False), batches)

    def _load(self, dataset: _Decoder, batches: list[list[tuple[int, list[float]]]]) -> Iterator[Batch]:
        draws_nothing = torch.Generator()  # the loader seeds its workers with it, and would with the user's
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=self._workers, generator=draws_nothing)
        try:
            for images, labels in loader:
                images, labels = images.to(self._device), labels.to(self._device)
                yield (images.float() / 255 - self._mean) / self._std, labels
        except ValueError as error:  # a worker wraps its error in its whole traceback
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
