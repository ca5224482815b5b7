"""Neural graphs on channels: nodes are channels, edges are weights between them (Wortsman et al., 2019, section 2)."""

from dnw.graphs._dynamic import INSTANCE_NORM, ContinuousTimeGraph, DiscreteTimeGraph, DynamicGraph
from dnw.graphs._levels import Levels
from dnw.graphs._node import Node
from dnw.graphs._protocol import Graph
from dnw.graphs._randwire import barabasi_albert, watts_strogatz
from dnw.graphs._sequence import SequenceGraph
from dnw.graphs._static import StaticGraph
from dnw.graphs._way import set_graph_kernels

__all__ = [
    "INSTANCE_NORM",
    "ContinuousTimeGraph",
    "DiscreteTimeGraph",
    "DynamicGraph",
    "Graph",
    "Levels",
    "Node",
    "SequenceGraph",
    "StaticGraph",
    "barabasi_albert",
    "set_graph_kernels",
    "watts_strogatz",
]
