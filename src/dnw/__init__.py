"""Learn which connections a neural network has, while its weights are trained.

Everything public is listed here and loaded when first used, so that ``import dnw`` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_FILES = {
    "_wiring.wire": ("wire",),
    "_wiring.wiring": ("Wiring",),
    "_wiring.wired_parameter": ("WiredParameter",),
    "_wiring.edges": ("Edges", "Summary", "SummaryRow"),
    "_wiring.parameters": ("DEFAULTS", "LeftOut"),
    "_rules": ("RULES",),
    "_rules.rule": ("Rule",),
    "_rules.layer": ("Layer",),
    "_rules.pool": ("Pool",),
    "_rules.dormant": ("Dormant",),
    "_rules.estimators": ("DNW", "NoUpdate", "TargetedDropout", "SRSTE", "NormSTE", "TopKAST"),
    "_rules.thresholds": ("ST3", "Feather"),
    "_rules.pruning": ("MagnitudePruning", "L1Anneal"),
    "_rules.prune_and_grow": ("PruneAndGrow",),
    "_rules.growing": ("IHT", "SET", "RigL", "SparseMomentum"),
    "_rules.fixed": ("RandomGraph", "Frozen", "Complete"),
    "_selection.budgets": ("Budget", "Uniform", "Global", "ErdosRenyiKernel", "Floor", "LayerShape", "num_edges"),
    "_selection.schedules": ("DensitySchedule",),
    "_selection.patterns": ("Pattern", "NOfM", "Blocks", "Channels"),
    "_selection.top_k": ("Ranking", "top_k", "top_k_each"),
    "_selection.layout": ("Layout",),
    "_selection.shards": ("Shard",),
}
_PUBLIC = {name: f"dnw.{file}" for file, names in _FILES.items() for name in names}
_ROOMS = ("graphs", "models", "count", "compile", "view", "circuits", "data", "train", "recipes")

__all__ = [*_PUBLIC, *_ROOMS]

if TYPE_CHECKING:
    __version__: str
    from dnw import circuits as circuits
    from dnw import compile as compile
    from dnw import count as count
    from dnw import data as data
    from dnw import graphs as graphs
    from dnw import models as models
    from dnw import recipes as recipes
    from dnw import train as train
    from dnw import view as view
    from dnw._rules import RULES as RULES
    from dnw._rules.dormant import Dormant as Dormant
    from dnw._rules.estimators import DNW as DNW
    from dnw._rules.estimators import SRSTE as SRSTE
    from dnw._rules.estimators import NormSTE as NormSTE
    from dnw._rules.estimators import NoUpdate as NoUpdate
    from dnw._rules.estimators import TargetedDropout as TargetedDropout
    from dnw._rules.estimators import TopKAST as TopKAST
    from dnw._rules.fixed import Complete as Complete
    from dnw._rules.fixed import Frozen as Frozen
    from dnw._rules.fixed import RandomGraph as RandomGraph
    from dnw._rules.growing import IHT as IHT
    from dnw._rules.growing import SET as SET
    from dnw._rules.growing import RigL as RigL
    from dnw._rules.growing import SparseMomentum as SparseMomentum
    from dnw._rules.layer import Layer as Layer
    from dnw._rules.pool import Pool as Pool
    from dnw._rules.prune_and_grow import PruneAndGrow as PruneAndGrow
    from dnw._rules.pruning import L1Anneal as L1Anneal
    from dnw._rules.pruning import MagnitudePruning as MagnitudePruning
    from dnw._rules.rule import Rule as Rule
    from dnw._rules.thresholds import ST3 as ST3
    from dnw._rules.thresholds import Feather as Feather
    from dnw._selection.budgets import Budget as Budget
    from dnw._selection.budgets import ErdosRenyiKernel as ErdosRenyiKernel
    from dnw._selection.budgets import Floor as Floor
    from dnw._selection.budgets import Global as Global
    from dnw._selection.budgets import LayerShape as LayerShape
    from dnw._selection.budgets import Uniform as Uniform
    from dnw._selection.budgets import num_edges as num_edges
    from dnw._selection.layout import Layout as Layout
    from dnw._selection.patterns import Blocks as Blocks
    from dnw._selection.patterns import Channels as Channels
    from dnw._selection.patterns import NOfM as NOfM
    from dnw._selection.patterns import Pattern as Pattern
    from dnw._selection.schedules import DensitySchedule as DensitySchedule
    from dnw._selection.shards import Shard as Shard
    from dnw._selection.top_k import Ranking as Ranking
    from dnw._selection.top_k import top_k as top_k
    from dnw._selection.top_k import top_k_each as top_k_each
    from dnw._wiring.edges import Edges as Edges
    from dnw._wiring.edges import Summary as Summary
    from dnw._wiring.edges import SummaryRow as SummaryRow
    from dnw._wiring.parameters import DEFAULTS as DEFAULTS
    from dnw._wiring.parameters import LeftOut as LeftOut
    from dnw._wiring.wire import wire as wire
    from dnw._wiring.wired_parameter import WiredParameter as WiredParameter
    from dnw._wiring.wiring import Wiring as Wiring


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"dnw.{name}")
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'dnw' has no attribute {name!r}")


def _version() -> str:
    """The version that is installed; of a folder on the path alone none is known."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dnw")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted(__all__)
