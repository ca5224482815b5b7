"""Snapshots of a wiring over time, and pictures of them."""

from dnw.view._page import write_page
from dnw.view._record import GraphShape, Record, record
from dnw.view._snapshots import Snapshot, SnapshotWriter, read_snapshots

__all__ = ["GraphShape", "Record", "Snapshot", "SnapshotWriter", "read_snapshots", "record", "write_page"]
