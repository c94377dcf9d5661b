"""Starts and ends backend processes, pins them to a CPU, and reads the CPU time that they have used.

Must not know which program it starts.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from xenbackend.bench.plan import BenchError

_READY = 10.0  # seconds until a server must answer
_END = 5.0  # seconds after which a server that was asked to end is killed
_CPUCLOCK_SCHED = 2  # linux/posix-timers.h; with the complement of a pid it makes the clock of that process
T = TypeVar("T")


class Server:
    """One running backend; its output goes to `log`. Raises: BenchError if the program is not installed."""

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, *, cpu: int | None, keep: Sequence[int] = ()
    ) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            try:
                # A process group of its own, so that Ctrl-C at the terminal reaches only us, and we end it in order.
                self._process = subprocess.Popen(
                    arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=keep, process_group=0
                )
            except FileNotFoundError:
                raise BenchError(f"{name}: the program {arguments[0]} is not installed") from None
        self.pid = self._process.pid
        if cpu is not None:
            pin(self.pid, cpu)

    def connect(self, connect: Callable[[], T]) -> T:
        """Call `connect` until the server listens, and return its result. Raises: BenchError."""
        deadline = time.monotonic() + _READY
        while True:
            try:
                return connect()
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise BenchError(f"{self.name} did not start: {self.last_words()}") from None
                time.sleep(0.01)

    def cpu_time(self) -> float:
        """Return the CPU time in seconds of all its threads so far, including the kernel's workers for it.

        Raises: BenchError if the process has ended.
        """
        try:
            return time.clock_gettime(~self.pid << 3 | _CPUCLOCK_SCHED)
        except OSError:
            raise BenchError(f"{self.name} ended during the measurement: {self.last_words()}") from None

    def last_words(self) -> str:
        """Return the last line that it has written."""
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def close(self) -> None:
        """End the process, by force if it does not end in time, and wait for it."""
        self._process.terminate()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def pin(pid: int, cpu: int) -> None:
    """Pin all threads of a process to one CPU; threads that they start later inherit this."""
    for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - only names are needed
        os.sched_setaffinity(int(thread), {cpu})


def choose_cpus() -> tuple[int, int] | None:
    """Return two CPUs, on different cores if possible, for backend and load generator; None if there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    backend = allowed[-1]
    siblings = Path(f"/sys/devices/system/cpu/cpu{backend}/topology/thread_siblings_list")
    same_core = _parse_list(siblings.read_text()) if siblings.exists() else {backend}
    others = [cpu for cpu in allowed if cpu not in same_core] or allowed[:-1]
    return (backend, others[-1]) if others else None


def _parse_list(text: str) -> set[int]:
    """Return the numbers in a list such as ``0-3,8``, as the kernel writes it."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
