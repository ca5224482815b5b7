"""Live nodes of the graphs in a model: those on a path from an input to an output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dnw._wiring.wiring import Wiring
from dnw.graphs._paths import live_in_chain
from dnw.graphs._protocol import Graph, edges_of


def graphs_of(model: nn.Module) -> dict[str, Any]:
    """The graphs of a model by their names, which are :class:`dnw.graphs.Graph` and ``nn.Module``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Graph)}


def parameter_of(graph: str, module: Graph | None = None) -> str:
    """The name of the parameter that holds a graph's edges.

    Args:
        graph: the graph's name.
        module: the graph itself. Without it the parameter is called ``weight``, as in every graph of :mod:`dnw.graphs`.
    """
    return _joined(graph, "weight" if module is None else edges_of(module)[0])


def live_by_graph(model: nn.Module, active: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The live nodes of every graph of a model.

    Graphs that follow one another in one ``nn.Sequential`` form a chain: the outputs of one are the inputs of the next, and
    a path leads through all of them.

    Args:
        model: any module.
        active: the active edges of its graphs, by the graph's name or that of its parameter. A graph that is not among them
            has all its candidate edges.

    Returns:
        For each graph, by its name, a boolean mask ``[nodes]``.
    """
    graphs = graphs_of(model)
    result: dict[str, Tensor] = {}
    for chain in _chains(model, graphs):
        members: list[Graph] = [graphs[name] for name in chain]
        adjacencies = [_adjacency(name, graphs[name], active) for name in chain]
        live = live_in_chain(adjacencies, [g.num_inputs for g in members], [g.num_outputs for g in members])
        result.update(zip(chain, live, strict=True))
    return result


def num_live_nodes(model: nn.Module, wiring: Wiring) -> tuple[int, int]:
    """Live nodes and all nodes over the wired graphs of a model; (0, 0) where it has none."""
    active = {name: wiring[name].active for name in wiring}
    wired = [name for name, graph in graphs_of(model).items() if parameter_of(name, graph) in active]
    if not wired:
        return 0, 0
    live = live_by_graph(model, active)
    return sum(int(live[name].count_nonzero()) for name in wired), sum(live[name].numel() for name in wired)


def _chains(model: nn.Module, graphs: Mapping[str, Any]) -> list[list[str]]:
    """The names of the graphs, those that follow one another together."""
    sequences = [module for module in model.modules() if isinstance(module, nn.Sequential)]
    times = Counter(module for sequence in sequences for module in sequence)
    names = {graph: name for name, graph in graphs.items() if times[graph] == 1}  # others have several before or after them
    following = {
        names[one]: names[other]
        for sequence in sequences
        for one, other in pairwise(sequence)
        if one in names and other in names and one.num_outputs == other.num_inputs
    }
    chains = [[name] for name in graphs if name not in following.values()]
    for chain in chains:
        while chain[-1] in following:
            chain.append(following[chain[-1]])
    return chains


def _adjacency(name: str, graph: Graph, active: Mapping[str, Tensor]) -> Tensor:
    mask = active.get(name)
    if mask is None:
        parameter, candidates = edges_of(graph)
        mask = active.get(_joined(name, parameter), candidates)
        if mask.is_meta:  # of a copy without numbers
            mask = torch.ones(mask.shape, dtype=torch.bool, device="cpu")
    return graph.node_matrix(mask.bool())


def _joined(graph: str, parameter: str) -> str:
    return f"{graph}.{parameter}" if graph else parameter
