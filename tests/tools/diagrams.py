"""Writes the tables of states and phases into ARCHITECTURE.md; run `python -m tests.tools.diagrams` when they changed.

Must not write anything but what stands between the markers.
"""

from __future__ import annotations

import re
from pathlib import Path

from xenbackend.blkif.handshake import STEPS, XenbusState, name
from xenbackend.protocol.messages import Stage
from xenbackend.supervisor.vbd.phase import LIMIT_S, MOVES, STANDINGS, Goal, Phase

PAGE = Path(__file__).parent.parent.parent / "ARCHITECTURE.md"


def states() -> str:
    """Return the table for people: a row per state of ours, a column per state of the frontend's."""
    lines = [f"{'ours / theirs':<16}" + "".join(f"{theirs.value:>9}" for theirs in XenbusState)]
    for ours in XenbusState:
        cells = "".join(f"{STEPS[ours, theirs].value:>9}" for theirs in XenbusState)
        lines.append(f"{ours.value} {name(ours):<14}{cells}")
    return "\n".join(lines)


def phases() -> str:
    """Return the tables for people: a row per phase, a column per goal, then one per stage of the worker's."""
    goals = [["phase", "limit", *(f"goal {goal.value}" for goal in Goal)]]
    stages = [["phase", *(f"stage {stage.value}" for stage in Stage)]]
    for phase in Phase:
        moves = [MOVES.get((phase, goal)) for goal in Goal]
        limit = f"{LIMIT_S[phase]:g} s" if phase in LIMIT_S else "-"
        goals.append([phase.value, limit, *(f"{each[0].value}: {each[1].value}" if each else "-" for each in moves)])
        after = [STANDINGS[phase].get(stage) for stage in Stage]
        stages.append([phase.value, *(each.value if each else "-" for each in after)])
    return f"{_in_columns(goals)}\n\n{_in_columns(stages)}"


def _in_columns(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    return "\n".join("".join(map(str.ljust, row, widths)).rstrip() for row in rows)


DIAGRAMS = {"states": states, "phases": phases}


def with_diagrams(text: str) -> str:
    """Return a page with each table between its markers, as the code has it."""
    for place, diagram in DIAGRAMS.items():
        begin, end = f"<!-- {place} -->\n", f"<!-- /{place} -->\n"
        text = re.sub(f"{begin}.*?{end}", f"{begin}\n```\n{diagram()}\n```\n\n{end}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(with_diagrams(PAGE.read_text()))
