"""Parameters and multiply-adds of any model: dense, nominal and live.

Contract: every matrix product and convolution of one forward pass is counted by the parameter that takes part in it, on the
meta device, so that nothing is computed and any module counts (packed attention, recurrent cells, graphs). What a count
leaves out is said once, in :func:`count`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dnw._wiring import Wiring
from dnw.count._live import graphs_of, live_by_graph
from dnw.graphs import ContinuousTimeGraph, StaticGraph


@dataclass(frozen=True)
class CountRow:
    """One parameter, or all products of a module without one (attention scores, say).

    Attributes:
        name: of the parameter, or of the module.
        parameters: number of entries.
        active: how many of them are active edges, or all of them where the parameter is not wired.
        dense: multiply-adds of one forward pass for one input, every entry counted.
        nominal: active edges counted only, and in a graph the convolutions of nodes with an outgoing edge only.
        live: active edges between live nodes counted only, and the convolutions of live nodes.
    """

    name: str
    parameters: int
    active: int
    dense: int
    nominal: int
    live: int


@dataclass(frozen=True)
class Count:
    """The count of a model: a row per parameter that takes part in a product, and the totals. ``print`` it.

    Attributes:
        rows: in the order of the model's parameters.
        parameters: all parameters of the model, those of norms and biases included.
        active: the same without dormant edges.
        evaluations: by graph in continuous time, how often its right-hand side is evaluated.
    """

    rows: tuple[CountRow, ...]
    parameters: int
    active: int
    evaluations: Mapping[str, int]

    @property
    def dense(self) -> int:
        """Multiply-adds, every entry counted."""
        return sum(row.dense for row in self.rows)

    @property
    def nominal(self) -> int:
        """Multiply-adds of active edges."""
        return sum(row.nominal for row in self.rows)

    @property
    def live(self) -> int:
        """Multiply-adds of active edges between live nodes."""
        return sum(row.live for row in self.rows)

    def __str__(self) -> str:
        head = ("", "parameters", "active", "multiply-adds", "nominal", "live")
        table = [
            head,
            *((r.name, *(f"{n:,}" for n in (r.parameters, r.active, r.dense, r.nominal, r.live))) for r in self.rows),
        ]
        total = (self.parameters, self.active, self.dense, self.nominal, self.live)
        table.append(("total, with norms and biases", *(f"{n:,}" for n in total)))
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in table
        ]
        lines += [f"{name or 'the graph'}: {n} evaluations per forward pass" for name, n in self.evaluations.items()]
        return "\n".join(lines)


def count(
    model: nn.Module,
    input_size: Sequence[int],
    active: Wiring | Mapping[str, Tensor] | None = None,
    *,
    evaluations: int = 14,
) -> Count:
    """Counts parameters and multiply-adds of one forward pass for one input.

    Multiply-adds are those of matrix products and convolutions; norms, activations, additions and pooling are left out.

    Args:
        model: any module that takes one batch of inputs in the dtype of its parameters; it is not changed.
        input_size: shape of one input, without the batch: (3, 224, 224).
        active: its wiring, or masks of active edges by parameter name; None where nothing is wired.
        evaluations: how often the right-hand side of a graph in continuous time counts, where its solver is adaptive.

    Raises:
        ValueError: the model does not take such an input, or a mask fits no parameter.
    """
    masks = _masks(model, active)
    model = model.module if isinstance(model, torch.optim.swa_utils.AveragedModel) else model
    ghost, hooks = copy.deepcopy(model), []
    ghost = ghost.to("meta").eval()
    graphs = graphs_of(ghost)
    times = _replace_solvers(ghost, evaluations)
    ledger = _Ledger(ghost)
    for name, module in ghost.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: ledger.modules.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: ledger.modules.pop() and None, always_call=True))
    try:
        with torch.no_grad(), ledger:
            dtype = next((p.dtype for p in ghost.parameters() if p.is_floating_point()), torch.float32)
            ghost(torch.empty((1, *input_size), device="meta", dtype=dtype))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        shape = "x".join(map(str, input_size))
        raise ValueError(f"the model does not take an input of {shape} ({str(error).splitlines()[0]})") from None
    live = live_by_graph(model, masks)
    rows = []
    for name, parameter in model.named_parameters():
        dense = ledger.products.pop(name, 0)
        mask = masks.get(name)
        kept = parameter.numel() if mask is None else int(mask.count_nonzero())
        if not dense and mask is None:
            continue
        nominal, alive = _shares(name, graphs, masks, live)
        if mask is None:
            rows.append(CountRow(name, parameter.numel(), kept, dense, _scaled(dense, nominal), _scaled(dense, alive)))
            continue
        candidates = _num_candidates(model, name, parameter)
        between = _between_live(name, graphs, mask, live)
        rows.append(
            CountRow(
                name,
                parameter.numel(),
                kept,
                dense,
                dense * kept // candidates,
                dense * (kept if between is None else between) // candidates,
            )
        )
    rows += [CountRow(name or "model", 0, 0, n, n, n) for name, n in ledger.products.items()]
    everything = sum(p.numel() for p in model.parameters())
    dormant = sum(mask.numel() - int(mask.count_nonzero()) for mask in masks.values())
    return Count(tuple(rows), everything, everything - dormant, times)


def _masks(model: nn.Module, active: Wiring | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if active is None:
        return {}
    masks = {n: p.active.cpu() for n, p in active.items()} if isinstance(active, Wiring) else dict(active)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    for name, mask in masks.items():
        if name not in shapes or mask.shape != shapes[name]:
            raise ValueError(f"active edges for {name!r} of shape {tuple(mask.shape)}, which fit no parameter of the model")
    return masks


def _replace_solvers(model: nn.Module, evaluations: int) -> dict[str, int]:
    """Lets graphs in continuous time evaluate their right-hand side a known number of times; nothing is solved on meta."""
    times = {}
    for name, module in model.named_modules():
        if isinstance(module, ContinuousTimeGraph):
            times[name] = module.solver.num_evaluations or evaluations
            module.solver = _Repeat(times[name])
    return times


@dataclass(frozen=True)
class _Repeat:
    num_evaluations: int

    def solve(self, rate: Any, state: Tensor, duration: float, parameters: Any) -> Tensor:
        for _ in range(self.num_evaluations):
            state = rate(0.0, state)
        return state


class _Ledger(TorchDispatchMode):
    """Multiply-adds by the parameter that takes part, or by the module that was running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.products: dict[str, int] = {}
        self.modules: list[str] = []
        # a bias is added, not multiplied
        self._owners = {p.untyped_storage()._cdata: n for n, p in model.named_parameters() if p.ndim > 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry:
            decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        if packet in flop_registry:
            owner = next((self._owners[c] for c in map(_storage, args) if c in self._owners), None)
            if owner is None:
                owner = self.modules[-1] if self.modules else ""
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            self.products[owner] = self.products.get(owner, 0) + int(flops) // 2
        return out


def _storage(value: object) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _num_candidates(model: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """How many entries of a parameter take part in the forward pass."""
    module = model.get_submodule(name.rpartition(".")[0])
    return int(module.levels.candidates().count_nonzero()) if isinstance(module, StaticGraph) else parameter.numel()


def _graph_of(name: str, graphs: Mapping[str, nn.Module]) -> str | None:
    inside = [g for g in graphs if name.startswith(f"{g}." if g else "")]
    return max(inside, key=len) if inside else None


def _shares(
    name: str, graphs: Mapping[str, Any], masks: Mapping[str, Tensor], live: Mapping[str, Tensor]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of the convolution of a graph's nodes, the share of nodes with an outgoing edge and that of live nodes."""
    graph = _graph_of(name, graphs)
    whole = ((1, 1), (1, 1))
    weight = f"{graph}.weight" if graph else "weight"
    if graph is None or weight not in masks or not name.endswith("conv.weight"):
        return whole
    module = graphs[graph]
    sends = module.node_matrix(masks[weight]).any(0)
    nodes = slice(0, module.num_nodes)
    if isinstance(module, StaticGraph):
        level = int(name.removeprefix(f"{graph}." if graph else "").split(".")[1])
        start = sum(module.levels.sizes[:level])
        nodes = slice(start, start + module.levels.sizes[level])
    number = nodes.stop - nodes.start
    return (int(sends[nodes].count_nonzero()), number), (int((live[graph] & sends)[nodes].count_nonzero()), number)


def _between_live(name: str, graphs: Mapping[str, Any], mask: Tensor, live: Mapping[str, Tensor]) -> int | None:
    """The active edges of a graph between live nodes; None where the parameter is no graph's weight."""
    graph = _graph_of(name, graphs)
    if graph is None or name != (f"{graph}.weight" if graph else "weight"):
        return None
    module, alive = graphs[graph], live[graph]
    if isinstance(module, StaticGraph):
        return module.levels.num_edges_between(mask, alive)
    return int((mask & alive[:, None] & alive[None, :]).count_nonzero())


def _scaled(number: int, share: tuple[int, int]) -> int:
    return number * share[0] // share[1]
