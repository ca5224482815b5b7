"""Tasks that a circuit is looked for: pairs of prompts, each with an answer of its own.

Contract: prompts are bytes of real code, all of a length, cut out where the answer comes next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ANY_OTHER = -1
"""In place of an answer: any token but the other answer."""


@dataclass(frozen=True)
class Pair:
    """Two prompts and two answers, of which each is right after one of the prompts and wrong after the other.

    Attributes:
        prompts: tokens of each, of the same length.
        answers: the token that is right after each; ``ANY_OTHER`` in place of one of them.
    """

    prompts: tuple[tuple[int, ...], tuple[int, ...]]
    answers: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts with their right and their wrong answers.

    Attributes:
        name: what it asks.
        prompts: int64 ``[prompts, tokens]``.
        right, wrong: tokens, int64 ``[prompts]``, or ``ANY_OTHER``.
    """

    name: str
    prompts: Tensor
    right: Tensor
    wrong: Tensor

    @classmethod
    def from_pairs(cls, name: str, pairs: Sequence[Pair]) -> Task:
        """The two prompts of each pair one after the other.

        Raises:
            ValueError: no pairs, prompts of several lengths, or a pair with two equal answers.
        """
        if equal := [pair for pair in pairs if pair.answers[0] == pair.answers[1]]:
            raise ValueError(f"task {name!r}: both answers of a pair are {equal[0].answers[0]}; they have to differ")
        lengths = {len(prompt) for pair in pairs for prompt in pair.prompts}
        if len(lengths) != 1:
            found = f"prompts of {', '.join(map(str, sorted(lengths)))} tokens" if lengths else "no pairs"
            raise ValueError(f"task {name!r}: {found}; give pairs, all prompts of the same length")
        return cls(
            name,
            torch.tensor([prompt for pair in pairs for prompt in pair.prompts]),
            torch.tensor([answer for pair in pairs for answer in pair.answers]),
            torch.tensor([answer for pair in pairs for answer in reversed(pair.answers)]),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def halves(self) -> tuple[Task, Task]:
        """Every other pair, and the others: to find a circuit on, and to measure it on."""
        number = torch.arange(len(self)) // 2 % 2
        return self.at((number == 0).nonzero().flatten()), self.at((number == 1).nonzero().flatten())

    def at(self, rows: Tensor) -> Task:
        """Some of the prompts, by their numbers."""
        rows = rows.to(self.prompts.device)
        return Task(self.name, self.prompts[rows], self.right[rows], self.wrong[rows])

    def to(self, device: torch.device | str) -> Task:
        """The same on a device."""
        return Task(self.name, self.prompts.to(device), self.right.to(device), self.wrong.to(device))


_QUOTED = re.compile(rb"""(?<=[(=,\[: ])(['"])([A-Za-z0-9_][A-Za-z0-9_ .,:/%-]{1,23})(?=\1)""")
_BRACKETED = re.compile(rb"(?<=[A-Za-z0-9_])([(\[])([A-Za-z0-9_., ]{1,24})(?=[)\]])")
_LINES = re.compile(rb"\n( *)([^\s#][^\n#]*)\n( *)(?=([a-z]))")

Found = Iterator[tuple[bool, int, int]]
"""Which of the two kinds, where the answer stands, and the answer."""


def _quotes(text: bytes) -> Found:
    for match in _QUOTED.finditer(text):
        yield match[1] == b'"', match.end(), match[1][0]


def _brackets(text: bytes) -> Found:
    for match in _BRACKETED.finditer(text):
        closing = text[match.end()]
        if (match[1], closing) in ((b"(", ord(")")), (b"[", ord("]"))):
            yield match[1] == b"[", match.end(), closing


def _indentation(text: bytes) -> Found:
    end = 0
    while match := _LINES.search(text, end):
        end = match.start(3) - 1  # the next line begins where this one ends
        before, after, opens = len(match[1]), len(match[3]), match[2].endswith(b":")
        if opens and after == before + 4:
            yield True, match.start(3) + before, ord(" ")
        elif not opens and after == before:
            yield False, match.end(3), ANY_OTHER


TASKS: dict[str, Callable[[bytes], Found]] = {"quotes": _quotes, "brackets": _brackets, "indentation": _indentation}
"""What code asks of who reads it: which quote closes a string, which bracket, and whether a line is indented after a colon."""


def python_task(name: str, source: Tensor, *, length: int = 64, pairs: int = 200, seed: int = 0) -> Task:
    """A task from Python code, its two kinds of prompts equally often.

    Args:
        name: of ``TASKS``. "quotes": a short string ends here; is it closed by ' or by "? "brackets": by ) or by ]?
            "indentation": a line as far in as the one above has begun; is the next byte another space, as after a colon, or any
            other?
        source: bytes, uint8, as :func:`dnw.data.read_python_source` gives them; those held out, say.
        length: of the prompts, in bytes.
        pairs: how many, at most.
        seed: of their choice.

    Raises:
        ValueError: no such task, too short or too few, or none of one of the two kinds in the source.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r}: there are {', '.join(TASKS)}")
    if pairs < 2 or length < 1:
        raise ValueError(f"length={length}, pairs={pairs}: prompts have a byte or more, and a task two pairs or more")
    text = source.numpy().tobytes()
    kinds: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for kind, place, answer in TASKS[name](text):
        if place >= length:
            kinds[kind].append((place, answer))
    count = min(pairs, *map(len, kinds))
    if not count:
        raise ValueError(f"task {name!r}: the source, {len(text):,} bytes, has no example of one of its two kinds")
    generator = torch.Generator().manual_seed(seed)
    chosen = [[found[i] for i in torch.randperm(len(found), generator=generator)[:count].tolist()] for found in kinds]
    return Task.from_pairs(
        name,
        [
            Pair((tuple(text[a - length : a]), tuple(text[b - length : b])), (right_a, right_b))
            for (a, right_a), (b, right_b) in zip(*chosen, strict=True)
        ],
    )
