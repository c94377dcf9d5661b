"""Prints rows of words in columns, and manuals: one line each for scripts, folded to its width on a terminal.

Must not know a command. Imports rich on a terminal only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from xenbackend.cli.arguments import columns

if TYPE_CHECKING:
    from rich.table import Table

_GAP = 2  # columns between two columns
_PROSE = ("Description:", "Behaviour:", "Limits:")  # sections of a manual whose lines may be filled anew

Rows = Sequence[Sequence[str]]
Stacks = Sequence[tuple[int, ...]]


def print_rows(rows: Rows, stacks: Stacks, *, folds: int = -1, right: Sequence[int] = (), below: Rows = ()) -> None:
    """Print rows, the headings first.

    Args:
        rows: as many words in each; a script may read them in this order.
        stacks: how a terminal shows them: each column has the words of these places on top of one another.
        folds: the stack that is folded into the columns that the others leave.
        right: places of words that are aligned right, if it is not a terminal; on one, their stacks are.
        below: lines below each row, such as its layers; on a terminal they follow the table.
    """
    if not sys.stdout.isatty():
        print("\n".join(lines(rows, right=right, below=below)))
        return
    from rich.console import Console
    from rich.text import Text  # words may hold what rich takes for mark-up

    heads, *others = (["\n".join(filter(None, (row[place] for place in each))) for each in stacks] for row in rows)
    made = table(heads, folds=folds, right=[number for number, each in enumerate(stacks) if each[0] in right])
    for cells in others:
        made.add_row(*map(Text, cells))
    Console(highlight=False).print(made)
    for row, more in zip(rows, below, strict=False):
        if more:
            print("\n".join([f"{row[0]}:", *more]))


def lines(rows: Rows, *, right: Sequence[int] = (), below: Rows = ()) -> Iterator[str]:
    """Yield a line for each row, its words in columns, and the lines below it; nothing is ever cut."""
    widths = [max(map(len, words)) for words in zip(*rows, strict=True)]
    for row, more in zip_longest(rows, below, fillvalue=()):
        words = [
            word.rjust(width) if place in right else word.ljust(width)
            for place, (word, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield (" " * _GAP).join(words).rstrip()
        yield from more


def table(headings: Sequence[str], *, folds: int = -1, right: Sequence[int] = ()) -> Table:
    """Return an empty table whose column number `folds` takes what the others leave, and is folded there."""
    from rich.table import Table

    made = Table(box=None, padding=(0, _GAP, 0, 0))
    for number, heading in enumerate(headings):
        is_last = number == folds % len(headings)
        made.add_column(
            heading, no_wrap=not is_last, overflow="fold" if is_last else "ellipsis", ratio=1 if is_last else None,
            justify="right" if number in right else "left",
        )  # fmt: skip
    return made


def print_manual(text: str) -> None:
    """Print a manual: on a terminal with its paragraphs filled anew, so that no word is broken."""
    print(filled(text, columns()) if sys.stdout.isatty() else text)


def filled(text: str, width: int) -> str:
    """Return a manual whose lines have at most `width` columns, as far as its words are no longer than that.

    Lines of prose are joined if the first was as full as it could be; others stay apart, and are folded one by one.
    """
    made: list[str] = []
    for lines_, is_prose in _paragraphs(text):
        indent = " " * _indent(lines_[0])
        made += _folded(
            " ".join([lines_[0].rstrip(), *map(str.strip, lines_[1:])]), width, indent if is_prose else f"{indent}    "
        )
    return "\n".join(made)


def _folded(text: str, width: int, indent: str) -> list[str]:
    """Return a text as lines, all but the first of which begin with `indent`: it is broken at spaces, and before [,."""
    found, line = [], " " * _indent(text)
    for piece in re.split(r"(?<= )|(?=\[,)", text.lstrip()):
        if len(line) + len(piece.rstrip()) > width and line.strip():
            found.append(line.rstrip())
            line = indent
        line += piece
    return [*found, line.rstrip()]


def _paragraphs(text: str) -> list[tuple[list[str], bool]]:
    """Return the lines of a manual, those of one paragraph together, and whether they are prose."""
    is_prose, told = False, []
    for line in text.split("\n"):
        if line and not line.startswith(" "):
            is_prose = line in _PROSE
        told.append((line, is_prose and line.startswith(" ")))
    longest = max((len(line) for line, is_prose in told if is_prose), default=0)
    found: list[tuple[list[str], bool]] = []
    for line, is_prose in told:
        before = found[-1][0][-1] if found else ""
        is_full = len(before) + 1 + len(line.split(maxsplit=1)[0] if line else "") > longest
        if is_prose and found[-1][1] and is_full and _indent(before) == _indent(line):
            found[-1][0].append(line)
        else:
            found.append(([line], is_prose))
    return found


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
