"""What the host gives an emulated machine: how long its CPUs ran, and how long they had to wait for one of the host's.

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
    """What a machine was given since it was started.

    Attributes:
        own_s: the time that passed for it: it had something to do and was let, or had nothing to do. While it waits for
            the host's CPUs none passes, however busy the neighbours are.
        ran_s: its threads' time on a CPU.
        waited_s: their time waiting for one.
    """

    own_s: float = 0.0
    ran_s: float = 0.0
    waited_s: float = 0.0

    def share_since(self, before: Given) -> float:
        """Return which part of the time that it wanted a CPU it had one; 1.0 where it wanted none."""
        ran, waited = self.ran_s - before.ran_s, self.waited_s - before.waited_s
        return ran / (ran + waited) if ran + waited > 0 else 1.0


class Watch:
    """Looks at a process again and again, at least every few seconds."""

    def __init__(self, pid: int) -> None:
        self._threads = Path(f"/proc/{pid}/task")
        self._before: dict[str, tuple[float, float]] = {}
        self._at = time.monotonic()
        self._given = Given()

    def look(self) -> Given:
        """Return what it was given until now."""
        now, threads, given = time.monotonic(), dict(self._look()), self._given
        steps = [
            (ran - self._before.get(thread, (0.0, 0.0))[0], waited - self._before.get(thread, (0.0, 0.0))[1])
            for thread, (ran, waited) in threads.items()
        ]
        # Of all its threads the one that had to wait longest tells how much of this time was none for it.
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
