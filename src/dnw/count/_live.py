"""Live nodes: those on a path from an input to an output. The one liveness function of the project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dnw._wiring.wiring import Wiring
from dnw.graphs._paths import reached


@runtime_checkable
class Graph(Protocol):
    """What counting needs to know of a graph module: inputs are the first nodes, outputs the last."""

    weight: nn.Parameter
    num_nodes: int
    num_inputs: int
    num_outputs: int

    def node_matrix(self, weight: Tensor) -> Tensor:
        """A weight or mask as a matrix ``[nodes, nodes]``, targets by sources."""
        ...


def graphs_of(model: nn.Module) -> dict[str, Any]:
    """The graphs of a model by their names, which are :class:`Graph` and ``nn.Module``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Graph)}


def parameter_of(graph: str) -> str:
    """The name of the weight of a graph with a name."""
    return f"{graph}.weight" if graph else "weight"


def live_nodes(adjacency: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Which nodes of a graph lie on a path from an input to an output.

    Args:
        adjacency: boolean ``[nodes, nodes]``, targets by sources; cycles and self-edges are allowed.
        inputs: boolean mask ``[nodes]`` of the inputs.
        outputs: boolean mask ``[nodes]`` of the outputs.

    Returns:
        Boolean mask ``[nodes]``.
    """
    return reached(adjacency, inputs) & reached(adjacency.T, outputs)


def live_by_graph(model: nn.Module, active: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The live nodes of every graph of a model.

    Graphs that follow one another in one ``nn.Sequential`` form a chain: the outputs of one are the inputs of the next, and
    a path leads through all of them.

    Args:
        model: any module.
        active: the active edges of its graphs, by the graph's name or that of its weight. A graph that is not among them
            has all its candidate edges.

    Returns:
        For each graph, by its name, a boolean mask ``[nodes]``.
    """
    graphs = graphs_of(model)
    result: dict[str, Tensor] = {}
    for chain in _chains(model, graphs):
        members: list[Graph] = [graphs[name] for name in chain]
        matrices = [_adjacency(name, graphs[name], active) for name in chain]
        forwards, backwards = [], []
        arriving: Tensor | None = None
        for graph, matrix in zip(members, matrices, strict=True):
            start = torch.zeros(graph.num_nodes, dtype=torch.bool, device=matrix.device)
            start[: graph.num_inputs] = True if arriving is None else arriving
            forwards.append(reached(matrix, start))
            arriving = forwards[-1][-graph.num_outputs :]
        wanted: Tensor | None = None
        for graph, matrix in zip(reversed(members), reversed(matrices), strict=True):
            start = torch.zeros(graph.num_nodes, dtype=torch.bool, device=matrix.device)
            start[-graph.num_outputs :] = True if wanted is None else wanted
            backwards.append(reached(matrix.T, start))
            wanted = backwards[-1][: graph.num_inputs]
        for name, forward, backward in zip(chain, forwards, reversed(backwards), strict=True):
            result[name] = forward & backward
    return result


def _chains(model: nn.Module, graphs: Mapping[str, nn.Module]) -> list[list[str]]:
    """The names of the graphs, those that follow one another together."""
    chains: list[list[str]] = []
    for name in graphs:
        parent, _, last = name.rpartition(".")
        holder = model.get_submodule(parent) if parent else model
        before = f"{parent}.{int(last) - 1}".strip(".") if last.isdecimal() and isinstance(holder, nn.Sequential) else None
        if chains and before is not None and chains[-1][-1] == before:
            chains[-1].append(name)
        else:
            chains.append([name])
    return chains


def _adjacency(name: str, graph: Graph, active: Mapping[str, Tensor]) -> Tensor:
    mask = active.get(name, active.get(parameter_of(name)))
    if mask is None:
        mask = torch.ones(graph.weight.shape, dtype=torch.bool)
    return graph.node_matrix(mask.bool())


def num_live_nodes(model: nn.Module, wiring: Wiring) -> tuple[int, int]:
    """Live nodes and all nodes over the wired graphs of a model; (0, 0) where it has none."""
    active = {name: wiring[name].active for name in wiring}
    names = {parameter_of(name): name for name in graphs_of(model)}
    if not any(name in names for name in active):
        return 0, 0
    live = live_by_graph(model, active)
    wired = [live[graph] for parameter, graph in names.items() if parameter in active]
    return sum(int(mask.count_nonzero()) for mask in wired), sum(mask.numel() for mask in wired)
