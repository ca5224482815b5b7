"""Parameters and multiply-adds of any model: dense, nominal and live.

Contract: every matrix product and convolution of one forward pass is counted by the parameter that takes part in it, by looking
at the run itself, so that any module counts (packed attention, recurrent cells, graphs). What a count leaves out is said once,
in :func:`count`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes

from dnw._wiring.wiring import Wiring
from dnw.count._channels import products_of_edges
from dnw.count._copy import copied, inner_model, plain_parameters
from dnw.count._ledger import Ledger, tensors
from dnw.count._live import graphs_of, live_by_graph, parameter_of
from dnw.graphs import ContinuousTimeGraph
from dnw.graphs._protocol import levels_of, node_functions_of, num_entries_between


@dataclass(frozen=True)
class CountRow:
    """One parameter, or all products of a module without one (attention scores, say).

    Attributes:
        name: of the parameter, or of the module.
        parameters: number of entries.
        active: how many of them are active edges, or all of them where the parameter is not wired.
        dense: multiply-adds of the forward pass, every entry counted.
        nominal: active edges counted only, and in a graph the convolutions of nodes with an outgoing edge only.
        live: active edges between live nodes of graphs and live channels of other layers counted only, and the convolutions of
            live nodes.
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
        """Multiply-adds of active edges between live nodes and channels."""
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


@overload
def count(
    model: nn.Module,
    input_size: Sequence[int],
    active: Wiring | Mapping[str, Tensor] | None = None,
    *,
    evaluations: int = 14,
) -> Count: ...


@overload
def count(
    model: nn.Module,
    *inputs: Any,
    active: Wiring | Mapping[str, Tensor] | None = None,
    evaluations: int = 14,
    **named_inputs: Any,
) -> Count: ...


def count(
    model: nn.Module,
    *inputs: Any,
    active: Wiring | Mapping[str, Tensor] | None = None,
    evaluations: int = 14,
    **named_inputs: Any,
) -> Count:
    """Counts parameters and multiply-adds of one forward pass in eval mode.

    ``count(model, (3, 224, 224), wiring)`` counts for one input of a size. ``count(model, x, y, mask=z, active=wiring)`` counts
    the call ``model(x, y, mask=z)`` as it stands: of a batch of n, n times as much. Which it is says the first input alone: a
    sequence of whole numbers is a size, anything else an example.

    Multiply-adds are those of matrix products and convolutions; norms, activations, additions, pooling and lookups in an
    embedding are left out. Products with a parameter shared by several layers stand in its one row. An edge is live if its
    source depends on an input and an output depends on its target; one that takes part several times (at each step of a
    recurrent network) if that is so once. Without ``active`` all are, and where the program reads numbers that it computes
    all active ones.

    Nothing is computed: the model runs on the meta device, without its weights. Where that is not possible, because what it
    does depends on numbers that it computes, it runs for real on the examples.

    Args:
        model: any module; it is not changed. Wrappers (compiled, parallel, averaged) are looked through.
        inputs: shape of one input in the dtype of the parameters, without the batch: (3, 224, 224); or what the model is
            called with: tensors, containers of them, numbers, None.
        active: its wiring, or masks of active edges by parameter name; None where nothing is wired. After a size it may
            stand as the second argument.
        evaluations: how often the right-hand side of a graph in continuous time counts, where its solver is adaptive.
        named_inputs: what the model is called with by name.

    Raises:
        ValueError: the model cannot be called so, or a mask fits no parameter.
    """
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 1:
        raise ValueError(f"evaluations={evaluations!r}: a whole number from 1 on")
    if not inputs and _is_size(named_inputs.get("input_size")):
        inputs = (named_inputs.pop("input_size"),)
    size: tuple[int, ...] | None = None
    if inputs and _is_size(inputs[0]):
        size, others, inputs = tuple(inputs[0]), inputs[1:], ()
        if len(others) == 1 and active is None and not named_inputs and (others[0] is None or isinstance(others[0], Mapping)):
            (active,) = others
        elif others or named_inputs:
            raise ValueError(
                f"an input size, {size}, stands for one input alone; for several give example tensors, also by name"
            )
    elif any(isinstance(x, Wiring) for x in inputs):
        raise ValueError("after example inputs the wiring is given by name: active=wiring")
    elif not inputs and not named_inputs:
        raise ValueError("count needs the size of one input, such as (3, 224, 224), or example inputs")
    with _undisturbed():
        return _count(model, size, inputs, named_inputs, active, evaluations)


def _is_size(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return all(isinstance(n, Integral) and not isinstance(n, bool) for n in value)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps what is switched on around a count out of it, and the count out of that."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.compiler.set_stance("force_eager"),
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),  # of function transforms
    ):
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one operation in which no products are seen
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def _count(
    model: nn.Module,
    size: Sequence[int] | None,
    inputs: tuple[Any, ...],
    named_inputs: dict[str, Any],
    active: Wiring | Mapping[str, Tensor] | None,
    evaluations: int,
) -> Count:
    model = inner_model(model)
    with torch.device("cpu"):
        masks = _masks(model, active)
    run = _run(model, size, inputs, named_inputs, bool(masks), evaluations)
    with torch.device("cpu"):
        return _counted(run, masks)


def _counted(run: _Run, masks: dict[str, Tensor]) -> Count:
    ledger = run.ledger
    nominal, live = dict(ledger.products), dict(ledger.products)
    parameters = dict(run.model.named_parameters())
    if masks:
        by_parameter: dict[Tensor, Tensor] = {parameters[name]: mask for name, mask in masks.items()}
        nominal, live = products_of_edges(ledger.run, by_parameter, run.inputs, run.outputs)
        if ledger.is_opaque:
            live = nominal
        sending, living = _fractions_in_graphs(run.model, masks)
        nominal = nominal | {name: int(ledger.products.get(name, 0) * fraction) for name, fraction in sending.items()}
        live = live | {name: int(ledger.products.get(name, 0) * fraction) for name, fraction in living.items()}
    rows = []
    for name, parameter in parameters.items():
        dense = ledger.products.pop(name, 0)
        mask = masks.get(name)
        if not dense and mask is None:
            continue
        kept = parameter.numel() if mask is None else int(mask.count_nonzero())
        rows.append(CountRow(name, parameter.numel(), kept, dense, nominal.get(name, 0), live.get(name, 0)))
    rows += [CountRow(name or "model", 0, 0, n, nominal.get(name, 0), live.get(name, 0)) for name, n in ledger.products.items()]
    everything = sum(p.numel() for p in parameters.values())
    dormant = sum(mask.numel() - int(mask.count_nonzero()) for mask in masks.values())
    return Count(tuple(rows), everything, everything - dormant, run.evaluations)


def _masks(model: nn.Module, active: Wiring | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if active is None:
        return {}
    masks = {n: p.active for n, p in active.items()} if isinstance(active, Wiring) else dict(active)
    first: dict[int, str] = {}
    found = {}
    for name, parameter in plain_parameters(model):
        first.setdefault(id(parameter), name)
        if name in masks and masks[name].shape == parameter.shape:
            mask = masks.pop(name)
            if hasattr(mask, "full_tensor"):  # of a sharded parameter
                mask = mask.full_tensor()
            found[first[id(parameter)]] = mask.bool().cpu()
    for name, mask in masks.items():
        raise ValueError(f"active edges for {name!r} of shape {tuple(mask.shape)}, which fit no parameter of the model")
    return found


@dataclass(frozen=True, eq=False)
class _Run:
    model: nn.Module
    ledger: Ledger
    inputs: list[Tensor]
    outputs: list[Tensor]
    evaluations: dict[str, int]


def _run(
    model: nn.Module, size: Sequence[int] | None, args: tuple, kwargs: dict[str, Any], keep_run: bool, evaluations: int
) -> _Run:
    """Runs a copy of the model on the meta device, or for real where it can be run in no other way."""
    ghost, inputs = copied(model, (args, kwargs), empty=True)
    try:
        if size is not None:
            dtype = next((p.dtype for p in ghost.parameters() if p.is_floating_point()), torch.float32)
            inputs = ((torch.empty((1, *size), device="meta", dtype=dtype),), {})
        return _watched(ghost, inputs, keep_run, evaluations)
    except Exception as error:  # whatever a model raises
        if size is not None:
            shape = "x".join(map(str, size))
            remedy = "; on example inputs it runs for real" if "meta" in str(error).lower() else ""
            raise ValueError(f"the model does not take an input of {shape} ({_reason(error)}){remedy}") from error
    try:
        with warnings.catch_warnings(), ExitStack() as unfused:
            warnings.filterwarnings("ignore", message="TF32 acceleration")  # what naming the settings of oneDNN gives
            # recurrent networks and attention as one operation
            unfused.enter_context(torch.backends.mkldnn.flags(enabled=False))
            unfused.enter_context(torch.backends.cudnn.flags(enabled=False))
            unfused.enter_context(sdpa_kernel(SDPBackend.MATH))
            return _watched(*copied(model, (args, kwargs), empty=False), keep_run, evaluations)
    except Exception as error:
        raise ValueError(f"the model does not take these inputs ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _watched(model: nn.Module, inputs: Any, keep_run: bool, evaluations: int) -> _Run:
    args, kwargs = inputs
    model.eval()
    times = _replace_solvers(model, evaluations)
    ledger = Ledger(model, keep_run)
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ledger.modules.append(name), prepend=True)
        module.register_forward_hook(ledger.leave, always_call=True)
    with ledger:
        out = model(*args, **kwargs)
    return _Run(model, ledger, [*tensors(inputs)], [*tensors(out)], times)


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
            state = state + rate(0.0, state)
        return state


def _fractions_in_graphs(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[dict[str, Fraction], dict[str, Fraction]]:
    """What fraction of the products is active, and what live, by the names of parameters of graphs that do not go by the run.

    Nodes without an outgoing edge are active in no product, as the paper counts. A graph whose state evolves (which has no
    levels) has the same nodes at all times: an edge between live ones is live at each.
    """
    sending: dict[str, Fraction] = {}
    living: dict[str, Fraction] = {}
    live = live_by_graph(model, masks)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for name, graph in graphs_of(model).items():
        edges = parameter_of(name, graph)
        if edges not in masks:
            continue
        mask, evolves = masks[edges], levels_of(graph) is None
        if evolves:
            living[edges] = Fraction(num_entries_between(graph, mask, live[name]), mask.numel())
        sends = graph.node_matrix(mask).bool().any(0)
        for module, nodes in node_functions_of(graph):
            of_nodes = {names[p] for p in module.parameters() if p in names and p.shape[:1] == (len(nodes),)}
            for parameter in of_nodes - masks.keys():
                sending[parameter] = _fraction(sends, nodes)
                if evolves:
                    living[parameter] = _fraction(sends & live[name], nodes)
    return sending, living


def _fraction(mask: Tensor, nodes: range) -> Fraction:
    return Fraction(int(mask[nodes.start : nodes.stop].count_nonzero()), len(nodes))
