"""A wiring as data: the edge list of one wired parameter, and the table over all of them.

Contract: plain values, detached from the model; SciPy and networkx are imported only where they are asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dnw._selection.layout import Layout
from dnw._wiring.parameters import LeftOut


@dataclass(frozen=True, eq=False)
class Edges:
    """The active edges of one wired parameter, in row order.

    A weight is read as a matrix ``[targets, sources]``, whichever way round the parameter holds them. In a convolution each
    position of a kernel is a source of its own: a 3x3 convolution from 16 channels has 144 sources, and source s is position
    s % 9 of channel s // 9. With groups its targets have the sources of their group alone; experts in one tensor count as
    groups. The matrix of a graph is that of its nodes, outputs included.

    Attributes:
        name: the parameter's name.
        shape: (number of rows, number of columns) of the matrix.
        target, source: what each edge joins, row and column of the matrix, int64 ``[edges]``.
        weight: the weights ``[edges]``.
        is_graph: whether targets and sources number the same set of nodes.
    """

    name: str
    shape: tuple[int, int]
    target: Tensor
    source: Tensor
    weight: Tensor
    is_graph: bool

    @classmethod
    def from_matrix(cls, name: str, weight: Tensor, active: Tensor, is_graph: bool = False) -> Edges:
        """The active entries of a matrix ``[targets, sources]``."""
        target, source = active.nonzero(as_tuple=True)
        values = weight[target, source].cpu()
        return cls(name, (weight.shape[0], weight.shape[1]), target.cpu(), source.cpu(), values, is_graph)

    @classmethod
    def from_weight(cls, name: str, weight: Tensor, active: Tensor, layout: Layout) -> Edges:
        """The active entries of a weight, numbered as those of a matrix ``[targets, sources]``."""
        rows = len(layout.by_target(active)) if active.ndim else 1
        edges = cls.from_matrix(name, layout.by_target(weight).reshape(rows, -1), layout.by_target(active).reshape(rows, -1))
        targets, width = edges.shape
        group = edges.target // (targets // layout.groups)
        return replace(edges, shape=(targets, width * layout.groups), source=edges.source + group * width)

    def __len__(self) -> int:
        return self.target.numel()

    def __repr__(self) -> str:
        targets, sources = self.shape
        ends = f"among {targets:,} nodes" if self.is_graph else f"from {sources:,} sources to {targets:,} targets"
        return f"<Edges of {self.name}: {len(self):,} {ends}>"

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.csr_array`` ``[targets, sources]``; active edges of weight 0 are kept as explicit zeros.

        Raises:
            ImportError: SciPy is not installed (extra ``edges``).
        """
        try:
            from scipy.sparse import coo_array
        except ImportError as error:
            raise _without("SciPy", error) from error

        weight = self.weight.float() if self.weight.element_size() < 4 else self.weight
        return coo_array((weight.numpy(), (self.target.numpy(), self.source.numpy())), shape=self.shape).tocsr()

    def to_networkx(self) -> Any:
        """A ``networkx.DiGraph`` with edge attribute ``weight``.

        A graph's nodes are its node numbers; elsewhere they are ``("source", i)`` and ``("target", j)``.

        Raises:
            ImportError: NetworkX is not installed (extra ``edges``).
        """
        try:
            import networkx
        except ImportError as error:
            raise _without("NetworkX", error) from error

        graph = networkx.DiGraph(name=self.name)
        for target, source, weight in self.to_list():
            ends = (source, target) if self.is_graph else (("source", source), ("target", target))
            graph.add_edge(*ends, weight=weight)
        return graph

    def to_list(self) -> list[tuple[int, int, float]]:
        """The edges as (target, source, weight)."""
        return list(zip(self.target.tolist(), self.source.tolist(), self.weight.tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return {"name": self.name, "shape": list(self.shape), "is_graph": self.is_graph, "edges": self.to_list()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


def _without(library: str, error: ImportError) -> ImportError:
    advice = "install the edges extra: pip install 'dnw[edges]'"
    return ModuleNotFoundError(f"{library} is not installed; {advice}, or use to_list() or to_json()", name=error.name)


@dataclass(frozen=True)
class SummaryRow:
    """One wired parameter in the table."""

    name: str
    shape: tuple[int, ...]
    candidates: int
    active: int

    @property
    def density(self) -> float:
        return self.active / self.candidates


@dataclass(frozen=True)
class Summary:
    """What is wired, what was left dense and why, and the totals. ``print`` it.

    Printed, each wired parameter has a line, and what was left dense a line for each reason.
    """

    rows: tuple[SummaryRow, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def candidates(self) -> int:
        """Candidate edges over all wired parameters."""
        return sum(row.candidates for row in self.rows)

    @property
    def active(self) -> int:
        """Active edges over all wired parameters."""
        return sum(row.active for row in self.rows)

    @property
    def dense(self) -> int:
        """Parameters left dense."""
        return _total(self.left_out)

    def _left_by_reason(self) -> list[tuple[str, list[LeftOut]]]:
        """What was left dense, by reason, the most parameters first."""
        found: dict[str, list[LeftOut]] = {}
        for left in self.left_out:
            found.setdefault(left.reason, []).append(left)
        return sorted(found.items(), key=lambda item: -_total(item[1]))

    def __str__(self) -> str:
        wired = [(r.name, _size(r.shape), f"{r.candidates:,}", f"{r.active:,}", f"{r.density:.2%}") for r in self.rows]
        total_density = f"{self.active / self.candidates:.2%}" if self.candidates else "-"
        wired.append(("total", "", f"{self.candidates:,}", f"{self.active:,}", total_density))
        lines = _columns([("wired", "shape", "candidates", "active", "density"), *wired])
        if self.left_out:
            left = [(reason, str(len(x)), f"{_total(x):,}", _some(x)) for reason, x in self._left_by_reason()]
            left.append(("total", str(len(self.left_out)), f"{self.dense:,}", ""))
            lines += ["", *_columns([("left dense", "tensors", "parameters", "such as"), *left], text_from=3)]
        return "\n".join(lines)


def _total(left: Sequence[LeftOut]) -> int:
    return sum(math.prod(x.shape) for x in left)


def _some(left: Sequence[LeftOut], most: int = 2) -> str:
    names = [x.name for x in left]
    return ", ".join(names if len(names) <= most else [*names[:most], "..."])


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _columns(rows: list[tuple[str, ...]], text_from: int = 99) -> list[str]:
    """Lines of aligned columns: names to the left, numbers to the right, and text again from column ``text_from`` on."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 or i >= text_from else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
