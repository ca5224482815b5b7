"""What is known of the edges of a parameter, wherever its values are met: which are active, and what dormant ones need.

Contract: whoever wires a parameter says so here. Kernels are handed values that autograd or a compiler may have put into
another tensor, so a parameter is known by its memory.
"""

from __future__ import annotations

import weakref
from enum import Enum
from typing import Protocol

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


class DormantGradient(Enum):
    """How the gradient of dormant edges is made. That of active ones is exact always."""

    NONE = "none"
    EXACT = "exact"
    BFLOAT16 = "bfloat16"
    POOLED = "pooled"
    POOLED_BFLOAT16 = "pooled bfloat16"


class Known(Protocol):
    """The edges of one parameter."""

    def edges(self) -> Tensor:
        """Mask of the active edges, and of whatever else is not 0 in the parameter."""
        ...

    def num_active(self) -> int:
        """How many edges are active."""
        ...

    def dormant_gradient(self) -> DormantGradient:
        """What dormant edges need in the step that is being prepared."""
        ...


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def make_known(parameter: nn.Parameter, edges: Known) -> None:
    """From now on kernels ask ``edges`` about a parameter, as long as both are there."""
    _known[parameter] = weakref.ref(edges)


def forget(parameter: nn.Parameter) -> None:
    """The parameter is dense from now on."""
    _known.pop(parameter, None)


def known_edges(weight: Tensor) -> Known | None:
    """What is known of the parameter whose values these are."""
    for parameter, reference in list(_known.items()):
        if parameter.data_ptr() == weight.data_ptr() and parameter.shape == weight.shape:
            found: Known | None = reference()
            return found
    return None


def active_edges(weight: Tensor) -> tuple[Tensor, DormantGradient]:
    """Mask of the active edges of a weight, and what its dormant ones need: if nobody knows, all that are not 0."""
    known = known_edges(weight)
    if known is None:
        return weight != 0, DormantGradient.EXACT
    return known.edges(), known.dormant_gradient()


def density_of(weight: Tensor, candidates: int) -> float:
    """The density of a weight: as its wiring says, or the part of it that is not 0, counted once each time it is written."""
    known = known_edges(weight)
    if known is not None:
        return known.num_active() / candidates
    if weight.is_inference():  # of these nobody can tell when they are written
        return min(1.0, int(weight.count_nonzero()) / candidates)
    version, number = _counted.get(weight, (-1, 0))
    if version != weight._version:
        number = int(weight.detach().count_nonzero())
        _counted[weight] = weight._version, number
    return min(1.0, number / candidates)  # some may lie where nothing is read


_counted: WeakIdKeyDictionary = WeakIdKeyDictionary()
