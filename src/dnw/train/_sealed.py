"""JSON objects that carry a checksum of what they hold, so that a changed bit is found."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

_KEY = "check"


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, and their checksum."""
    return {**values, _KEY: _checksum(values)}


def unsealed(text: str) -> dict[str, Any]:
    """What :func:`sealed` was given, of its JSON; older files have no checksum, and are taken as they are.

    Raises:
        ValueError: no JSON object, or one whose checksum is another.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("brackets within brackets without end") from None
    if not isinstance(values, dict):
        raise ValueError("expected an object in braces")
    if _KEY in values and values.pop(_KEY) != _checksum(values):
        raise ValueError("its checksum is another")
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"
