"""Looks that run side by side, some of which hang."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

from tests.until import until
from xenbackend.doctor import probes
from xenbackend.doctor.finding import Verdict, ok
from xenbackend.doctor.probes import Probe, Result
from xenbackend.kernel.process import state_of

LIMITS_S = (0.3, 3.0, 60.0)  # a host that is too busy for one of them gets the next


def looks_well(name: str) -> Result:
    """Return a finding that all is well."""
    return Result([ok(name, "well")], {"name": name})


def hangs() -> Result:
    """Wait forever, ignoring SIGTERM and SIGINT."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    while True:
        signal.pause()


def says_much() -> Result:
    """Return more findings than fit into a pipe."""
    return Result([ok("much", "x" * 1000) for _ in range(300)])


def fails() -> Result:
    """Raise an exception, as a bug would."""
    raise ValueError("of no use")


def test_each_look_brings_its_findings_in_the_order_in_which_it_was_wanted() -> None:
    """Findings come back complete, however many, in the order asked for, each with the time that it took."""
    wanted = [Probe("a", "this", partial(looks_well, "a")), Probe("m", "much", says_much),
              Probe("b", "that", partial(looks_well, "b"))]  # fmt: skip
    first, much, last = probes.run(wanted)

    assert ({"name": "a"}, {"name": "b"}) == (first.data, last.data)
    assert ["well"] == [each.sentence for each in first.findings]
    assert 300 == len(much.findings)
    assert all(0 <= each.took_s < probes.LIMIT_S for each in first.findings)


def children() -> set[str]:
    """Return our child processes, including those that have ended and were not waited for."""
    return set(Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text().split())


def test_one_that_hangs_hides_no_other() -> None:
    """A look that hangs is reported as unknown after its limit, and killed; one with a bug is reported as unknown."""
    wanted = [Probe("stuck", "the storage of /img", hangs, "5/xvda"), Probe("bug", "it", fails),
              Probe("a", "this", partial(looks_well, "a"))]  # fmt: skip
    before = children()
    for limit_s in LIMITS_S:
        begun = time.monotonic()
        stuck, bug, fine = probes.run(wanted, limit_s=limit_s)
        took_s = time.monotonic() - begun
        if Verdict.OK is fine.findings[0].verdict and "ValueError" in bug.findings[0].sentence:
            break

    assert took_s < limit_s + 30  # far above the limit, as the host may be loaded
    [finding] = stuck.findings
    assert (Verdict.UNKNOWN, "stuck", "5/xvda") == (finding.verdict, finding.check, finding.disk)
    assert re.fullmatch(r"the storage of /img did not answer within \d+\.\d s", finding.sentence)
    assert "could not be examined: ValueError: of no use" in bug.findings[0].sentence
    assert Verdict.OK is fine.findings[0].verdict
    assert before == children()


def starts(path: str) -> Result:
    """Run a program that waits forever, and write down its number."""
    subprocess.run(["sh", "-c", f"echo $$ > {path}.new; mv {path}.new {path}; exec sleep 1000"], check=False)
    return Result()


def test_what_a_look_has_started_ends_with_it(tmp_path: Path) -> None:
    """A program that a look has started is killed with it."""
    path = tmp_path / "pid"
    for limit_s in LIMITS_S:
        [result] = probes.run([Probe("tool", "it", partial(starts, str(path)))], limit_s=limit_s)
        if path.exists():
            break
    pid = int(path.read_text())

    assert Verdict.UNKNOWN is result.findings[0].verdict
    until(lambda: state_of(pid) in ("", "Z"))


def test_all_together_have_a_limit() -> None:
    """All looks together have a limit; those that had not begun by then are reported too."""
    wanted = [Probe("stuck", f"number {number}", hangs) for number in range(probes._AT_ONCE + 5)]
    begun = time.monotonic()
    results = probes.run(wanted, limit_s=600, all_s=0.5)

    assert time.monotonic() - begun < 300  # far below the limit of each
    assert {Verdict.UNKNOWN} == {each.verdict for result in results for each in result.findings}
    assert "was not examined: all checks together took 0.5 s" in results[-1].findings[0].sentence
