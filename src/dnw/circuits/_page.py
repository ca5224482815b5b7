"""A circuit as one HTML file: its nodes in the order of computing, its edges with their weights, and what each node listens to.

Contract: as of any page of :mod:`dnw.view`: it loads nothing and runs no text that comes from a circuit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dnw.circuits._circuit import Circuit
from dnw.view._page import write_html


def write_circuit(circuits: Circuit | Sequence[Circuit], path: str | Path, *, name: str = "circuit") -> int:
    """Writes the page of a circuit, or of several beside each other; returns the number of bytes.

    Args:
        circuits: one or more, of the same network or of several.
        path: of the HTML file.
        name: what the page is called.

    Raises:
        ValueError: no circuits.
        OSError: it cannot be written.
    """
    shown = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    if not shown:
        raise ValueError("no circuits: give one, or several")
    return write_html("circuit", name, {"name": name, "circuits": [asdict(one) for one in shown]}, b"", Path(path))
