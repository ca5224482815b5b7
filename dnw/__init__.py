"""Learn which connections a neural network has, while its weights are trained.

Everything public is listed here and loaded when first used, so that ``import dnw`` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "wire": "dnw._wire",
    "Wiring": "dnw._wiring",
    "WiredParameter": "dnw._wiring",
    "Edges": "dnw._edges",
    "Summary": "dnw._edges",
    "Rule": "dnw._rules",
    "Layer": "dnw._rules",
    "Pool": "dnw._rules",
    "DNW": "dnw._rules",
    "RandomGraph": "dnw._rules",
    "Dormant": "dnw._dormant",
    "Frozen": "dnw._rules",
    "Complete": "dnw._rules",
    "RULES": "dnw._rules",
    "Uniform": "dnw._budgets",
    "Global": "dnw._budgets",
    "ErdosRenyiKernel": "dnw._budgets",
    "num_edges": "dnw._budgets",
    "top_k": "dnw._select",
    "top_k_each": "dnw._select",
}
_ROOMS = ("graphs", "models", "count", "view", "data", "train", "recipes")

__all__ = [*_PUBLIC, *_ROOMS]

if TYPE_CHECKING:
    from dnw import count as count
    from dnw import data as data
    from dnw import graphs as graphs
    from dnw import models as models
    from dnw import recipes as recipes
    from dnw import train as train
    from dnw import view as view
    from dnw._budgets import ErdosRenyiKernel as ErdosRenyiKernel
    from dnw._budgets import Global as Global
    from dnw._budgets import Uniform as Uniform
    from dnw._budgets import num_edges as num_edges
    from dnw._dormant import Dormant as Dormant
    from dnw._edges import Edges as Edges
    from dnw._edges import Summary as Summary
    from dnw._rules import DNW as DNW
    from dnw._rules import RULES as RULES
    from dnw._rules import Complete as Complete
    from dnw._rules import Frozen as Frozen
    from dnw._rules import Layer as Layer
    from dnw._rules import Pool as Pool
    from dnw._rules import RandomGraph as RandomGraph
    from dnw._rules import Rule as Rule
    from dnw._select import top_k as top_k
    from dnw._select import top_k_each as top_k_each
    from dnw._wire import wire as wire
    from dnw._wiring import WiredParameter as WiredParameter
    from dnw._wiring import Wiring as Wiring


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"dnw.{name}")
    raise AttributeError(f"module 'dnw' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
