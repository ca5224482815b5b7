"""Learn which connections a neural network has, while its weights are trained.

Everything public is listed here and loaded when first used, so that ``import dnw`` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "wire": "dnw._wiring",
    "Wiring": "dnw._wiring",
    "WiredParameter": "dnw._wiring",
    "Edges": "dnw._edges",
    "Summary": "dnw._edges",
    "Rule": "dnw._rules",
    "Layer": "dnw._rules",
    "Pool": "dnw._rules",
    "DNW": "dnw._rules",
    "RandomGraph": "dnw._rules",
    "Frozen": "dnw._rules",
    "Complete": "dnw._rules",
    "RULES": "dnw._rules",
    "Uniform": "dnw._select",
    "Global": "dnw._select",
    "ErdosRenyiKernel": "dnw._select",
    "num_edges": "dnw._select",
    "top_k": "dnw._select",
}
_ROOMS = ("graphs", "models", "count", "view", "data", "train", "recipes")

__all__ = [*_PUBLIC, *_ROOMS]

if TYPE_CHECKING:
    from dnw import count, data, graphs, models, recipes, train, view
    from dnw._edges import Edges, Summary
    from dnw._rules import DNW, RULES, Complete, Frozen, Layer, Pool, RandomGraph, Rule
    from dnw._select import ErdosRenyiKernel, Global, Uniform, num_edges, top_k
    from dnw._wiring import WiredParameter, Wiring, wire


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"dnw.{name}")
    raise AttributeError(f"module 'dnw' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
