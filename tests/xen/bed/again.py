"""Repeats tests that failed, to tell real faults from what a busy host does to an emulated machine.

Must not hide anything: a test that passes the second time is reported, with its first failure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.ci import flaky
from tests.xen.bed.report import Failure

PASSED, FAILED = 0, 1  # pytest's exit statuses
TRIES = 3  # of a test that did not get what it needs from the host; others have two
Boot = Callable[[Sequence[str], int], tuple[int, list[Failure]]]  # runs tests on a fresh machine, for the n-th time


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended: the exit status, the tests that failed every time, and sentences about those that did not."""

    status: int
    failures: Sequence[Failure]
    lines: Sequence[str] = ()


def repeat(failures: Sequence[Failure], boot: Boot, known: Mapping[str, str]) -> Outcome:
    """Run what failed again, and return the outcome.

    `known` says what was found out about tests that fail now and then.
    """
    status, lines = FAILED, []
    by_chance: dict[str, str] = {}
    for number in range(2, TRIES + 1):
        status, left = boot([each.test for each in failures], number)
        if status not in (PASSED, FAILED):
            return Outcome(status, failures, lines)
        for each in failures:
            if each.test in {failure.test for failure in left}:
                continue
            if each.is_the_hosts:
                given = f"the host gave {each.share:.0%} of the CPU time, {each.needs:.0%} are needed"
                lines.append(f"repeated, as {given}: {each.test}: {each.reason}")
            else:
                by_chance[each.test] = each.reason
        failures = left
        if not failures or not all(each.is_the_hosts for each in failures):
            break
    may_pass, more = flaky.judge(by_chance, known)
    return Outcome(status or (PASSED if may_pass else FAILED), failures, [*lines, *more])
