"""Shows on the host what happens in dom0: a line for each test that ends, and which test is running.

Must not decide what counts as success: `status` is dom0's own, None if it sent none.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from tests.xen.bed.share import Given

_MARKS = {"passed": "[green]ok[/]  ", "failed": "[red]FAIL[/]", "skipped": "[yellow]skip[/]"}


@dataclass(frozen=True, slots=True)
class Failure:
    """A test that failed.

    Attributes:
        test: its name, as pytest takes it.
        reason: the first line of its error.
        share: the part of the CPU time that the machine wanted during the test which the host gave.
        needs: the part that the test needs, as time-outs that are not ours pass in real time.
    """

    test: str
    reason: str
    share: float
    needs: float

    @property
    def is_the_hosts(self) -> bool:
        """Whether the failure means nothing: the test did not get what it needs from the host."""
        return self.share < self.needs


class Report:
    """Takes the lines of the serial port, one after the other."""

    def __init__(self, console: Console, spinner: Status, label: str = "") -> None:
        """Begin; `spinner` shows what is running, and `label` distinguishes the lines of machines."""
        self.status: int | None = None
        self.running = ""  # the test that has begun and not ended
        self.failures: list[Failure] = []
        self._console = console
        self._spinner = spinner
        self._label = label
        self._began = time.monotonic()
        self._count = self._done = 0
        self._before = Given()  # the test that is running began

    def step(self, text: str) -> None:
        """Show what is going on now, with the time since the start."""
        passed = f"{time.monotonic() - self._began:5.0f} s"
        self._console.print(f"[dim]{self._label}{passed}  {escape(text)}[/]", highlight=False, soft_wrap=True)
        self._spinner.update(escape(text))

    def take(self, line: str, given: Given) -> None:
        """Show an event; other lines are shown as they are. `given`: what the host has given the machine so far."""
        try:
            event = json.loads(line)
        except ValueError:
            self._console.print(line.rstrip(), markup=False, highlight=False)
            return
        match event:
            case {"event": "step", "text": str(text)}:
                self.step(text)
            case {"event": "collected", "count": int(count)}:
                self._count = count
                self.step(f"{count} tests")
            case {"event": "start", "test": str(test)}:
                self.running, self._before = test, given
                self._spinner.update(f"{self._done}/{self._count}  {escape(test)}")
            case {"event": "end"}:
                self._end(event, given)
            case {"event": "exit", "status": int(status)}:
                self.status = status
                self.step("switching off")

    def _end(self, event: dict[str, Any], given: Given) -> None:
        self.running = ""
        self._done += 1
        text, outcome = event["text"], event["outcome"]
        line = f"{self._label}{_MARKS[outcome]} {event['seconds']:6.1f} s  {escape(event['test'])}"
        reason = f"  [dim]{escape(text)}[/]" if outcome == "skipped" else ""
        self._console.print(line + reason, highlight=False, soft_wrap=True)
        if outcome == "failed":
            failure = Failure(event["test"], event["reason"], given.share_since(self._before), event["needs"])
            self.failures.append(failure)
            self._console.print(f"the host gave {failure.share:.0%} of the CPU time; {failure.needs:.0%} are needed")
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
