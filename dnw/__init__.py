"""Learn which connections a neural network has, while its weights are trained.

Everything public is listed here and loaded when first used, so that ``import dnw`` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "wire": "dnw._wire",
    "DEFAULTS": "dnw._parameters",
    "Wiring": "dnw._wiring",
    "WiredParameter": "dnw._wired_parameter",
    "Edges": "dnw._edges",
    "Summary": "dnw._edges",
    "Rule": "dnw._rule",
    "Layer": "dnw._rule",
    "Pool": "dnw._rule",
    "DNW": "dnw._rules",
    "RandomGraph": "dnw._rules",
    "Frozen": "dnw._rules",
    "Complete": "dnw._rules",
    "NoUpdate": "dnw._rules",
    "TargetedDropout": "dnw._rules",
    "MagnitudePruning": "dnw._rules",
    "L1Anneal": "dnw._rules",
    "PruneAndGrow": "dnw._rules",
    "SET": "dnw._rules",
    "RigL": "dnw._rules",
    "SparseMomentum": "dnw._rules",
    "SRSTE": "dnw._rules",
    "ST3": "dnw._rules",
    "Feather": "dnw._rules",
    "TopKAST": "dnw._rules",
    "Dormant": "dnw._dormant",
    "DensitySchedule": "dnw._schedules",
    "Pattern": "dnw._patterns",
    "NOfM": "dnw._patterns",
    "Blocks": "dnw._patterns",
    "Channels": "dnw._patterns",
    "RULES": "dnw._rules",
    "Uniform": "dnw._budgets",
    "Floor": "dnw._budgets",
    "Global": "dnw._budgets",
    "ErdosRenyiKernel": "dnw._budgets",
    "num_edges": "dnw._budgets",
    "top_k": "dnw._select",
    "top_k_each": "dnw._select",
}
_ROOMS = ("graphs", "models", "count", "compile", "view", "data", "train", "recipes")

__all__ = [*_PUBLIC, *_ROOMS]

if TYPE_CHECKING:
    from dnw import compile as compile
    from dnw import count as count
    from dnw import data as data
    from dnw import graphs as graphs
    from dnw import models as models
    from dnw import recipes as recipes
    from dnw import train as train
    from dnw import view as view
    from dnw._budgets import ErdosRenyiKernel as ErdosRenyiKernel
    from dnw._budgets import Floor as Floor
    from dnw._budgets import Global as Global
    from dnw._budgets import Uniform as Uniform
    from dnw._budgets import num_edges as num_edges
    from dnw._dormant import Dormant as Dormant
    from dnw._edges import Edges as Edges
    from dnw._edges import Summary as Summary
    from dnw._parameters import DEFAULTS as DEFAULTS
    from dnw._patterns import Blocks as Blocks
    from dnw._patterns import Channels as Channels
    from dnw._patterns import NOfM as NOfM
    from dnw._patterns import Pattern as Pattern
    from dnw._rule import Layer as Layer
    from dnw._rule import Pool as Pool
    from dnw._rule import Rule as Rule
    from dnw._rules import DNW as DNW
    from dnw._rules import RULES as RULES
    from dnw._rules import SET as SET
    from dnw._rules import SRSTE as SRSTE
    from dnw._rules import ST3 as ST3
    from dnw._rules import Complete as Complete
    from dnw._rules import Feather as Feather
    from dnw._rules import Frozen as Frozen
    from dnw._rules import L1Anneal as L1Anneal
    from dnw._rules import MagnitudePruning as MagnitudePruning
    from dnw._rules import NoUpdate as NoUpdate
    from dnw._rules import PruneAndGrow as PruneAndGrow
    from dnw._rules import RandomGraph as RandomGraph
    from dnw._rules import RigL as RigL
    from dnw._rules import SparseMomentum as SparseMomentum
    from dnw._rules import TargetedDropout as TargetedDropout
    from dnw._rules import TopKAST as TopKAST
    from dnw._schedules import DensitySchedule as DensitySchedule
    from dnw._select import top_k as top_k
    from dnw._select import top_k_each as top_k_each
    from dnw._wire import wire as wire
    from dnw._wired_parameter import WiredParameter as WiredParameter
    from dnw._wiring import Wiring as Wiring


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"dnw.{name}")
    raise AttributeError(f"module 'dnw' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
