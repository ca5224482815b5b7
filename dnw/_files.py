"""Files that are whole or not there (written aside and renamed), and files of tensors that can run nothing."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a run killed at any moment, finds the old content or the new, never a part.

    Raises:
        OSError: the file cannot be written (a full disk, say); the message names it and the old content stays.
    """
    part = path.with_name(path.name + ".part")
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe is written to, not replaced
            path.write_bytes(content)
            return
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from None


def read_tensors(path: Path, inert: Sequence[tuple[type, str]] = ()) -> Any:
    """Reads a PyTorch file of tensors and plain containers; nothing that it names is run.

    Args:
        path: the file, in PyTorch's old or new format.
        inert: harmless classes of ours and the foreign names they stand in for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or one that names anything else.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(list(inert)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on the format, which the errors below replace
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = str(error).partition("GLOBAL ")[2].split(" was not", 1)[0]
        if named:
            raise ValueError(
                f"{path}: refused: its pickle names {named}, which could run code; only tensors and plain containers are read"
            ) from None
        raise ValueError(f"{path}: not a readable PyTorch file of tensors and plain containers") from None
    except Exception as error:  # whatever a damaged file makes the reader stumble over
        raise ValueError(f"{path}: not a readable PyTorch file ({type(error).__name__})") from None
