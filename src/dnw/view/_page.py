"""One self-contained HTML file in which a wiring changes as its network trains.

Contract: the file loads nothing, runs no text that comes from a run, and is written whole. Numbers travel as one block:
snapshots as differences to the one before, compressed, in base64.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import numpy as np

from dnw._files import write_whole
from dnw.view._record import Record


def write_page(records: Sequence[Record], path: Path, *, reload: int | None = None) -> int:
    """Writes the page of one run, or of several beside each other; returns the number of bytes.

    Args:
        records: of the runs; the first is shown, others can be put beside it.
        path: of the HTML file.
        reload: after how many seconds the browser reads it again, while a run still trains; by default never.

    Raises:
        OSError: it cannot be written.
    """
    block = bytearray()
    described = [_described(one, block) for one in records]
    data = base64.b64encode(gzip.compress(bytes(block), 6, mtime=0)).decode()
    header = json.dumps({"runs": described, "reload": reload}, allow_nan=False).replace("<", "\\u003c")
    template = resources.files("dnw.view").joinpath("page.html").read_text()
    title = html.escape(" and ".join(dict.fromkeys(one.name for one in records)))
    parts = {"@TITLE@": title, "@HEADER@": header, "@DATA@": data}
    content = re.sub("|".join(parts), lambda mark: parts[mark[0]], template).encode(errors="replace")
    write_whole(path, content)
    return len(content)


def _described(one: Record, block: bytearray) -> dict[str, object]:
    """What the page is told of a run; its arrays go into the block."""

    def array(values: np.ndarray) -> dict[str, object]:
        block.extend(bytes(-len(block) % 4))
        found = {"at": len(block), "length": int(values.size), "type": values.dtype.name}
        block.extend(np.ascontiguousarray(values).tobytes())
        return found

    filters = np.diff(one.filters.astype(np.int16), axis=0, prepend=0).astype(np.uint8) if len(one.filters) else one.filters
    differences = np.diff(one.strengths.astype(np.int16), axis=0, prepend=0).astype(np.uint8)
    live = np.diff(one.live.astype(np.uint8), axis=0, prepend=0).astype(np.uint8)
    return {
        "name": one.name,
        "about": one.about,
        "graphs": [asdict(graph) for graph in one.graphs],
        "steps": one.steps,
        "epochs": one.epochs,
        "omitted": one.omitted,
        "active": one.active,
        "came": one.came,
        "went": one.went,
        "least": one.least,
        "largest": one.largest,
        "metrics": [{k: _number(v) for k, v in m.items()} for m in one.metrics if _number(m.get("epoch")) is not None],
        "sources": array(one.sources),
        "targets": array(one.targets),
        "strengths": array(differences),
        "live": array(live),
        "filters": array(filters.astype(np.uint8)),
        "images": None if one.images is None else {"shape": one.images.shape, **array(one.images)},
        "maps": [
            {"snapshot": i, "graphs": [{"shape": values.shape, **array(values)} for values in graphs]}
            for i, graphs in one.maps.items()
        ],
    }


def _number(value: object) -> float | None:
    """A number that JSON can hold; None in place of any other, such as the loss of an epoch that went wrong."""
    return float(value) if isinstance(value, (int, float, np.floating)) and -1e30 < value < 1e30 else None
