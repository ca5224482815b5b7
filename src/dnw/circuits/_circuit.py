"""A circuit as data: nodes, edges, and how well the task is solved by them alone.

Contract: plain values, detached from the network; networkx is imported only where it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CircuitNode:
    """One activation that a circuit keeps.

    Attributes:
        site: the module whose output it is a channel of.
        index: of the channel.
        head: of attention, which one it belongs to, where the site is called ``query``, ``key`` or ``value`` and the module
            around it has ``num_heads``, as in :class:`dnw.models.Decoder`; None elsewhere.
        mean: what stands in its place where it is left out.
        examples: where in ordinary text it is furthest from its mean: the tokens up to that place as text, and how far.
    """

    site: str
    index: int
    head: int | None
    mean: float
    examples: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class CircuitEdge:
    """A weight between two nodes.

    Attributes:
        source, target: the nodes, as positions in :attr:`Circuit.nodes`; None where it comes from a token, or leads to one.
        token: that token, as text; None of an edge between nodes.
        weight: its value.
        matrix: the parameter that it is an entry of.
    """

    source: int | None
    target: int | None
    token: str | None
    weight: float
    matrix: str


@dataclass(frozen=True)
class Circuit:
    """What of a network solves a task.

    Attributes:
        task: its name.
        sites: in the order of computing, all of the network's.
        nodes: kept, in the order of sites.
        edges: all weights that are not 0 between them, from the last tokens of the task's prompts, and to its answers.
        loss: of the task by the circuit alone, all other nodes at their means, in nats: on the prompts that it was found on.
        held_out_loss: on others.
        full_loss, full_held_out_loss: of the whole network.
        accuracy: share of the held-out prompts that the circuit answers right.
        num_nodes, num_weights: of the whole network: nodes of its sites, weights between them that are not 0.
    """

    task: str
    sites: tuple[str, ...]
    nodes: tuple[CircuitNode, ...]
    edges: tuple[CircuitEdge, ...]
    loss: float
    held_out_loss: float
    full_loss: float
    full_held_out_loss: float
    accuracy: float
    num_nodes: int
    num_weights: int

    @property
    def num_edges(self) -> int:
        """Weights between two of its nodes: the figure of merit. Those from and to tokens are not counted."""
        return sum(edge.token is None for edge in self.edges)

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Circuit:
        """The circuit of :meth:`to_json`.

        Raises:
            ValueError: no such text.
        """
        try:
            values: Mapping[str, Any] = json.loads(text)
            nodes = tuple(
                CircuitNode(**{**node, "examples": tuple((str(t), float(v)) for t, v in node["examples"])})
                for node in values["nodes"]
            )
            edges = tuple(CircuitEdge(**edge) for edge in values["edges"])
            return cls(**{**values, "sites": tuple(values["sites"]), "nodes": nodes, "edges": edges})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"no circuit as to_json() writes it ({str(error).splitlines()[0]})") from None

    def to_networkx(self) -> Any:
        """A ``networkx.DiGraph``: nodes ``(site, index)`` with ``mean`` and ``head``, edges with ``weight`` and ``matrix``.

        Tokens are nodes ``("token", text)`` where they are read, and ``("answer", text)`` where they are predicted.

        Raises:
            ImportError: NetworkX is not installed (extra ``edges``).
        """
        try:
            import networkx
        except ImportError as error:
            raise ModuleNotFoundError("NetworkX is not installed: pip install 'dnw[edges]'", name=error.name) from error
        graph = networkx.DiGraph(name=self.task)
        names = [(node.site, node.index) for node in self.nodes]
        for name, node in zip(names, self.nodes, strict=True):
            graph.add_node(name, mean=node.mean, head=node.head)
        for edge in self.edges:
            source = ("token", edge.token) if edge.source is None else names[edge.source]
            target = ("answer", edge.token) if edge.target is None else names[edge.target]
            graph.add_edge(source, target, weight=edge.weight, matrix=edge.matrix)
        return graph
