"""Live nodes, parameters and multiply-adds of graphs and of any other model."""

from dnw.count._count import Count, CountRow, count
from dnw.count._live import graphs_of, live_by_graph, num_live_nodes, parameter_of
from dnw.count._published import published_count
from dnw.graphs._paths import live_nodes
from dnw.graphs._protocol import Graph

__all__ = [
    "Count",
    "CountRow",
    "Graph",
    "count",
    "graphs_of",
    "live_by_graph",
    "live_nodes",
    "num_live_nodes",
    "parameter_of",
    "published_count",
]
