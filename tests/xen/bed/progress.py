"""A pytest plugin for dom0: reports each test's beginning and end as a line of JSON on the serial port.

Must not judge, nor keep anything: the host's `report.py` reads it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

CHANNEL = Path("/dev/ttyS1")
NEEDS = "needs_host"
NEEDED = 0.5  # share of the CPU time that the machine wants: libxl's 10 s are at least twice what it takes here
_MAX_TEXT = 20_000  # characters of a failure; the rest is in the results


class Progress:
    """Writes the lines."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._worst: dict[str, pytest.TestReport] = {}  # by running test: the report of its worst phase
        self._seconds = 0.0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Report how many tests there are."""
        self._tell(event="collected", count=len(session.items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Report a file that cannot be collected."""
        if report.failed:
            self._tell_end(report.nodeid, report, 0.0)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Report which test begins."""
        self._seconds = 0.0
        self._tell(event="start", test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a phase ended."""
        self._seconds += report.duration
        former = self._worst.get(report.nodeid)
        if former is None or (report.outcome != "passed" and not former.failed):
            self._worst[report.nodeid] = report

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Report how a test ended."""
        report = self._worst.pop(nodeid)
        self._tell_end(nodeid, report, self._seconds)

    def _tell_end(self, test: str, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        text = _text(report)
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (crash.message if crash else text.strip()).partition("\n")[0]
        needs = dict(getattr(report, "user_properties", [])).get(NEEDS, NEEDED)
        shown = {"seconds": round(seconds, 1), "text": text, "reason": reason, "needs": needs}
        self._tell(event="end", test=test, outcome=report.outcome, **shown)

    def _tell(self, **event: Any) -> None:
        os.write(self._fd, json.dumps(event).encode() + b"\n")


def pytest_configure(config: pytest.Config) -> None:
    """Open the port."""
    config.pluginmanager.register(Progress(os.open(CHANNEL, os.O_WRONLY | os.O_NOCTTY)))


def _text(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the report of a test that did not pass, with the logs that were added to it."""
    if report.skipped:
        return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not report.failed:
        return ""
    sections = "".join(f"\n--- {title} ---\n{text}" for title, text in report.sections)
    return (report.longreprtext + sections)[:_MAX_TEXT]
