"""One boolean per element of memory, so that views and writing in place need no care."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dnw.count._ledger import storage


class Marks:
    """One boolean per element of every storage; a storage without marks is known as such."""

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[Tensor, int]] = {}

    def read(self, tensor: Tensor) -> Tensor | None:
        """The marks of a tensor's elements, in its shape; None where its storage has none."""
        buffer, itemsize = self._buffers.get(storage(tensor), (None, 0))
        if buffer is None:
            return None
        if itemsize != tensor.itemsize:  # a view as another type, whose elements are others
            return buffer.any().expand(tensor.shape)
        return buffer.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def write(self, tensor: Tensor, marks: Tensor | None, *, add: bool = False) -> None:
        """Sets the marks of a tensor's elements, None for none of them, or adds to them."""
        key = storage(tensor)
        if key not in self._buffers:
            if marks is None or not bool(marks.any()):
                return
            size = tensor.untyped_storage().nbytes() // tensor.itemsize
            self._buffers[key] = torch.zeros(size, dtype=torch.bool), tensor.itemsize
        buffer, itemsize = self._buffers[key]
        if itemsize != tensor.itemsize:
            buffer |= marks is not None and bool(marks.any())
            return
        elements = self.read(tensor)
        assert elements is not None
        if _overlaps(tensor):
            if marks is not None:
                where = torch.arange(len(buffer)).as_strided(elements.size(), elements.stride(), elements.storage_offset())
                buffer[where[marks]] = True
        elif marks is None:
            elements.zero_()
        else:
            elements.copy_(elements | marks if add else marks)

    def drop(self, storages: Iterable[int]) -> None:
        """Forgets the marks of storages."""
        for key in storages:
            self._buffers.pop(key, None)


def _overlaps(tensor: Tensor) -> bool:
    """Whether several elements may lie at one address, as in an expanded tensor."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False
