"""One self-contained HTML file in which a wiring changes as its network trains: nodes of graphs, or layers of any network.

Contract: the file loads nothing, runs no text that comes from a run, and is written whole: page/page.html with its style
(page.css), what it shows (main.html) and its scripts in it. Numbers travel as one block: snapshots as differences to the one
before, compressed, in base64.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import numpy as np

from dnw._files import write_whole
from dnw.view._layers import Grid, LayerRecord, LayersRecord
from dnw.view._layout import BEND, layout_of
from dnw.view._record import LEVELS_OF_STRENGTH, Record

_SHARED = ("data.js", "bands.js", "pane.js", "charts.js")
_OWN = {
    "graphs": ("run.js", "light.js", "graph.js", "levels.js", "beside.js"),
    "layers": ("run.js", "map.js", "matrix.js", "beside.js"),
}
_SCRIPTS = {kind: (*_SHARED, *(f"{kind}/{name}" for name in names), "page.js") for kind, names in _OWN.items()}
_SCRIPTS["circuit"] = ("circuit/circuit.js",)
"""What a page of each kind runs, as one script; the last starts it."""

Records = Sequence[Record] | Sequence[LayersRecord]


def write_page(records: Records, path: str | Path, *, reload: int | None = None) -> int:
    """Writes the page of one run, or of several beside each other; returns the number of bytes.

    Args:
        records: of the runs; the first is shown, others can be put beside it. Either all are of graphs, by
            :func:`dnw.view.record`, or all of layers, by :func:`dnw.view.record_layers`.
        path: of the HTML file.
        reload: after how many seconds the browser reads it again, while a run still trains; by default never.

    Raises:
        ValueError: no records, or some of graphs and some of layers.
        OSError: it cannot be written.
    """
    kinds = {"layers" if isinstance(one, LayersRecord) else "graphs" for one in records}
    if len(kinds) != 1:
        raise ValueError(f"records of {' and '.join(sorted(kinds)) or 'nothing'}: one page shows graphs, or layers")
    (kind,) = kinds
    block = bytearray()
    header = {
        "runs": [_described(one, block) for one in records],
        "reload": reload,
        "strongest": LEVELS_OF_STRENGTH,
        "bend": BEND,
    }
    return write_html(kind, " and ".join(dict.fromkeys(one.name for one in records)), header, bytes(block), Path(path))


def write_html(kind: str, title: str, header: Mapping[str, object], block: bytes, path: Path) -> int:
    """Writes a page of one kind; returns the number of bytes.

    Args:
        kind: a folder of what it shows, with its scripts in ``_SCRIPTS``.
        title: of the page.
        header: what its scripts are told, as JSON.
        block: numbers, which the header knows by their places.
        path: of the HTML file.

    Raises:
        OSError: it cannot be written.
    """
    parts = {
        "@TITLE@": html.escape(title),
        "@STYLE@": _inlined("page.css"),
        "@MAIN@": _file(f"{kind}/main.html"),
        "@HEADER@": json.dumps(header, allow_nan=False).replace("<", "\\u003c"),
        "@DATA@": base64.b64encode(gzip.compress(block, 6, mtime=0)).decode(),
        "@SCRIPT@": _inlined(*_SCRIPTS[kind]),
    }
    content = re.sub("|".join(parts), lambda mark: parts[mark[0]], _file("page.html")).encode(errors="replace")
    write_whole(path, content)
    return len(content)


def _file(name: str) -> str:
    return resources.files("dnw.view").joinpath("page", name).read_text(encoding="utf-8")


def _inlined(*names: str) -> str:
    """Style or scripts as they may stand in HTML.

    What would end the element, ``</script``, ``</style`` or ``<!--``, can only be in a string or a comment of theirs, where a
    backslash after the ``<`` changes nothing.
    """
    return re.sub(r"<(?=/script|/style|!--)", r"<\\", "\n".join(map(_file, names)), flags=re.IGNORECASE)


def _described(one: Record | LayersRecord, block: bytearray) -> dict[str, object]:
    """What the page is told of a run; its arrays go into the block."""

    def array(values: np.ndarray) -> dict[str, object]:
        block.extend(bytes(-len(block) % 4))
        found = {"at": len(block), "length": int(values.size), "type": values.dtype.name}
        block.extend(np.ascontiguousarray(values).tobytes())
        return found

    own = _of_layers(one, array) if isinstance(one, LayersRecord) else _of_graphs(one, array)
    metrics = [{k: _number(v) for k, v in m.items()} for m in one.metrics if _number(m.get("epoch")) is not None]
    times = {"steps": one.steps, "epochs": one.epochs, "omitted": one.omitted}
    return {"name": one.name, "about": one.about, **times, "metrics": metrics, **own}


_Array = Callable[[np.ndarray], dict[str, object]]


def _of_graphs(one: Record, array: _Array) -> dict[str, object]:
    layout = layout_of(one.graphs)
    return {
        "graphs": [{**asdict(graph), "middle": middle} for graph, middle in zip(one.graphs, layout.middles, strict=True)],
        "active": one.active,
        "came": one.came,
        "went": one.went,
        "x": array(layout.x),
        "y": array(layout.y),
        "sources": array(one.sources),
        "targets": array(one.targets),
        "strengths": array(_differences(one.strengths)),
        "live": array(_differences(one.live)),
        "filters": array(_differences(one.filters)),
        "images": None if one.images is None else {"shape": one.images.shape, **array(one.images)},
        "maps": [
            {"snapshot": i, "graphs": [{"shape": values.shape, **array(values)} for values in graphs]}
            for i, graphs in one.maps.items()
        ],
    }


def _of_layers(one: LayersRecord, array: _Array) -> dict[str, object]:
    return {"blocks": [asdict(block) for block in one.blocks], "layers": [_of_layer(layer, array) for layer in one.layers]}


def _of_layer(layer: LayerRecord, array: _Array) -> dict[str, object]:
    def grid(of: Grid, values: np.ndarray) -> dict[str, object]:
        return {"side": of.side, "shape": of.shape, "values": array(values)}

    plain = ("name", "targets", "sources", "kernel", "num_groups", "candidates", "active", "came", "went", "positive")
    weights = [{"snapshot": i, "largest": layer.largest[i], **grid(layer.weight_grid, w)} for i, w in layer.weights.items()]
    return {
        **{name: getattr(layer, name) for name in plain},
        "into": array(np.diff(layer.into, axis=0, prepend=np.int32(0))),
        "out": array(np.diff(layer.out, axis=0, prepend=np.int32(0))),
        "shares": grid(layer.share_grid, _differences(layer.shares)),
        "weights": weights,
    }


def _differences(values: np.ndarray) -> np.ndarray:
    """Of each snapshot to the one before, int8, modulo 256; of the first to nothing."""
    differences: np.ndarray = np.diff(values.astype(np.int16), axis=0, prepend=0).astype(np.int8)
    return differences


def _number(value: object) -> float | None:
    """A number that JSON can hold; None in place of any other, such as the loss of an epoch that went wrong."""
    return float(value) if isinstance(value, (int, float, np.floating)) and -1e30 < value < 1e30 else None
