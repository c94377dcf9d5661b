"""What decides whether a change lands: each step in small, up to the first that fails.

Must not know how a failure is looked into, only that somebody does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.ci import table
from tests.ci.runner import Runner
from tests.ci.share import command_of
from tests.ci.steps import STEPS, Step
from tests.ci.table import Row

Blame = Callable[[Runner, Step, str], str]  # says whether the parent commit has a step's failure too


def run(runner: Runner, commit: str, blame: Blame, steps: Sequence[Step] = STEPS) -> int:
    """Run the steps for a commit, print a table of what each took, and return the exit status."""
    rows: list[Row] = []
    for step in (step for step in steps if step.ci):
        command = command_of(step, commit)
        print(f"\n== {step.name}: {command}", flush=True)
        ran = runner.run(command)
        rows.append(Row(step.name, "failed" if ran.status else "ok", ran.seconds, step.ci_minutes))
        if ran.status:
            print(f"\n{step.name} failed; to repeat it: {command}", flush=True)
            if step.changes_with_the_commit:
                print(blame(runner, step, command), flush=True)
            break
    print(f"\n{table.text(rows)}", flush=True)
    return int(any(row.outcome == "failed" for row in rows))
