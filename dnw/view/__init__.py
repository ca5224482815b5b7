"""Snapshots of a wiring over time."""

from dnw.view._snapshots import Snapshot, SnapshotWriter, read_snapshots

__all__ = ["Snapshot", "SnapshotWriter", "read_snapshots"]
