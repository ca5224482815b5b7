"""The command ``dnw``: parses, resolves, calls the library.

Contract: whatever a user can cause ends in one line on standard error and an exit code that is not 0. Torch is imported
only where something is trained or tested.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from dnw._checks import one_of
from dnw.cli._arguments import COMMANDS, make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = make_parser()
    if words and re.fullmatch(r"\w+", words[0]) and words[0] not in COMMANDS:
        parser.error(f"no command {words[0]!r}{one_of(words[0], COMMANDS, most=len(COMMANDS))}")
    parsed, rest = parser.parse_known_args(words)
    if any(word.startswith("-") or not hasattr(parsed, "overrides") for word in rest):
        hint = "; settings are written key=value, such as epochs=2" if hasattr(parsed, "overrides") else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:  # overrides that follow an option: argparse ends a list of arguments at the first option
        parsed.overrides += rest
    signals = [signal.SIGINT]
    try:
        with _ending_like_an_interrupt(signals):
            parsed.run(parsed)
    except KeyboardInterrupt:
        return 128 + signals[-1]
    except BrokenPipeError:  # of a reader such as head, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if parsed.traceback or not _is_users(error):
            raise
        if isinstance(error, ChildProcessError) and os.environ.get("LOCAL_RANK", "0") != "0":
            return 1  # the first process has said what is wrong
        print(f"dnw: {_one_line(error)}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


@contextmanager
def _ending_like_an_interrupt(signals: list[signal.Signals]) -> Iterator[None]:
    """Within, SIGTERM is Ctrl-C: a run says how it goes on. It is put into the list of signals that came."""

    def end(number: int, frame: FrameType | None) -> None:
        signals.append(signal.Signals(number))
        signal.default_int_handler(number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_users(error: Exception) -> bool:
    """Whether an error is one that a user can cause and mend."""
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return True
    return type(error).__name__ == "TrainingStoppedError" or _is_out_of_memory(error)


def _is_out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error)


_EXTRAS = {
    "matplotlib": "plot",
    "networkx": "edges",
    "onnx": "onnx",
    "scipy": "edges",
    "tensorboard": "tensorboard",
    "torchdiffeq": "ode",
    "torchvision": "vision",
}


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get((error.name or "").partition(".")[0], "train")
        return f"{error.name} is not installed; install its extra: pip install 'dnw[{extra}]'"
    if _is_out_of_memory(error):
        return "there is not memory enough; a smaller batch_size takes less, and --traceback says how much was asked for"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
