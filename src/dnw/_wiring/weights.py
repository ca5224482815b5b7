"""The wired parameters of one optimizer as they are between its steps: latent weights, edges, effective weights.

Contract: every parameter holds its effective weight. Whatever others write to it is taken over, entry by entry.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dnw._rules.dormant import Dormant, keeps_zeros
from dnw._rules.layer import Layer
from dnw._rules.rule import Rule
from dnw._wiring.foreign import chain
from dnw._wiring.pools import Pools
from dnw._wiring.ranks import local_optimizer
from dnw._wiring.state import STATE_KEYS, check_finite, entry_of
from dnw._wiring.stats import Statistics
from dnw._wiring.wired_layer import WiredLayer


class Weights:
    """The wired parameters of one optimizer.

    Attributes:
        optimizer: that steps them.
        chain: it and those inside it that step the same parameters, the outermost first.
        rule: that chooses edges and says what the model gets.
        dormant: what weight decay and momentum do to dormant edges.
        layers: the parameters.
        pools: of the layers.
        step: number of completed steps.
        is_settled: whether the model holds the weights that it is evaluated with.
        statistics: what is known of the edges over time.
    """

    def __init__(self, optimizer: Optimizer, rule: Rule, layers: list[WiredLayer], pools: Pools, dormant: Dormant) -> None:
        self.optimizer, self.chain = optimizer, chain(optimizer)
        self.rule, self.dormant = rule, dormant
        self.layers, self.pools = layers, pools
        self.step = 0
        self.is_settled = False
        self.statistics = Statistics()
        self.known: list[Any] = []  # what kernels ask, which know it weakly

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """The optimizer's state on this process."""
        return local_optimizer(self.chain[-1]).state

    def see_state(self, layer: WiredLayer) -> None:
        """Shows the rule what the optimizer keeps for a layer."""
        layer.see_state(self.state.get(layer.parameter, {}))

    def check_held(self) -> None:
        """Raises ``RuntimeError`` unless the optimizer holds every wired parameter."""
        held = {id(p) for group in self.chain[-1].param_groups for p in group["params"]}
        for layer in self.layers:
            if id(layer.parameter) not in held:
                raise RuntimeError(
                    f"the wired parameter {layer.name!r} is no longer in its optimizer; take the wiring off with "
                    "wiring.remove() before exchanging parameters, and wire again"
                )

    # --- latent and effective ---

    def effective(self, layer: Layer) -> Tensor:
        """What the model holds: the weights to train with, or, where it is settled, those to evaluate with."""
        return self.rule.settle(layer) if self.is_settled else self.rule.project(layer)

    def effective_of(self, layer: WiredLayer, dense: Tensor) -> Tensor:
        """What the model would hold if these were a layer's latent weights, with the edges that it has."""
        if layer.in_place:
            return self.effective(layer)
        kept, layer.latent = layer.latent, dense
        try:
            return self.effective(layer)
        finally:
            layer.latent = kept

    def write(self, layer: WiredLayer) -> None:
        """Puts a layer's effective weight into the model."""
        layer.write(self.effective(layer))

    @torch.no_grad()
    def take_over_writes(self, layer: WiredLayer) -> bool:
        """Takes over what somebody else wrote to a parameter; returns whether to select anew.

        Raises:
            ValueError: NaN or infinity. It is not taken over, and waits for something else to be written in its place.
        """
        layer.follow()
        if not layer.is_written():
            return False
        check_finite(layer.name, layer.held.detach(), layer.shard)
        written, replaced = layer.take_over_writes(self.effective(layer), self.rule)
        if replaced and self.step:
            warnings.warn(
                f"another sparse weight was put in place of {layer.name!r}: its dormant edges start from 0 again. To look at "
                "other weights for a while, such as an average, put them into a copy of the model",
                stacklevel=2,
            )
        return written

    @torch.no_grad()
    def select(self, layers: Sequence[WiredLayer], step: int | None = None) -> bool:
        """Selects anew in every pool that holds one of the layers, and projects what changed.

        Args:
            layers: that have new latent weights.
            step: number of the step that made them; None where they were written.

        Returns:
            Whether the rule was asked for edges; between two times that it gives others it is not.
        """
        for layer in layers if step is not None else []:
            layer.step = step  # type: ignore[assignment]
        due = [pool for pool in self.pools.of(layers) if self.pools.is_due(pool, step)]
        changed = self.pools.choose(due, stepped=step is not None)
        changed += self.pools.prepare(layers)
        chosen = {id(layer) for pool in due for layer in pool.layers}
        for layer in {id(layer): layer for layer in [*layers, *changed]}.values():
            if layer.exchanged:
                layer.take_back()
            unchanged = not self.rule.has_latent_weights and step is not None and id(layer) not in chosen
            if unchanged and layer.in_place and (self.zeros_stay or self.pools.is_full(layer)):
                layer.accept()
                continue
            if unchanged:
                layer.clear_dormant()
            if not (unchanged and layer.in_place):
                self.write(layer)
            if step is None:
                self.clear_momentum(layer)
        return bool(due)

    @property
    def zeros_stay(self) -> bool:
        """Whether dormant edges are 0 after a step because they were before, so that nothing need be written to them.

        They have no weights, no gradient and no momentum then, and the base optimizer leaves such entries alone.
        """
        rule = self.rule
        without = not (rule.has_latent_weights or rule.needs_dormant_gradient)
        no_momentum = rule.fixed or self.dormant.momentum == "zero"
        return without and no_momentum and len(self.chain) == 1 and keeps_zeros(self.optimizer)

    def clear_momentum(self, layer: WiredLayer) -> None:
        """Takes the momentum from dormant edges whose zeros are to stay; whatever chose them, or brought it."""
        if layer.in_place and self.zeros_stay:
            self.see_state(layer)
            Dormant(momentum="zero").apply(layer)

    # --- what stands in the optimizer's state between steps ---

    def entry(self, layer: WiredLayer) -> dict[str, Tensor]:
        """What travels of a layer."""
        return entry_of(layer, self.step, self.pools[layer].k)

    def enter_state(self, layer: WiredLayer, even_alone: bool = False) -> None:
        """Shows a layer's entry in the optimizer's state, beside state of the optimizer's own.

        After a step an optimizer that has made no state never makes any, so ours may stand there alone.
        """
        even_alone = even_alone and local_optimizer(self.optimizer) is self.chain[-1]
        if even_alone or self.state.get(layer.parameter):
            self.state[layer.parameter].update(self.entry(layer))

    def leave_state(self, layer: WiredLayer) -> None:
        """Takes a layer's entry out of the optimizer's state."""
        if layer.parameter in self.state:
            for key in STATE_KEYS:
                self.state[layer.parameter].pop(key, None)
