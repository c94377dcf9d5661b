"""`make scoreboard`: every measure with its goal, its figure, and when and of which commit that is.

Must not measure anything itself: `measures` does, or reads what suites have left in build/.

Exit status 1 where a figure is below its goal. A measure without a figure is none: it is shown as "not measured", and
fails the board only with ``--release``, since a release stands on what was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.scoreboard.measures import BUILD, MEASURES, Figure, Measure

_BELOW, _REACHED, _NOT_MEASURED = "BELOW", "reached", "not measured"


def main(arguments: Sequence[str]) -> int:
    """Print the board."""
    parser = argparse.ArgumentParser(prog="python -m tests.scoreboard", description="Measures, goals and figures.")
    parser.add_argument("--release", action="store_true", help="fail where something is not measured, too")
    parser.add_argument("--build", type=Path, default=BUILD, help="where suites leave their figures (%(default)s)")
    chosen = parser.parse_args(arguments)
    lines, below, missing = board(MEASURES, chosen.build)
    print("\n".join(lines))
    print(f"{len(MEASURES) - below - missing} reached, {below} below, {missing} not measured")
    return 1 if below or (chosen.release and missing) else 0


def board(measures: Iterable[Measure], build: Path) -> tuple[list[str], int, int]:
    """Return the lines, how many figures are below their goals, and how many measures have none."""
    lines = [f"{'':4}{'measure':56}{'goal':>12}{'figure':>14}  {'':13}{'date':12}commit"]
    below = missing = 0
    for measure in measures:
        figure = measure.source(build)
        verdict = _NOT_MEASURED if figure is None else _REACHED if measure.reaches(figure) else _BELOW
        below += verdict == _BELOW
        missing += verdict == _NOT_MEASURED
        goal = f"{'<=' if measure.is_most else '>='} {_number(measure.goal)}"
        lines.append(f"{measure.number:4}{measure.what:56}{goal:>12}{_tail(figure, verdict)}".rstrip())
    return lines, below, missing


def _tail(figure: Figure | None, verdict: str) -> str:
    if figure is None:
        return f"{'-':>14}  {verdict}"
    dirty = "+" if figure.commit.endswith("+") else ""
    return f"{_number(figure.value):>14}  {verdict:13}{figure.date[:10]:12}{figure.commit[:10]}{dirty}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
