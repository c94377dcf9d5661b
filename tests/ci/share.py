"""Which share of the long suites a commit runs: a number derived from its hash, so that all shares have their turn.

Must not depend on anything else: the same commit has the same share everywhere, even in a clone without history.
"""

from __future__ import annotations

import hashlib

from tests.ci.steps import Step

_SEEDS = 1_000_000


def number(commit: str, what: str, count: int) -> int:
    """Return a number from 0 to `count` - 1, independent for each `what`."""
    return int.from_bytes(hashlib.sha256(f"{commit} {what}".encode()).digest()[:8]) % count


def command_of(step: Step, commit: str) -> str:
    """Return the command that CI runs for a commit."""
    return fill(step.ci, step, commit)


def fill(command: str, step: Step, commit: str) -> str:
    """Put a commit's numbers into a command of a step."""
    part = f"{1 + number(commit, step.name, step.parts)}/{step.parts}"
    return command.format(seed=1 + number(commit, step.name, _SEEDS), part=part)
