"""What a wiring does while it trains, in any loop: numbers of each layer, as JSON lines and as scalars for a log.

Contract: training does not depend on it, and is not changed by it. Between two records nothing is kept up to date: an edge that
left and came back in the meantime counts as one that stayed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from dnw._files import read_text, write_whole
from dnw._wiring.hooks import uncompiled
from dnw._wiring.stats import dead_nodes, totals
from dnw._wiring.wired_layer import WiredLayer
from dnw._wiring.wiring import Wiring

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_NEVER = -1
_LARGEST = 1 << 30
_SAMPLE = 1 << 24
"""Of larger tensors of edges every so manieth entry stands for all in quantiles, which PyTorch takes of so many at most."""


class Recorder:
    """Follows a wiring: which edges came and went, how old they are, how large their weights.

    >>> recorder = Recorder(wiring, "wiring.jsonl", every=100)  # and train; or without every, and
    >>> recorder.record(loss=float(loss))  # whenever it matters

    A record is a dictionary of plain numbers, also written to the file as one line of JSON: ``step``, ``values`` (what was
    given), ``layers`` by name, and ``total``. Of each layer, and in all where that has a meaning:

    - ``candidates``, ``active``, ``density``;
    - ``entered``, ``left``: edges, against the record before; 0 at the first one;
    - ``ever_active``: share of the candidates that were active at some record;
    - ``dead_targets``, ``dead_sources``: rows and columns of the weight (channels, units, nodes) that have candidates and no
      active edge;
    - ``age``: quantiles 0, 1/4, 1/2, 3/4 and 1, in optimizer steps, of how long the active edges have been there, counted from
      the first record at which each was;
    - ``magnitude``: the same quantiles of the magnitudes of their weights.

    Of parameters that are sharded every process counts its own part, without dead nodes; record in a file for each.

    Args:
        wiring: to follow.
        path: file of the lines; those of steps later than where the wiring goes on from (at the first step or record, so a
            checkpoint may be loaded before or after), as a run leaves them that was killed, are taken out of it. None: no file.
        every: record by itself after every so many optimizer steps; 0: only when :meth:`record` is called.

    Raises:
        ValueError: ``every`` is negative, or the file holds something else.
        OSError: the file cannot be written.
    """

    def __init__(self, wiring: Wiring, path: str | Path | None = None, *, every: int = 0) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ValueError(f"every={every!r}: allowed is a number of steps from 1 on, or 0 to record only when asked")
        self._wiring, self._path, self._every = wiring, None if path is None else Path(path), every
        self._since: dict[str, Tensor] = {}
        self._ever: dict[str, Tensor] = {}
        self._latest: dict[str, Any] = {}
        self._has_begun = self._path is None or not self._path.exists()
        if not self._has_begun:
            self._lines_until(wiring.step)
        optimizer = wiring._weights.optimizer
        self._remove: Callable[[], None] = optimizer.register_step_post_hook(uncompiled(self._after_step)).remove

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Records by itself no more."""
        self._remove()
        self._remove = lambda: None

    def _after_step(self, *_: Any) -> None:
        self._begin(self._wiring.step - 1)
        if self._every and self._wiring.step % self._every == 0 and self._wiring.step != self._latest.get("step"):
            self.record()

    def _begin(self, step: int) -> None:
        """Takes lines of later steps out of the file, once."""
        if not self._has_begun:
            assert self._path is not None
            write_whole(self._path, self._lines_until(step).encode())
        self._has_begun = True

    def _lines_until(self, step: int) -> str:
        assert self._path is not None
        return "".join(json.dumps(line) + "\n" for line in read_records(self._path) if line["step"] <= step)

    @torch.no_grad()
    def record(self, **values: float) -> dict[str, Any]:
        """The wiring as it is now, with further numbers of that moment, such as ``loss``.

        Raises:
            ValueError: a value that is no number.
            OSError: the file cannot be written.
        """
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name}={value!r}: expected a number, such as float({name})")
        step = self._wiring.step
        self._begin(step)
        weights = {name: parameter.weight for name, parameter in self._wiring.items()}
        with self._wiring._exchange.question():
            layers = {layer.name: self._layer(layer, weights[layer.name], step) for layer in self._wiring._weights.layers}
        self._latest = {"step": step, "values": values, "layers": layers, "total": totals(list(layers.values()))}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(self._latest) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return self._latest

    def scalars(self) -> dict[str, float]:
        """The latest record for TensorBoard, W&B and their like: ``wiring/density``, ``wiring/conv1.weight/entered``, ...

        >>> wandb.log(recorder.scalars(), step=step)
        """
        found = {f"wiring/{name}": float(value) for name, value in self._latest.get("values", {}).items()}
        rows = {"wiring": self._latest.get("total", {})}
        rows |= {f"wiring/{name}": row for name, row in self._latest.get("layers", {}).items()}
        for prefix, row in rows.items():
            for name, value in row.items():
                if isinstance(value, list):
                    found |= {f"{prefix}/{name}/{q:g}": float(x) for q, x in zip(_QUANTILES, value, strict=True)}
                else:
                    found[f"{prefix}/{name}"] = float(value)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs for the same ages: for each candidate the step since when it is active, or -1."""
        return {
            part: {name: x.clone() for name, x in of.items()} for part, of in (("since", self._since), ("ever", self._ever))
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state of another recorder of the same wiring.

        Raises:
            ValueError: of another wiring, or no such state.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for part, kind in (("since", torch.int32), ("ever", torch.bool)):
            parts[part] = {}
            if not isinstance(state.get(part), dict):
                raise ValueError(f"no state of a recorder: it has no {part!r}")
            for name, tensor in state[part].items():
                active = _local(self._wiring[name].active) if name in self._wiring else None
                if active is None or tensor.shape != active.shape or tensor.dtype != kind:
                    raise ValueError(f"the state knows {name!r} as {tuple(tensor.shape)}, which is not wired like that here")
                parts[part][name] = tensor.to(active.device, copy=True)
        self._since, self._ever = parts["since"], parts["ever"]

    def _layer(self, layer: WiredLayer, weight: Tensor, step: int) -> dict[str, Any]:
        name, active = layer.name, layer.active
        assert active is not None
        known = name in self._since
        since = self._since.setdefault(name, torch.full(active.shape, _NEVER, dtype=torch.int32, device=active.device))
        ever = self._ever.setdefault(name, torch.zeros_like(active))
        came, went = active & (since == _NEVER), ~active & (since != _NEVER)
        entered, left = (int(edges.count_nonzero()) if known else 0 for edges in (came, went))
        since[came], since[went] = step, _NEVER
        ever |= active
        count, number = int(active.count_nonzero()), layer.num_candidates
        return {
            "candidates": number,
            "active": count,
            "density": count / number,
            "entered": entered,
            "left": left,
            "ever_active": int(ever.count_nonzero()) / number,
            **(dead_nodes(layer, count) if layer.shard is None else {}),
            "age": _quantiles((step - since[active]).float()),
            "magnitude": _quantiles(_local(weight)[active].float().abs()),
        }


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records in the file of a :class:`Recorder`; a last line that was cut off is left out.

    Raises:
        ValueError: the file holds something else; the line is named.
        OSError: there is no such file.
    """
    lines = read_text(Path(path), _LARGEST).split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            found = json.loads(line)
            if not isinstance(found, dict) or not isinstance(found.get("step"), int) or "layers" not in found:
                raise ValueError("no record of a wiring")
        except ValueError as error:
            if number == len(lines):  # a line ends with a newline; this one was being written
                return
            raise ValueError(f"{path}, line {number}: {error}") from None
        yield found


def _local(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor that is here."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _quantiles(values: Tensor) -> list[float]:
    """At ``_QUANTILES``; zeros where there are no values."""
    if not values.numel():
        return [0.0] * len(_QUANTILES)
    values = values[:: -(-values.numel() // _SAMPLE)]
    return values.quantile(torch.tensor(_QUANTILES, device=values.device)).tolist()
