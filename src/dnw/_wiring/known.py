"""What kernels may know of a wired parameter."""

from __future__ import annotations

from torch import Tensor

from dnw._rules.rule import Rule
from dnw._wiring.weights import Weights
from dnw._wiring.wired_layer import WiredLayer
from dnw.kernels._wired import DormantGradient


class KnownLayer:
    """One layer of a wiring, as :class:`dnw.kernels._wired.Known`."""

    def __init__(self, weights: Weights, layer: WiredLayer) -> None:
        self._weights, self.layer = weights, layer

    def edges(self) -> Tensor:
        layer, rule = self.layer, self._weights.rule
        assert layer.active is not None
        if type(rule).project is Rule.project and not layer.is_written():
            return layer.active
        return layer.active | (layer.held.detach() != 0)

    def num_active(self) -> int:
        pool = self._weights.pools[self.layer]
        return pool.num_active if len(pool.layers) == 1 else self.layer.count()

    def dormant_gradient(self) -> DormantGradient:
        weights, rule = self._weights, self._weights.rule
        reads = rule.selects_by_gradient and rule.is_due(weights.step + 1)
        if not (rule.needs_dormant_gradient or reads):
            return DormantGradient.NONE
        return DormantGradient(weights.dormant.gradient)
