"""Python source code as bytes: the standard library of the interpreter that runs, so nothing is downloaded.

Contract: files are read, never imported. Which of them are held out depends on their names alone.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__"}
_HELD_OUT = 20
"""One in so many files."""
END_OF_FILE = 0
"""The byte that stands after each file; Python code has none of it."""


def read_python_source(folder: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """The code of the files below a folder, to train with and to measure on.

    Args:
        folder: by default that of the standard library, without its tests: 11 million bytes in Python 3.11.

    Returns:
        Two uint8 tensors of bytes, one file after the other, each with a byte 0 at its end. One file in 20, chosen by its name,
        is in the second.

    Raises:
        ValueError: there are not enough files to hold some out.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if folder is None else folder)
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _LEFT_OUT & set(name.parts):
            continue
        draw = int.from_bytes(hashlib.blake2b(name.as_posix().encode(), digest_size=4).digest())
        parts[draw % _HELD_OUT == 0].append(path.read_bytes().replace(b"\0", b"") + bytes([END_OF_FILE]))
    if not all(parts):
        raise ValueError(f"{root}: has {len(parts[0]) + len(parts[1])} Python files, too few to hold some of them out")
    train, test = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return train, test
