"""The CPU time that the host gives an emulated machine: how long its threads ran, and how long they waited for a CPU.

Must not judge. Source: Linux Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat: ns on a CPU, ns waiting.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Given:
    """The CPU time that a machine has got since it was started.

    Attributes:
        own_s: the machine's own time, which passes while it runs or has nothing to do, and stops while it waits for the
            host's CPUs, however busy its neighbours are.
        ran_s: time of its threads on a CPU.
        waited_s: time of its threads waiting for one.
    """

    own_s: float = 0.0
    ran_s: float = 0.0
    waited_s: float = 0.0

    def share_since(self, before: Given) -> float:
        """Return in which part of the time that it wanted a CPU it had one; 1.0 if it wanted none."""
        ran, waited = self.ran_s - before.ran_s, self.waited_s - before.waited_s
        return ran / (ran + waited) if ran + waited > 0 else 1.0


class Watch:
    """Adds up the times of a process; look at it at least every few seconds."""

    def __init__(self, pid: int) -> None:
        self._threads = Path(f"/proc/{pid}/task")
        self._before: dict[str, tuple[float, float]] = {}
        self._at = time.monotonic()
        self._given = Given()

    def look(self) -> Given:
        """Return what the process has got so far."""
        now, threads, given = time.monotonic(), dict(self._look()), self._given
        steps = [
            (ran - self._before.get(thread, (0.0, 0.0))[0], waited - self._before.get(thread, (0.0, 0.0))[1])
            for thread, (ran, waited) in threads.items()
        ]
        # The thread that waited longest tells how much of this time did not pass for the machine.
        longest = max((waited for _, waited in steps), default=0.0)
        self._given = Given(
            given.own_s + max(0.0, now - self._at - longest),
            given.ran_s + sum(ran for ran, _ in steps),
            given.waited_s + sum(waited for _, waited in steps),
        )
        self._before, self._at = threads, now
        return self._given

    def _look(self) -> Iterator[tuple[str, tuple[float, float]]]:
        with suppress(OSError):  # it has ended
            for thread in self._threads.iterdir():
                with suppress(OSError):
                    ran, waited, _ = (thread / "schedstat").read_text().split()
                    yield thread.name, (int(ran) / 1e9, int(waited) / 1e9)
