"""From a program of all channels to one of those that matter: what varies with the input and is wanted.

Contract: the same outputs, exactly but for rounding. Facts go forwards, which channels vary and what the others are; then which
channels must be there, backwards until nothing changes; then every instruction is made anew for its channels. A channel that
does not vary becomes part of what is added by those that read it, as a map where it is not the same at every place.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dnw.compile._layers import Concat, Rearrange
from dnw.compile._program import Affine, Constant, Convolution, Facts, Linear, Node, Pick, Program, Restore, Size
from dnw.compile._torch import Foreign


def facts_of(program: Program) -> list[Facts]:
    """What is known of each value."""
    sizes = program.sizes()
    found = [Facts(torch.ones(size[:1] or (1,), dtype=torch.bool), None) for size in program.input_sizes]
    for node, size in zip(program.nodes, sizes[len(found) :], strict=True):
        known = [found[i] for i in node.reads]
        varies = node.instruction.varying(*known)
        value = None
        if not bool(varies.all()):
            given = [k.numbers(sizes[i])[None] for k, i in zip(known, node.reads, strict=True)]
            value = node.instruction(*given)[0].masked_fill(varies.view(-1, *[1] * (len(size) - 1)), 0.0)
            value = value if bool(value.any()) else None
        found.append(Facts(varies, value))
    return found


def kept_of(program: Program, facts: list[Facts]) -> list[Tensor]:
    """Of each value which channels must be there, boolean; none of those of a value that is not needed."""
    kept = [torch.zeros_like(known.varies) for known in facts]
    for i in (*range(len(program.input_sizes)), *program.outputs):
        kept[i] = torch.ones_like(kept[i])
    first = len(program.input_sizes)
    while True:
        before = [int(mask.count_nonzero()) for mask in kept]
        for number in reversed(range(len(program.nodes))):
            node, made = program.nodes[number], first + number
            if not bool((kept[made] & facts[made].varies).any()):  # nothing, or the same for every input
                continue
            taken, sent = node.instruction.settled([kept[i] for i in node.reads], kept[made], [facts[i] for i in node.reads])
            for i, mask in zip(node.reads, taken, strict=True):
                kept[i] = kept[i] | mask
            kept[made] = kept[made] | sent
        if before == [int(mask.count_nonzero()) for mask in kept]:
            return kept


class Analysed(NamedTuple):
    """A program, and of each of its values what is known and which channels must be there."""

    program: Program
    facts: list[Facts]
    kept: list[Tensor]

    def live(self, value: int) -> Tensor:
        """Which channels of a value depend on the input and are wanted, boolean."""
        return self.facts[value].varies & self.kept[value]


def analysed(program: Program) -> Analysed:
    """What matters of a program. Its inputs, which are always there as a whole, are read through a choice of channels."""
    first = len(program.input_sizes)
    picks = [Node(Pick(torch.arange(size[0])), (i,)) for i, size in enumerate(program.input_sizes)]
    nodes = [replace(node, reads=tuple(first + i for i in node.reads)) for node in program.nodes]
    program = replace(program, nodes=(*picks, *nodes), outputs=tuple(first + i for i in program.outputs))
    facts = facts_of(program)
    return Analysed(program, facts, kept_of(program, facts))


def shrunk(given: Program | Analysed) -> Program:
    """The program on the channels that matter, in single precision, without what does nothing."""
    program, facts, kept = found = given if isinstance(given, Analysed) else analysed(given)
    first, sizes = len(program.input_sizes), program.sizes()
    nodes = []
    for number, node in enumerate(program.nodes):
        made = first + number
        if not bool(found.live(made).any()):  # the same for every input, or read by nobody
            constant = facts[made].numbers(sizes[made])[kept[made]]
            constant = constant if len(constant) else constant.new_zeros(1, *sizes[made][1:])
            nodes.append(Node(Restore(torch.empty(0, dtype=torch.int64), constant), (0,), node.name))
            continue
        reads = node.reads
        if isinstance(node.instruction, Concat) and not node.instruction.axis:
            reads = tuple(i for i in reads if kept[i].any())
        known, taken = [facts[i] for i in reads], [kept[i] for i in reads]
        nodes.append(Node(node.instruction.shrunk(taken, kept[made], known), reads, node.name))
    return cleaned(folded(replace(program, nodes=tuple(nodes))))


# --- instructions that become part of others ---


def folded(program: Program) -> Program:
    """With scales and shifts as part of the sums that come before them, where nothing else reads those."""
    first, counts, sizes = len(program.input_sizes), program.readers(), program.sizes()
    nodes = list(program.nodes)
    moved = dict[int, int]()  # values that are now made by an earlier node
    for number, node in enumerate(nodes):
        node = replace(node, reads=tuple(moved.get(i, i) for i in node.reads))
        nodes[number] = node
        source = node.reads[0] - first
        if isinstance(node.instruction, Affine) and source >= 0 and counts[node.reads[0]] == 1:
            whole = _scaled(nodes[source].instruction, node.instruction, sizes[node.reads[0]])
            if whole is not None:
                nodes[source] = replace(nodes[source], instruction=whole)
                moved[first + number] = node.reads[0]
                counts[node.reads[0]] = counts[first + number]
    return replace(program, nodes=tuple(nodes), outputs=tuple(moved.get(i, i) for i in program.outputs))


def _scaled(instruction: Any, affine: Affine, size: Size) -> Any:
    """Sums, scaled and shifted; None for what adds nothing up."""
    scale, shift = affine.scale.double(), affine.shift.double()
    if isinstance(instruction, Linear):
        bias = instruction.bias.double() * scale + shift
        return replace(instruction, weight=instruction.weight.double() * scale[:, None], bias=bias)
    if isinstance(instruction, Convolution):
        weight, constant = instruction.weight.double() * scale.view(-1, 1, 1, 1), instruction.constant
        if constant is None:
            sides = (torch.zeros(side, dtype=torch.int64) for side in size[1:])
            constant = Constant(shift, torch.empty(0, dtype=torch.int64), shift.new_zeros(0, 1, 1), *sides)
        else:
            core = constant.core.double() * scale[constant.channels].view(-1, 1, 1)
            constant = replace(constant, base=constant.base.double() * scale + shift, core=core)
        return replace(instruction, weight=weight, constant=constant)
    if isinstance(instruction, Affine):
        return Affine(instruction.scale.double() * scale, instruction.shift.double() * scale + shift)
    return None


def _nothing(instruction: Any, size: Size) -> bool:
    """Whether an instruction makes what it reads."""
    if isinstance(instruction, Pick):
        return instruction.channels.tolist() == list(range(size[0]))
    if isinstance(instruction, Rearrange):
        return instruction.size == size and instruction.order == tuple(range(len(instruction.order)))
    if isinstance(instruction, Affine):
        return bool((instruction.scale == 1).all()) and not bool(instruction.shift.any())
    return isinstance(instruction, Concat) and instruction.check(size) == size


def cleaned(program: Program) -> Program:
    """Without instructions that do nothing or that nothing reads, in single precision, each in its likely form."""
    first, sizes = len(program.input_sizes), program.sizes()
    same = list(range(len(sizes)))
    for number, node in enumerate(program.nodes):
        if len(node.reads) == 1 and _nothing(node.instruction, sizes[node.reads[0]]):
            same[first + number] = same[node.reads[0]]
    needed = {same[i] for i in program.outputs}
    for number in reversed(range(len(program.nodes))):
        if first + number in needed:
            needed.update(same[i] for i in program.nodes[number].reads)
    place, nodes = {i: i for i in range(first)}, list[Node]()
    for number, node in enumerate(program.nodes):
        if first + number in needed:
            place[first + number] = first + len(nodes)
            reads = tuple(place[same[i]] for i in node.reads)
            nodes.append(Node(_formed(_single(node.instruction)), reads, node.name))
    return Program(tuple(nodes), program.input_sizes, tuple(place[same[i]] for i in program.outputs))


def _formed(instruction: Any) -> Any:
    """Sums weight by weight, where fewer than half of the weights are there; _measure.py finds out what is faster."""
    if not isinstance(instruction, (Convolution, Linear)) or (isinstance(instruction, Convolution) and instruction.apart):
        return instruction
    return replace(instruction, sparse=2 * int(instruction.weight.count_nonzero()) < instruction.weight.numel())


def _single(thing: Any) -> Any:
    """All numbers of an instruction in single precision."""
    if isinstance(thing, Tensor):
        return thing.float() if thing.is_floating_point() else thing
    if isinstance(thing, Foreign) or not is_dataclass(thing):
        return thing
    return replace(thing, **{f.name: _single(getattr(thing, f.name)) for f in fields(thing) if f.init})  # type: ignore[type-var]
