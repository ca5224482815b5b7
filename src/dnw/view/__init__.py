"""Snapshots of a wiring over time, and pictures of them."""

from dnw.view._flow import Block
from dnw.view._history import write_history
from dnw.view._inside import inside
from dnw.view._layers import Grid, LayerRecord, LayersRecord, record_layers
from dnw.view._page import write_page
from dnw.view._record import GraphShape, NothingToShowError, Record, record
from dnw.view._recorder import Recorder, read_records
from dnw.view._snapshots import Snapshot, SnapshotWriter, read_snapshots
from dnw.view._still import write_still

__all__ = [
    "Block",
    "GraphShape",
    "Grid",
    "LayerRecord",
    "LayersRecord",
    "NothingToShowError",
    "Record",
    "Recorder",
    "Snapshot",
    "SnapshotWriter",
    "inside",
    "read_records",
    "read_snapshots",
    "record",
    "record_layers",
    "write_history",
    "write_page",
    "write_still",
]
