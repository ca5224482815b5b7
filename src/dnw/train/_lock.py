"""One process at a time trains a run."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a run directory for this process, until the block ends or the process does, however it does.

    Raises:
        ValueError: another process holds it; it is named.
        OSError: nothing can be written there.
    """
    descriptor = _locked(folder)
    if descriptor is None:
        yield
        return
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on host {socket.gethostname()}\n".encode())
        yield
    finally:
        (folder / NAME).unlink(missing_ok=True)
        os.close(descriptor)


def _locked(folder: Path) -> int | None:
    file = folder / NAME
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Not flock: processes that decode images inherit such a lock, and hold it some seconds longer than a killed run.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ValueError(f"{folder}: is being trained by {holder}; wait for it, or stop it first") from None
        except OSError as error:
            os.close(descriptor)
            warnings.warn(
                f"{folder}: its file system has no locks ({error.strerror}); nothing holds a second dnw resume off",
                stacklevel=4,
            )
            return None
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
        os.close(descriptor)  # the process that held it has just taken it away
