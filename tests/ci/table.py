"""The table of what each step took.

Must not judge: a step that took too long is for a person to look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One step: how it ended, what it took, and in CI what it may take."""

    step: str
    outcome: str
    seconds: float
    minutes: float | None = None
    remark: str = ""


def text(rows: Sequence[Row]) -> str:
    """Return the table, with the sum below."""
    whole = Row("in all", "", sum(row.seconds for row in rows), _sum(rows))
    return "\n".join(_line(row) for row in [*rows, whole])


def _sum(rows: Sequence[Row]) -> float | None:
    minutes = [row.minutes for row in rows if row.minutes is not None]
    return sum(minutes) if minutes else None


def _line(row: Row) -> str:
    of = "" if row.minutes is None else f"of {clock(row.minutes * 60)}"
    return f"{row.step:<10}{clock(row.seconds):>8}  {of:<9}  {row.outcome:<7} {row.remark}".rstrip()


def clock(seconds: float) -> str:
    """Return seconds as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
