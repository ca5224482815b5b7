"""Files that are whole or not there (written aside and renamed), and files of tensors that can run nothing."""

from __future__ import annotations

import io
import os
import pickle
import secrets
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PRETRAINED = Path(__file__).parent / "models" / "pretrained"
"""Where the trained networks of the package lie, a folder each."""
PART = ".part"
"""How the name of a file ends that is being written aside; one that is left over belongs to a process that was killed."""


def pretrained_names() -> list[str]:
    """The trained networks that come with the package."""
    return sorted(path.parent.name for path in PRETRAINED.glob("*/network.pt"))


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a run killed at any moment, finds the old content or the new, never a part.

    It is on the disk when this returns. Of several processes that write the same file at once one wins.

    Raises:
        OSError: the file cannot be written (a full disk, say); the message names it and the old content stays.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe is written to, not replaced
            path.write_bytes(content)
            return
        try:
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:  # Ctrl-C as well
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from None
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Puts a renaming on the disk, so that files written one after the other survive a power cut in that order."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # a system that does not open folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # or a file system that does not sync them
        pass
    finally:
        os.close(descriptor)


def read_text(path: Path, largest: int) -> str:
    """A text file of at most ``largest`` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or not text.
    """
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{path}: larger than {largest:,} bytes, the most that such a file may have")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: damaged (byte {error.start} is no text)") from None


def read_tensors(path: Path, inert: Sequence[tuple[type, str]] = ()) -> Any:
    """Reads a PyTorch file of tensors and plain containers; nothing that it names is run.

    The checksum of every record is verified, so a damaged file is refused; PyTorch's old format (before 1.6) has none.

    Args:
        path: the file, in PyTorch's old or new format.
        inert: harmless classes of ours and the foreign names they stand in for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or one that names anything else.
    """
    import torch  # here, because the command reads configs without it

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    content = path.read_bytes()
    if content.startswith(b"PK"):
        try:
            content = _verified(content)
        except MemoryError:
            raise
        except Exception as error:  # whatever a damaged archive makes the reader stumble over
            raise ValueError(f"{path}: not a readable PyTorch file (damaged or cut: {error or type(error).__name__})") from None
    try:
        with torch.serialization.safe_globals(list(inert)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on the format, which the errors below replace
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = str(error).partition("GLOBAL ")[2].split(" was not", 1)[0]
        if named:
            raise ValueError(
                f"{path}: refused: its pickle names {named}, which could run code; only tensors and plain containers are read"
            ) from None
        raise ValueError(f"{path}: not a readable PyTorch file of tensors and plain containers") from None
    except Exception as error:  # whatever a damaged file makes the reader stumble over
        raise ValueError(f"{path}: not a readable PyTorch file ({type(error).__name__})") from None


def _verified(content: bytes) -> bytes:
    """An archive made anew of the records of another one, each of which has passed its checksum.

    PyTorch does not look at the checksums, and trusts what none of them covers: an entry that says it is a folder, say, gives a
    tensor of whatever the memory held. So it gets nothing but names and verified bytes.
    """
    anew = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(anew, "w") as new:
        seen: set[str] = set()
        for record in old.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise ValueError(f"{record.filename} is compressed, which PyTorch never does")
            if record.filename in seen:
                raise ValueError(f"{record.filename} is there twice")
            seen.add(record.filename)
            new.writestr(zipfile.ZipInfo(record.filename), old.read(record))
    return anew.getvalue()
