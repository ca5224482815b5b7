"""Whether sums are faster edge by edge or as a matrix with zeros: measured on the machine at hand, not guessed.

Contract: what a program computes stays the same, up to the order of additions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from dnw.compile._native import Runtime
from dnw.compile._program import Convolution, Instruction, Linear, Program, Size, require_program

_ROUNDS = 9
_MOST = 0.6
"""Density above which sums are not measured, and stay dense: weight by weight there is next to nothing to gain."""


@dataclass(frozen=True)
class Timing:
    """Sums of a program, measured in both forms, in seconds.

    Attributes:
        name: where they are.
        density: the fraction of weights that are not 0.
        sparse, dense: the least time that they took edge by edge, and as a matrix.
        node: the number of the node that makes them.
    """

    name: str
    density: float
    sparse: float
    dense: float
    node: int = 0

    @property
    def faster_dense(self) -> bool:
        """By a tenth at least: less is noise, and edges take less room."""
        return self.dense < 0.9 * self.sparse

    def __str__(self) -> str:
        how = "as a matrix" if self.faster_dense else "edge by edge"
        times = f"{self.sparse * 1e6:.0f} us edge by edge, {self.dense * 1e6:.0f} us as a matrix"
        return f"{self.name}: {how} (density {self.density:.1%}; {times})"


def measured(program: Program, least: float = 0.1) -> tuple[Program, tuple[Timing, ...]]:
    """The same program with those sums as matrices that are faster so on this machine, in one thread.

    Args:
        program: a compacted network.
        least: density below which sums are not measured, and stay sparse: a matrix would do ten times the work there.

    Returns:
        The program and what was measured.

    Raises:
        ValueError: no compacted network.
    """
    require_program(program)
    timings: list[Timing] = []
    nodes = []
    for number, (node, (instruction, sizes)) in enumerate(zip(program.nodes, program.walk(), strict=True)):
        size, found = sizes[0], list[Timing]()
        name = node.name or f"sums {number}"
        apart = isinstance(instruction, Convolution) and instruction.apart
        if isinstance(instruction, (Convolution, Linear)) and not apart:
            instruction = _chosen(instruction, size, name, least, found)
        nodes.append(replace(node, instruction=instruction))
        timings += [replace(timing, node=number) for timing in found]
    return replace(program, nodes=tuple(nodes)), tuple(timings)


def _chosen(
    instruction: Convolution | Linear, size: Size, name: str, least: float, timings: list[Timing]
) -> Convolution | Linear:
    """A convolution or matrix in the faster of both forms; where nearly all or nearly none are there, that is clear."""
    weight = instruction.weight
    groups = instruction.groups if isinstance(instruction, Convolution) else 1
    density = int(weight.count_nonzero()) / max(1, weight.numel() * groups)
    if density < least or density > _MOST:
        return replace(instruction, sparse=density < least)
    timing = _timing(replace(instruction, sparse=True), replace(instruction, sparse=False), size, name, density)
    timings.append(timing)
    return replace(instruction, sparse=not timing.faster_dense)


def _timing(one: Instruction, other: Instruction, size: Size, name: str, density: float) -> Timing:
    images = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    sparse, dense = _runner(one, size), _runner(other, size)
    times = [[_seconds(run, images) for run in (sparse, dense)] for _ in range(_ROUNDS)]
    return Timing(name, density, min(t for t, _ in times), min(t for _, t in times))


def _runner(instruction: Instruction, size: Size) -> Callable[[torch.Tensor], torch.Tensor]:
    return Runtime(Program.chain((instruction,), size))


def _seconds(run: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> float:
    started = time.perf_counter()
    run(images)
    return time.perf_counter() - started


def summary(timings: Iterable[Timing]) -> str:
    """In a few lines: what was measured, and every one that is faster as a matrix."""
    timings = tuple(timings)
    dense = [timing for timing in timings if timing.faster_dense]
    if not timings:
        return "all sums are sparse enough to be faster edge by edge"
    head = f"of {len(timings)} sums timed edge by edge and as a matrix with zeros, {len(dense)} run as a matrix on this machine"
    return "\n".join([head, *(f"  {timing}" for timing in dense)])
