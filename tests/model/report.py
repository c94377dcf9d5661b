"""The result of all runs: how often each thing happened, and how to repeat runs that were wrong.

Must not run anything.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.model.operators import VERBS
from xenbackend.supervisor.vbd.orders import BARRED_BY

_SHOWN = 5  # failed runs
_COMPLETE = 100_000  # orders
_NOT_GIVEN = {"keep", "drop"}  # no disk of the model has an unnamed file
_BARRED = {verb: others - _NOT_GIVEN for verb, others in BARRED_BY.items() if verb not in _NOT_GIVEN}


class Report:
    """The sum of all runs. `broken` counts processes that did not end as they should."""

    def __init__(self, seed: int) -> None:
        self.notes: Counter[str] = Counter()
        self.failed: dict[int, list[str]] = {}
        self.broken = 0
        self._seed = seed

    def add(self, found: dict[str, Any]) -> None:
        """Add one run."""
        self.notes.update(found["notes"])
        if found["faults"]:
            self.failed[found["run"]] = found["faults"]

    def never(self) -> list[str]:
        """Return what has not happened, although it should if there are enough orders."""
        wanted = [f"answer: {verb}" for verb in VERBS]
        wanted += [f"barred: {verb} by {other}" for verb, others in _BARRED.items() for other in sorted(others)]
        wanted += [name.replace("reached:", "killed:") for name in self.notes if name.startswith("reached:")]
        return [each for each in wanted if not any(name.startswith(each) for name in self.notes)]

    def status(self) -> int:
        """Return the exit status; with _COMPLETE orders or more, everything must have happened."""
        is_incomplete = self.notes["orders"] >= _COMPLETE and self.never()
        return 1 if self.failed or self.broken or is_incomplete else 0

    def text(self, seconds: float) -> str:
        """Return the report for people."""
        lines = [f"{count:>10}  {name}" for name, count in sorted(self.notes.items()) if "reached" not in name]
        never = self.never()
        lines += [f"{0:>10}  {name}" for name in never]
        for run, faults in sorted(self.failed.items())[:_SHOWN]:
            lines += ["", f"run {run}: python -m tests.model --seed {self._seed} --run {run}", *faults]
        lines += [f"{self.broken} processes ended in another way: see above"] if self.broken else []
        verdict = f"{len(self.failed)} runs were wrong" if self.failed else "nothing was wrong"
        return "\n".join([*lines, "", f"{self.notes['orders']} orders in {seconds:.0f} s: {verdict}"])
