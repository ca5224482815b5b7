"""The rules: every way of finding a wiring, one short frozen class each.

Contract: a rule overrides the hooks of :class:`dnw.Rule` and nothing else. The rules are listed in ``RULES``; the parametrized
tests run on every rule of that list.
"""

from __future__ import annotations

from dnw._rules.estimators import DNW, SRSTE, NormSTE, NoUpdate, TargetedDropout, TopKAST
from dnw._rules.fixed import Complete, Frozen, RandomGraph
from dnw._rules.growing import IHT, SET, RigL, SparseMomentum
from dnw._rules.prune_and_grow import PruneAndGrow
from dnw._rules.pruning import L1Anneal, MagnitudePruning
from dnw._rules.rule import Rule
from dnw._rules.thresholds import ST3, Feather

RULES: dict[str, type[Rule]] = {
    "dnw": DNW,
    "no_update": NoUpdate,
    "targeted_dropout": TargetedDropout,
    "magnitude_pruning": MagnitudePruning,
    "l1_anneal": L1Anneal,
    "random": RandomGraph,
    "complete": Complete,
    "frozen": Frozen,
    "iht": IHT,
    "set": SET,
    "rigl": RigL,
    "sparse_momentum": SparseMomentum,
    "sr_ste": SRSTE,
    "norm_ste": NormSTE,
    "st3": ST3,
    "feather": Feather,
    "top_kast": TopKAST,
}
"""Every rule, by the name that recipes and the command line use."""
