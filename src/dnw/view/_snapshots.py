"""Snapshots of a wiring over time: which edges it had when, and how strong they were.

Contract: one small archive a snapshot, ``step-<steps>.npz``, written aside and renamed. Each holds, per wired parameter,
the edges that came and went since the snapshot before and the weights of all edges in half precision, in the order of their
flat indices; and the step of the snapshot before. One that begins anew (the first does) says -1 there and holds all its edges
as come. Reading them in order gives every edge set exactly. Other arrays may lie beside them (_inside.py).

Reading runs nothing and believes nothing: a file has exactly these arrays, of these types and sizes, with right checksums,
edges that can come and go, and a time that goes on, or it is refused.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dnw._checks import listing
from dnw._files import write_whole
from dnw._wiring.wiring import Wiring

_BESIDE = "beside/"
_PARTS = {"came", "went", "weight"}
_MOST_BYTES = 2 << 30
"""Of the arrays of one snapshot, unpacked; a parameter of 300 million active edges has 1.8 billion."""
_NO_EDGES = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A wiring at one moment.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done; a fraction within an epoch.
        edges: flat indices of the active edges, sorted, int64 ``[edges]``, by parameter name.
        weights: their weights, float16 ``[edges]``, by parameter name. All are finite: a magnitude above 65,504, the largest
            in half precision, is stored as that, and NaN as 0.
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
        folder: is made where it does not exist. Snapshots of later steps than ``step`` (or, without it, not earlier than the
            first one that is written) are removed (they belong to the
            lost part of an interrupted run) and the last one kept is continued from. Where one is damaged, it and those after
            it, which cannot be read without it, are set aside (renamed to ``*.damaged``, with a warning), and the one before
            it is continued from.
        step: optimizer steps done; by default so many that what is written first comes next.
    """

    def __init__(self, folder: Path, step: int | None = None) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._last: Snapshot | None = None
        self._has_begun = False
        if step is not None:
            self._begin(step)

    def _begin(self, step: int) -> None:
        """Clears up what is later, once, and goes on from the last one that is left."""
        if self._has_begun:
            return
        self._has_begun, folder = True, self._folder
        for path in _paths(folder):
            if _step_of(path) > step:
                path.unlink()
        paths = _paths(folder)
        try:
            for self._last in read_snapshots(folder):
                del paths[0]
        except ValueError as error:
            for path in paths:
                path.replace(path.with_name(f"{path.name}.damaged"))
            rest = f" and the {len(paths) - 1} after it are" if len(paths) > 1 else " is"
            warnings.warn(f"{error}; it{rest} set aside as .damaged, and pictures of the run leave them out", stacklevel=3)

    def write(self, wiring: Wiring, step: int, epoch: float, beside: Mapping[str, np.ndarray] | None = None) -> None:
        """Writes one snapshot, with other arrays beside it; nothing where this step has one already.

        Raises:
            ValueError: the epoch is not finite, or lies before that of the last snapshot.
            OSError: the file cannot be written.
        """
        self._begin(step - 1)
        last = self._last
        if last is not None and step <= last.step:
            return
        if not (last.epoch if last else 0.0) <= epoch < math.inf:
            raise ValueError(f"epoch={epoch}: expected a number from {last.epoch if last else 0.0:g} on, the last snapshot's")
        edges, weights = {}, {}
        for name, parameter in wiring.items():
            flat = parameter.active.flatten().cpu()
            edges[name] = flat.numpy().nonzero()[0]
            weights[name] = as_half(parameter.weight.flatten().cpu()[flat].float().numpy())
        self.append(Snapshot(step, epoch, edges, weights, dict(beside or {})))

    def append(self, snapshot: Snapshot) -> None:
        """Writes a snapshot as it is, after those that are there; nothing where its step has one already."""
        self._begin(snapshot.step - 1)
        if self._last is not None and snapshot.step <= self._last.step:
            return
        last, edges, weights, beside = self._last, snapshot.edges, snapshot.weights, snapshot.beside
        step, epoch = snapshot.step, snapshot.epoch
        before = last.edges if last and last.edges.keys() == edges.keys() else {}
        arrays: dict[str, np.ndarray] = {
            "time": np.array([step, epoch]),
            "before": np.array(last.step if last and before else -1),
        }
        arrays |= {f"{_BESIDE}{name}": array for name, array in beside.items()}
        for name, now in edges.items():
            earlier = before.get(name, _NO_EDGES)
            arrays[f"{name}/came"] = now[~_among(now, earlier)].astype(np.uint32)
            arrays[f"{name}/went"] = earlier[~_among(earlier, now)].astype(np.uint32)
            arrays[f"{name}/weight"] = weights[name]
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_whole(self._folder / _name(step), buffer.getvalue())
        self._last = snapshot


def thin_snapshots(source: Path, target: Path, most: int) -> None:
    """Writes some of the snapshots of a folder into another one: the first, the last, and between them more early than late.

    Args:
        source, target: folders; what is in the second stays where its steps come before.
        most: how many, at least 2.

    Raises:
        ValueError: a damaged snapshot.
    """
    found = list(read_snapshots(source))
    if not found:
        return
    count = min(most, len(found))
    wanted = {round((len(found) - 1) * (i / max(1, count - 1)) ** 2) for i in range(count)}
    writer = SnapshotWriter(target)
    for number in sorted(wanted):
        writer.append(found[number])


def as_half(values: np.ndarray) -> np.ndarray:
    """Numbers in half precision, all finite: magnitudes beyond its range become its largest, 65,504, and NaN becomes 0."""
    limit = np.finfo(np.float16).max
    return np.nan_to_num(values).clip(-limit, limit).astype(np.float16)


def read_snapshots(folder: Path, sizes: Mapping[str, int] | None = None) -> Iterator[Snapshot]:
    """The snapshots of a folder in order of time.

    Args:
        folder: of the snapshots; other files in it are none of ours.
        sizes: how many entries parameters have, by name, where that is known: no edge lies beyond them.

    Raises:
        ValueError: a damaged snapshot, or one that cannot follow the one before; the file is named.
    """
    last: Snapshot | None = None
    for path in _paths(folder):
        try:
            last = _read(path, last, sizes or {})
        except Exception as error:  # whatever damage makes of an archive
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"{path}: not a readable snapshot ({reason})") from None
        yield last


def _read(path: Path, last: Snapshot | None, sizes: Mapping[str, int]) -> Snapshot:
    arrays = _arrays(path)
    step, epoch = _time(arrays)
    if path.name != _name(step):
        raise ValueError(f"it is of step {step}, so its name would be {_name(step)}")
    if last and epoch < last.epoch:
        raise ValueError(f"its epoch, {epoch:g}, lies before that of the snapshot before it, {last.epoch:g}")
    continued = arrays.pop("before", np.array(last.step if last else -1))  # the oldest files do not say
    if continued.shape != () or continued.dtype.kind != "i":
        raise ValueError("what it says of the snapshot before it is no step")
    if continued != -1 and (last is None or continued != last.step):
        raise ValueError(f"the snapshot of step {continued}, which it continues, is missing")
    beside = {key.removeprefix(_BESIDE): np.nan_to_num(arrays.pop(key)) for key in list(arrays) if key.startswith(_BESIDE)}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        name, _, part = key.rpartition("/")
        parts.setdefault(name, {})[part] = array
    before = last.edges if last and continued != -1 else dict.fromkeys(parts, _NO_EDGES)
    if before.keys() != parts.keys():
        raise ValueError(f"{min(before.keys() ^ parts.keys())!r} is in it or in the snapshot before it, and not in both")
    edges, weights = {}, {}
    for name, found in parts.items():
        if found.keys() != _PARTS:
            raise ValueError(f"of {name!r} it holds {listing(sorted(found))}, not {listing(sorted(_PARTS))}")
        edges[name] = now = _changed(name, before[name], found["came"], found["went"])
        if len(now) and now[-1] >= sizes.get(name, math.inf):
            raise ValueError(f"edge {now[-1]:,} of {name!r}, which has {sizes[name]:,} entries")
        if found["weight"].dtype != np.float16 or found["weight"].shape != now.shape:
            raise ValueError(f"of {name!r} it has {len(now):,} edges, and not as many weights in half precision")
        weights[name] = np.nan_to_num(found["weight"])  # older files may hold infinities
    return Snapshot(step, epoch, edges, weights, beside)


def _time(arrays: dict[str, np.ndarray]) -> tuple[int, float]:
    time = arrays.pop("time", None)
    if time is None or time.shape != (2,) or time.dtype not in (np.float64, np.int64):
        raise ValueError("it has no time, a step and an epoch")
    step, epoch = time.tolist()
    if not (0 <= step < 1 << 53 and step == int(step) and 0 <= epoch < math.inf):
        raise ValueError(f"step {step:g} and epoch {epoch:g} are no time")
    return int(step), float(epoch)


def _changed(name: str, before: np.ndarray, came: np.ndarray, went: np.ndarray) -> np.ndarray:
    """The edges of a parameter, sorted, from those before and what changed."""
    for part in (came, went):
        if part.dtype != np.uint32 or part.ndim != 1 or not (part[1:] > part[:-1]).all():
            raise ValueError(f"the changed edges of {name!r} are no sorted indices, each once")
    if not len(came) and not len(went):
        return before
    came, went = came.astype(np.int64), went.astype(np.int64)
    if _among(came, before).any() or not _among(went, before).all():
        raise ValueError(f"of {name!r} edges come that are there or go that are not; an earlier snapshot is missing or another")
    stayed = before[~_among(before, went)]
    return np.insert(stayed, np.searchsorted(stayed, came), came)


def _among(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """Which of some sorted numbers are among others, which are sorted, too."""
    if not len(those):
        return np.zeros(len(these), bool)
    places = np.minimum(np.searchsorted(those, these), len(those) - 1)
    found: np.ndarray = those[places] == these
    return found


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive as NumPy writes it, by name; no larger than its directory says, which is bounded."""
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if (size := sum(member.file_size for member in members)) > _MOST_BYTES:
            raise ValueError(f"it unpacks to {size:,} bytes; at most {_MOST_BYTES:,} are read")
        for member in members:
            key = member.filename.removesuffix(".npy")
            if key == member.filename or key in arrays:
                raise ValueError(f"its member {member.filename!r} is no array, or one of two of this name")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others are not unpacked bit by bit
                raise ValueError(f"{key!r} is compressed in another way than NumPy's")
            with archive.open(member) as file:
                content = file.read(member.file_size + 1)  # to its end, where the checksum is compared
            arrays[key] = _array(key, content)
    return arrays


def _array(key: str, content: bytes) -> np.ndarray:
    """An array from a file of NumPy's format, whose own reader would make room for whatever the header says."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{key!r} is in another version of NumPy's format than 1.0")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in "biuf":
        raise ValueError(f"{key!r} is no array of numbers")
    start = file.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content) - start:
        raise ValueError(f"{key!r} does not have as many values as its header says")
    return np.ndarray(shape, dtype, content, start, order="F" if by_columns else "C")


def _name(step: int) -> str:
    return f"step-{step:08d}.npz"


def _paths(folder: Path) -> list[Path]:
    """The files of a folder that have the name of a snapshot, in order of their steps."""
    named = (path for path in folder.glob("step-*.npz") if re.fullmatch(r"step-[0-9]{8,}\.npz", path.name))
    return sorted(named, key=lambda path: (_step_of(path), len(path.name)))


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
