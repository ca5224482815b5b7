"""Argument checks and their wording: what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
from decimal import Decimal


def check_density(value: object, argument: str = "density") -> float:
    """Returns a density as a float; raises ``ValueError`` unless it is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)) or not 0 < value <= 1:
        raise ValueError(
            f"{argument}={value!r}: a density is the share of the candidate edges that is active and lies in (0, 1]; "
            "for a number of edges use num_edges"
        )
    return float(value)


def check_num_edges(value: object, candidates: int, name: str) -> int:
    """Returns a number of edges; raises ``ValueError`` unless it is an integer in [1, candidates]."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if not 1 <= number <= candidates:
        raise ValueError(
            f"num_edges={value!r} for {name!r}: allowed is a whole number from 1 to {candidates:,}, the number of its "
            "candidate edges"
        )
    return number


def check_seed(value: object) -> int:
    """Returns a seed as an int; raises ``ValueError`` unless it is a whole number that fits in 64 bits."""
    try:
        seed = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        seed = -1
    if isinstance(value, bool) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={value!r}: allowed is a whole number from 0 to 2**63 - 1")
    return seed


def did_you_mean(name: str, known: Iterable[str], *, what: str = "") -> str:
    """Returns '; did you mean ...?' for the nearest known name, or an empty string; ``what`` says what is known."""
    close = nearest(name, known)
    return f"; did you mean {what}{close!r}?" if close else ""


def one_of(name: str, known: Iterable[str], most: int = 8) -> str:
    """Returns '; did you mean ...? There are ...' of known names, or '; there are ...' where none is near."""
    known = list(known)
    hint = did_you_mean(name, known)
    return f"{hint} There are {listing(known, most)}" if hint else f"; there are {listing(known, most)}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known name that is most like another one; None where none is as like as the cutoff, from 0 to 1."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return close[0] if close else None


def listing(names: Iterable[str], most: int = 8) -> str:
    """Returns 'a, b, c and 4 more': a list short enough for one message."""
    names = list(names)
    shown = ", ".join(repr(n) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
