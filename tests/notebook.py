"""Runs a notebook and stores it with its outputs, without times and versions: ``python tests/notebook.py FILE...``."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """A notebook as it is after its cells have run in a folder; whatever one of them raises is raised."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=280, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    notebook.metadata = nbformat.from_dict({name: notebook.metadata[name] for name in ("kernelspec",)})
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:]:
        nbformat.write(executed(Path(name), Path(name).parent), name)
