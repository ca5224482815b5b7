"""Snapshots of a wiring over time: which edges it had when, and how strong they were.

Contract: one small archive a snapshot, ``step-<steps>.npz``, written aside and renamed. Each holds, per wired parameter,
the edges that came and went since the snapshot before (the first one holds all its edges as come) and the weights of all
edges in half precision, in the order of their flat indices; and the step of the snapshot before. Reading them in order gives
every edge set exactly. Other arrays may lie beside them (_inside.py).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dnw._files import write_whole
from dnw._wiring import Wiring

_BESIDE = "beside/"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A wiring at one moment.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done; a fraction within an epoch.
        edges: flat indices of the active edges, sorted, int64 ``[edges]``, by parameter name.
        weights: their weights, float16 ``[edges]``, by parameter name.
        beside: other arrays of that moment, by name.
    """

    step: int
    epoch: float
    edges: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    beside: dict[str, np.ndarray] = field(default_factory=dict)


class SnapshotWriter:
    """Writes snapshots into a folder, each as the difference to the one before.

    Args:
        folder: is made where it does not exist. Snapshots of later steps than ``step`` are removed (they belong to the
            lost part of an interrupted run) and the last one kept is continued from.
        step: optimizer steps done.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in _paths(folder):
            if _step_of(path) > step:
                path.unlink()
        self._edges: dict[str, np.ndarray] = {}
        self._last_step = -1
        for snapshot in read_snapshots(folder):
            self._edges, self._last_step = snapshot.edges, snapshot.step

    def write(self, wiring: Wiring, step: int, epoch: float, beside: Mapping[str, np.ndarray] | None = None) -> None:
        """Writes one snapshot, with other arrays beside it; nothing where this step has one already.

        Raises:
            OSError: the file cannot be written.
        """
        if step <= self._last_step:
            return
        arrays: dict[str, np.ndarray] = {"time": np.array([step, epoch]), "before": np.array(self._last_step)}
        arrays |= {f"{_BESIDE}{name}": array for name, array in (beside or {}).items()}
        edges: dict[str, np.ndarray] = {}
        for name, parameter in wiring.items():
            flat = parameter.active.flatten().cpu()
            weights = parameter.weight.flatten().cpu()[flat]
            edges[name] = flat.numpy().nonzero()[0]
            before = self._edges.get(name, edges[name][:0])
            arrays[f"{name}/came"] = np.setdiff1d(edges[name], before, assume_unique=True).astype(np.uint32)
            arrays[f"{name}/went"] = np.setdiff1d(before, edges[name], assume_unique=True).astype(np.uint32)
            arrays[f"{name}/weight"] = weights.float().numpy().astype(np.float16)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_whole(self._folder / f"step-{step:08d}.npz", buffer.getvalue())
        self._edges, self._last_step = edges, step


def read_snapshots(folder: Path) -> Iterator[Snapshot]:
    """The snapshots of a folder in order of time.

    Raises:
        ValueError: a damaged or missing snapshot; the file is named.
    """
    edges: dict[str, np.ndarray] = {}
    last = -1
    for path in _paths(folder):
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
                step, epoch = archive["time"].tolist()
                if "before" in archive.files and int(archive["before"]) != last:
                    raise ValueError(f"the snapshot of step {int(archive['before'])}, which it continues, is missing")
                weights = {}
                beside = {key.removeprefix(_BESIDE): archive[key] for key in archive.files if key.startswith(_BESIDE)}
                for name in [key.removesuffix("/weight") for key in archive.files if key.endswith("/weight")]:
                    came, went = archive[f"{name}/came"].astype(np.int64), archive[f"{name}/went"].astype(np.int64)
                    if name not in edges or len(came) or len(went):
                        kept = np.setdiff1d(edges.get(name, came[:0]), went, assume_unique=True)
                        edges[name] = np.union1d(kept, came)
                    weights[name] = archive[f"{name}/weight"]
                    if len(weights[name]) != len(edges[name]):
                        raise ValueError("an earlier snapshot is missing")
        except Exception as error:  # whatever damage makes of an archive's parts
            raise ValueError(f"{path}: not a readable snapshot ({error})") from None
        last = int(step)
        yield Snapshot(last, epoch, dict(edges), weights, beside)


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.npz"))


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
