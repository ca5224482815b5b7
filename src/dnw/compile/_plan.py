"""The plan: what of a trained network stays, and what that saves. It is printed, stored, and then applied.

Contract: making a plan and applying it leave the model as it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dnw._checks import listing
from dnw._wiring.guard import EvaluationGuard
from dnw._wiring.parameters import unwrap_model
from dnw.compile._capture import captured
from dnw.compile._file import raw_bytes
from dnw.compile._graphs import is_plain
from dnw.compile._pieces import foreign, name_of
from dnw.compile._program import Convolution, Linear, Node, Program, tensors
from dnw.compile._shrink import Analysed, analysed, shrunk
from dnw.count import count, graphs_of, parameter_of
from dnw.graphs import StaticGraph

FORMAT = 1


@dataclass(frozen=True)
class PlanRow:
    """One static graph.

    Attributes:
        name: of the graph in its model.
        nodes: of each level and of the outputs, how many there are.
        kept: of these, how many vary with the image and are wanted.
        constants: nodes that send something that is the same for every image; it is folded into what reads them.
        edges, kept_edges: edges whose weight is not 0, and those between kept nodes.
    """

    name: str
    nodes: tuple[int, ...]
    kept: tuple[int, ...]
    constants: int
    edges: int
    kept_edges: int


@dataclass(frozen=True)
class Plan:
    """What compiling a network does. ``print`` it, store it with ``to_json``, apply it with ``apply``.

    Attributes:
        input_size: channels, height and width of the inputs that it is for.
        rows: one per static graph, and one more for each further time that the network runs it.
        channels: of each value between two operators, which channels stay.
        parameters, kept_parameters: numbers that are not 0 of the network, and of the compiled one.
        multiply_adds, kept_multiply_adds: for one input, with weights that are not 0: of the network, and of the compiled one.
        size, kept_size: bytes of the network's parameters and buffers, and of the compiled one with its indices.
        digest: of the weights that the plan was made for.
        zeros: multiply-adds with weights that are 0, which the compiled network computes besides, where it runs dense.
    """

    input_size: tuple[int, int, int]
    rows: tuple[PlanRow, ...]
    channels: tuple[tuple[int, ...], ...]
    parameters: int
    kept_parameters: int
    multiply_adds: int
    kept_multiply_adds: int
    size: int
    kept_size: int
    digest: str
    zeros: int = 0

    def apply(self, model: nn.Module) -> Program:
        """The compacted network.

        Raises:
            ValueError: the model is not the one that the plan was made for, or has been trained on since.
            RuntimeError: its rule evaluates with other weights than it trains with, outside of ``wiring.settled()``.
        """
        network = model_of(model)
        if _digest(network) != self.digest:
            raise ValueError("the plan was made for other weights; make a new one with plan(model, input_size)")
        with torch.device("cpu"):
            return shrunk(_analysed(network, self.input_size))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: it is no plan, or one of another version.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            version = values.pop("format")
            if version != FORMAT:
                raise ValueError(f"a plan of format {version}; this version of dnw reads {FORMAT}")
            rows = tuple(PlanRow(**{**row, "nodes": tuple(row["nodes"]), "kept": tuple(row["kept"])}) for row in values["rows"])
            channels, (c, h, w) = tuple(tuple(x) for x in values["channels"]), values["input_size"]
            return cls(**{**values, "rows": rows, "channels": channels, "input_size": (c, h, w)})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a plan ({error})") from None

    def __str__(self) -> str:
        lines = [f"inputs of {'x'.join(map(str, self.input_size))}"]
        for row in self.rows:
            levels = "  ".join(f"{kept}/{all_}" for kept, all_ in zip(row.kept, row.nodes, strict=True))
            lines.append(
                f"{row.name or 'graph'}: nodes kept by level {levels} (outputs last); {row.constants:,} constants folded"
            )
            lines.append(f"{'':>{len(row.name or 'graph')}}  edges {row.edges:,} -> {row.kept_edges:,}")
        twice = "a weight that serves several sums, an edge each, counts for each"
        for what, before, after, why_more in (
            ("parameters", self.parameters, self.kept_parameters, f"{twice}, and constants and norms are numbers of their own"),
            ("multiply-adds", self.multiply_adds, self.kept_multiply_adds, twice),
            ("bytes", self.size, self.kept_size, "all numbers in float32, and where edges come from"),
        ):
            fraction = f" ({after / before:.1%})" if before else ""
            lines.append(f"{what}: {before:,} -> {after:,}{fraction}{f': {why_more}' if after > before else ''}")
        if self.zeros:
            lines.append(f"besides {self.zeros:,} multiply-adds with weights that are 0, in layers that run dense")
        return "\n".join(lines)


def plan(model: nn.Module, input_size: Sequence[int]) -> Plan:
    """Plans the compiled form of a trained network: exactly what it computes in eval mode, without what has no effect.

    Left out are channels that do not depend on the image (their constant effect is folded into what reads them, as maps,
    because it differs at the border) and channels that nothing wanted reads. Weights that are 0 count as no edges.

    Args:
        model: any model on images that :func:`dnw.compile.compile` runs without PyTorch; it is not changed. Where its rule
            evaluates with other weights than it trains with, plan inside ``wiring.settled()``.
        input_size: channels, height and width of the inputs to compile for.

    Raises:
        ValueError: something in it is not compiled, or it does not take such inputs.
        RuntimeError: its rule evaluates with other weights than it trains with, outside of ``wiring.settled()``.
    """
    return planned(model, input_size)[0]


def planned(model: nn.Module, input_size: Sequence[int]) -> tuple[Plan, Program]:
    """The plan, and what applying it gives, from one analysis."""
    network = model_of(model)
    sizes = tuple(input_size) if isinstance(input_size, Iterable) else (input_size,)
    if len(sizes) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"input_size={sizes}: expected channels, height and width, whole numbers from 1 on")
    with torch.device("cpu"):
        found = _analysed(network, (sizes[0], sizes[1], sizes[2]))
        program = shrunk(found)
        return _plan(network, (sizes[0], sizes[1], sizes[2]), found, program), program


def _analysed(network: nn.Module, input_size: tuple[int, int, int]) -> Analysed:
    found = analysed(captured(network, (torch.zeros(1, *input_size),)).program())
    if beyond := foreign(found.program):
        names = listing(sorted({f"{name_of(node.instruction)} in {node.name or 'the model'}" for node in beyond}))
        raise ValueError(f"PyTorch would run {names}, which a plan has no place for; dnw.compile.compile takes it")
    return found


def model_of(model: nn.Module) -> nn.Module:
    """The user's model inside its wrappers.

    Raises:
        ValueError: it is no model, or has no weights.
        RuntimeError: its weights are those that its rule only trains with.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"a {type(model).__name__} is no model to compile; give the nn.Module that was trained")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("a model on the meta device has no weights to compile; load them first")
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, EvaluationGuard):
                hook.check()
    return unwrap_model(model)


def _plan(network: nn.Module, input_size: tuple[int, int, int], found: Analysed, program: Program) -> Plan:
    weights = _weights(network)
    return Plan(
        input_size=input_size,
        rows=tuple(_rows(network, found)),
        channels=tuple(tuple(found.live(i).nonzero().flatten().tolist()) for i in range(len(found.kept))),
        parameters=sum(int(mask.count_nonzero()) for mask in weights.values()),
        kept_parameters=program.num_parameters,
        multiply_adds=count(network, input_size, _counted(network, weights)).nominal,
        kept_multiply_adds=program.multiply_adds,
        size=sum(t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()]),
        kept_size=_size(program),
        digest=_digest(network),
        zeros=sum(i.multiply_adds(*sizes, zeros=True) for i, sizes in program.walk()) - program.multiply_adds,
    )


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Which entries of each parameter the network computes with: those that are not 0, and of a static graph only edges."""
    weights = {name: p.detach() != 0 for name, p in network.named_parameters()}
    for name, graph in graphs_of(network).items():
        mask = weights.get(parameter_of(name))  # none where it is parametrized
        if isinstance(graph, StaticGraph) and mask is not None:
            mask &= graph.levels.candidates().to(mask.device)
    return weights


def _counted(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that ``count`` takes one by one; it counts the convolutions of a graph's nodes by the nodes that send something."""
    graphs = graphs_of(network)
    of_graphs = {parameter_of(name) for name in graphs}
    inside = tuple(f"{name}." if name else "" for name in graphs)
    return {n: mask for n, mask in weights.items() if n in of_graphs or (mask.ndim > 1 and not n.startswith(inside))}


def _rows(network: nn.Module, found: Analysed) -> Iterator[PlanRow]:
    """Of each static graph, as often as the network runs it: of its sums into each level and into the outputs."""
    first = len(found.program.input_sizes)
    for name, graph in network.named_modules(remove_duplicate=False):
        if isinstance(graph, StaticGraph) and is_plain(graph):
            sums = [
                (first + number, node)
                for number, node in enumerate(found.program.nodes)
                if node.name == name and isinstance(node.instruction, (Convolution, Linear))
            ]
            levels = len(graph.levels.sizes)
            for at in range(0, len(sums) - len(sums) % levels, levels):
                yield _row(name, found, sums[at : at + levels], levels)


def _row(name: str, found: Analysed, sums: list[tuple[int, Node]], num_levels: int) -> PlanRow:
    states = sums[-1][1].reads[0]
    levels = _levels(found.program, states, num_levels)
    known = found.facts[states]
    silent, read = ~known.varies, torch.zeros_like(known.varies)
    silent &= found.facts[states].numbers(found.program.sizes()[states]).flatten(1).any(1)
    edges = kept_edges = 0
    for value, node in sums:
        assert isinstance(node.instruction, (Convolution, Linear))
        matrix = node.instruction.weight.flatten(1) != 0
        live = matrix[found.live(value)]
        edges += int(matrix.count_nonzero())
        kept_edges += int(live[:, found.live(node.reads[0])].count_nonzero())
        read[: matrix.shape[1]] |= live.any(0)
    values = [*levels, sums[-1][0]]
    return PlanRow(
        name=name,
        nodes=tuple(len(found.kept[value]) for value in values),
        kept=tuple(int(found.live(value).count_nonzero()) for value in values),
        constants=int((silent & read).count_nonzero()),
        edges=edges,
        kept_edges=kept_edges,
    )


def _levels(program: Program, states: int, count: int) -> list[int]:
    """The values of so many levels, which lie one after the other in the states of all of them."""
    if count == 1:
        return [states]
    earlier, last = program.nodes[states - len(program.input_sizes)].reads
    return [*_levels(program, earlier, count - 1), last]


def _size(program: Program) -> int:
    """Bytes of a compacted network: 4 a number; where weights are sparse, 2 for each one's source and 4 for each target."""
    total = 0
    for tensor in tensors(program):
        total += 4 * tensor.numel() if tensor.is_floating_point() else 0
    for instruction in program.instructions:
        if isinstance(instruction, (Convolution, Linear)) and instruction.sparse:
            weights = int(instruction.weight.count_nonzero())
            total += 6 * weights + 4 * (len(instruction.weight) + 1) - 4 * instruction.weight.numel()
    return total


def _digest(network: nn.Module) -> str:
    found = hashlib.sha256(repr(network).encode())  # strides, eps, the number of time steps
    for name, value in network.state_dict().items():
        found.update(name.encode())
        found.update(raw_bytes(value) if isinstance(value, Tensor) else b"")
    return found.hexdigest()
