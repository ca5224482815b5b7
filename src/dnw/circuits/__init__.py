"""Circuits: the few nodes and edges of a network that a task needs, found, exported and drawn.

Contract: the network is not changed. Whatever is drawn at random comes from one seed.
"""

from dnw.circuits._circuit import Circuit, CircuitEdge, CircuitNode
from dnw.circuits._find import find_circuit, task_loss
from dnw.circuits._page import write_circuit
from dnw.circuits._tasks import ANY_OTHER, TASKS, Pair, Task, python_task

__all__ = [
    "ANY_OTHER",
    "TASKS",
    "Circuit",
    "CircuitEdge",
    "CircuitNode",
    "Pair",
    "Task",
    "find_circuit",
    "python_task",
    "task_loss",
    "write_circuit",
]
