"""What decides whether a change lands: each step in small, up to the first that fails.

If one test of thousands fails, and passes when it is run once more, the change may still land: the test is reported,
and belongs into `tests/flaky.toml`. Must not forgive two in a run, nor know how a failure is investigated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.ci import flaky, table
from tests.ci.runner import Runner
from tests.ci.share import command_of
from tests.ci.steps import STEPS, Step
from tests.ci.table import Row

Blame = Callable[[Runner, Step, str], str]  # returns a sentence: whether the parent commit has a step's failure, too


def run(runner: Runner, commit: str, blame: Blame, steps: Sequence[Step] = STEPS) -> int:
    """Run the steps for a commit, print a table of what each took, and return the exit status."""
    rows: list[Row] = []
    by_chance: dict[str, str] = {}  # the tests that passed the second time, and the step of each
    for step in (step for step in steps if step.ci):
        command = command_of(step, commit)
        print(f"\n== {step.name}: {command}", flush=True)
        if step.failed:
            Path(step.failed).unlink(missing_ok=True)  # of an earlier run
        ran = runner.run(command)
        seconds, has_failed, remark = ran.seconds, bool(ran.status), ""
        failures = step.failures() if has_failed and not step.repeats else {}
        if 0 < len(failures) <= flaky.MOST - len(by_chance):
            print(f"\n== {step.name}, once more what has failed: {', '.join(failures)}", flush=True)
            ran = runner.run(f"{command} FAILED=1")
            seconds += ran.seconds
            has_failed = bool(ran.status)
            if not has_failed:
                by_chance |= dict.fromkeys(failures, step.name)
                remark = "the second time"
        rows.append(Row(step.name, "failed" if has_failed else "ok", seconds, step.ci_minutes, remark))
        if has_failed:
            print(f"\n{step.name} failed; to repeat it: {command}", flush=True)
            if step.changes_with_the_commit:
                print(blame(runner, step, command), flush=True)
            break
    print(f"\n{table.text(rows)}", flush=True)
    for line in flaky.judge(by_chance, flaky.known())[1]:
        print(line, flush=True)
    return int(any(row.outcome == "failed" for row in rows))
