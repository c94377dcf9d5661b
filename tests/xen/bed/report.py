"""Shows on the host what happens in dom0: a line per test when it ends, and which one is running meanwhile.

Must not decide what counts as success: `status` is what dom0 said, None where it said nothing.
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
        reason: the first line of what it said.
        share: which part of the CPU time that the machine wanted meanwhile the host gave it.
        needs: which part of it the test needs, as time-outs that are not ours pass in real time.
    """

    test: str
    reason: str
    share: float
    needs: float

    @property
    def is_the_hosts(self) -> bool:
        """Whether it says nothing: the test had not what it needs."""
        return self.share < self.needs


class Report:
    """Takes the lines of the serial port, one after the other."""

    def __init__(self, console: Console, spinner: Status, label: str = "") -> None:
        """Begin; `spinner` shows what is running, and `label` tells one machine's lines from another's."""
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
        """Show an event; what is none is shown as it is. `given` is what the machine had of the host until then."""
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
