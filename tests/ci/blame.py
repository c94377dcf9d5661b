"""Finds out whether a failure in a share of a long suite is the commit's own, or its parent has it as well.

Must not excuse anything: a failure that the parent has, too, must be mended all the same, before or with the change.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from tests.ci.runner import Runner
from tests.ci.steps import Step

PLACE = Path("build/parent")


def on_parent(runner: Runner, step: Step, command: str) -> str:
    """Run on the parent commit what failed, once, and return a sentence about how that ended."""
    parent = _git("rev-parse", "--verify", "--quiet", "HEAD^")
    if not parent:
        return "whether the parent commit has it too cannot be told: this clone does not have it"
    print(f"\n== {step.name}, on the parent commit {parent[:10]}", flush=True)
    _remove()
    _git("worktree", "add", "--quiet", "--detach", str(PLACE), parent)
    try:
        failed = step.failures()
        there = {test: reason for test, reason in failed.items() if _has(test)}
        if failed and not there:
            return f"it is this commit's: {parent[:10]}, its parent, does not have what failed"
        ran = runner.run(_again(step, command, there), directory=PLACE)
    finally:
        _remove()
    if ran.status:
        return f"it is not (only) this commit's: {parent[:10]}, its parent, fails there as well"
    return f"it is this commit's: {parent[:10]}, its parent, passes there"


def _has(test: str) -> bool:
    """Return whether the parent has a test: a new one would fail there for another reason."""
    file, _, name = test.partition("::")
    return (PLACE / file).is_file() and f"def {name.partition('[')[0]}(" in (PLACE / file).read_text()


def _again(step: Step, command: str, failed: dict[str, object]) -> str:
    """Return the command that runs only what failed."""
    if not failed:
        return command
    target = PLACE / step.failed
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(failed))
    return f"{command} FAILED=1"


def _remove() -> None:
    shutil.rmtree(PLACE, ignore_errors=True)
    _git("worktree", "prune")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=False, capture_output=True, text=True).stdout.strip()
