"""The one way to native code: shared libraries that were built beside the modules that call them.

Contract: a library is taken if it was built for this version, and its functions are declared where it is loaded. They return a
negative number where they refuse their arguments (errors.h), before they have read or written anything; here that is raised.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

POINTER, INT32, INT64, UINT32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32


def load(folder: Path, name: str, version: int, functions: Mapping[str, Sequence[Any]]) -> ctypes.CDLL | None:
    """The library ``name`` in a folder; None where it is not built, or not for this version.

    Args:
        folder: of the module that calls it.
        name: how its file begins; ``.so`` follows, or of older builds Python's tag before it.
        version: what its ``dnw_version`` is to return.
        functions: names without ``dnw_`` and the types of arguments, of those that return an int32, negative for an error.
    """
    for path in sorted(folder.glob(f"{name}*.so"), key=lambda path: (len(path.name), path.name)):
        try:
            library = ctypes.CDLL(str(path))
            if library.dnw_version() != version:
                continue
            library.dnw_message.restype = ctypes.c_char_p
            for function, arguments in functions.items():
                declared = getattr(library, f"dnw_{function}")
                declared.argtypes, declared.restype = list(arguments), ctypes.c_int32
                declared.errcheck = _raised_or_returned(library.dnw_message)
        except (OSError, AttributeError):  # of another machine, or no library of ours
            continue
        return library
    return None


def _raised_or_returned(message: Any) -> Any:
    def check(returned: int, function: Any, arguments: tuple[Any, ...]) -> int:
        if returned < 0:
            why = (message(returned) or b"error without a text").decode()
            raise RuntimeError(
                f"{function.__name__} refuses its arguments {arguments}: {why}; nothing was computed. This is a fault of dnw: "
                "please report it with this line"
            )
        return returned

    return check


def address(tensor: Tensor | None) -> int | None:
    """Where the numbers of a tensor lie; None where there are none."""
    return None if tensor is None else tensor.data_ptr()
