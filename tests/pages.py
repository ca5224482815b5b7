"""The pages of the documentation as data: headings, blocks of code, tables, links, commands.

Contract: plain text in, nothing of the library. A block of code is named by its page and the heading that it stands under, as
in ``docs/rules.md#schedules``, or by a comment on the line before it: ``<!-- ddp -->`` makes it ``docs/loops.md#ddp``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: str
    line: int
    language: str
    name: str
    text: str


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "]", heading).lower()).strip().replace(" ", "-")


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """The blocks of a page, each named ``page#heading`` or ``page#marker``."""
    found, heading, before, fence = [], "", "", None
    for number, line in enumerate(text_of(page).splitlines(), 1):
        if fence is not None:
            if line.startswith("```"):
                found.append(Block(page, fence[0], fence[1], f"{page}#{fence[2]}", "\n".join(fence[3]) + "\n"))
                fence = None
            else:
                fence[3].append(line)
        elif line.startswith("```"):
            marker = re.fullmatch(r"<!-- ([\w-]+) -->", before)
            fence = (number, line[3:].strip(), marker[1] if marker else heading, [])
        elif title := re.match(r"#+ (.*)", line):
            heading = slug(title[1])
        before = line
    assert fence is None, f"{page}: the block that begins in line {fence[0]} has no end"
    return tuple(found)


def python_blocks() -> Iterator[Block]:
    return (block for page in PAGES for block in blocks(page) if block.language == "python")


def block(name: str) -> str:
    """The Python block of a name."""
    found = [one for one in python_blocks() if one.name == name]
    assert found, f"there is no Python block {name}; there are {', '.join(sorted({one.name for one in python_blocks()}))}"
    assert len(found) == 1, f"{name} are {len(found)} blocks; give each a name with <!-- name --> on the line before it"
    return found[0].text


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def anchors(page: str) -> set[str]:
    """What a link into a page may name."""
    return {slug(title) for title in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)}


def links(page: str) -> list[tuple[str, str]]:
    """Where a page links to inside the repository: the file, ``""`` for itself, and the anchor, ``""`` for none."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [(path, anchor) for path, _, anchor in (target.partition("#") for target in targets) if ":" not in path]


def section(page: str, anchor: str) -> str:
    """What stands under a heading, up to the next one."""
    parts = re.split(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    found = [body for title, body in zip(parts[1::2], parts[2::2], strict=True) if slug(title) == anchor]
    assert len(found) == 1, f"{page} has {len(found)} headings #{anchor}"
    return found[0]


def table(page: str, *titles: str) -> list[dict[str, str]]:
    """The rows of the one table whose first columns have these titles, each by the titles of all columns."""
    lines = [_cells(line) for line in text_of(page).splitlines()]
    starts = [i for i, cells in enumerate(lines) if cells[: len(titles)] == list(titles)]
    assert len(starts) == 1, f"{page} has {len(starts)} tables that begin with the columns {titles}; expected one"
    header, rows = lines[starts[0]], lines[starts[0] + 2 :]
    rows = rows[: rows.index([])] if [] in rows else rows
    wrong = [row for row in rows if len(row) != len(header)]
    assert not wrong, f"{page}: a row has not the columns {header}: {wrong[0]}"
    return [dict(zip(header, row, strict=True)) for row in rows]


def _cells(line: str) -> list[str]:
    """The cells of a line of a table; none of any other line."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []


def shell_lines() -> list[tuple[str, str]]:
    """The commands in the pages' shell blocks, without their comments: (page, command)."""
    lines = [(page, line) for page in PAGES for one in blocks(page) if one.language == "sh" for line in one.text.splitlines()]
    return [(page, command) for page, line in lines if (command := line.partition(" #")[0].strip()) and command[0] != "#"]


def commands_in_prose() -> list[tuple[str, str]]:
    """The commands between backticks, those with their arguments left open among them: (page, command)."""
    starts = r"`((?:dnw|make|python|pip) [^`]+|[A-Z_]+=\S+ dnw [^`]+)`"
    return [(page, " ".join(found.split())) for page in PAGES for found in re.findall(starts, prose(page))]
