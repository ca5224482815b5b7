"""Counting what a wiring really uses."""

from dnw.count._live import live_nodes, num_live_nodes

__all__ = ["live_nodes", "num_live_nodes"]
