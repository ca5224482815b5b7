"""Figures of matplotlib as files: the same figure gives the same file, written whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from dnw._files import write_whole


def save_figure(figure: Any, file: Path) -> int:
    """Writes a figure; returns the number of bytes.

    Args:
        figure: of matplotlib.
        file: its ending says of which kind; SVG where it has none.

    Raises:
        ValueError: matplotlib does not write such files.
        OSError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = FigureCanvasAgg.get_supported_filetypes()
    kind = file.suffix.removeprefix(".").lower() or "svg"
    if kind not in kinds:
        raise ValueError(f"{file}: pictures are written as {', '.join(sorted(kinds))}")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dnw", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_whole(file, buffer.getvalue())
    return len(buffer.getvalue())
