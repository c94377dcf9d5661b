"""Backend processes: starting, pinning to one CPU, reading what CPU time they used, ending.

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
_END = 5.0  # seconds until a server that was asked to end is killed
_CPUCLOCK_SCHED = 2  # linux/posix-timers.h; with the complement of a pid it makes the clock of that process
T = TypeVar("T")


class Server:
    """One running backend; what it says goes to `log`. Raises: BenchError when the program is not installed."""

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, *, cpu: int | None, keep: Sequence[int] = ()
    ) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            try:
                # Its own process group: Ctrl-C at the terminal is ours to handle, and ends it in order.
                self._process = subprocess.Popen(
                    arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=keep, process_group=0
                )
            except FileNotFoundError:
                raise BenchError(f"{name}: the program {arguments[0]} is not installed") from None
        self.pid = self._process.pid
        if cpu is not None:
            pin(self.pid, cpu)

    def connect(self, connect: Callable[[], T]) -> T:
        """Return what `connect` returns, called until it finds the server listening. Raises: BenchError."""
        deadline = time.monotonic() + _READY
        while True:
            try:
                return connect()
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise BenchError(f"{self.name} did not start: {self.last_words()}") from None
                time.sleep(0.01)

    def cpu_time(self) -> float:
        """Return the seconds of CPU that all its threads used so far, the kernel's workers for it included."""
        try:
            return time.clock_gettime(~self.pid << 3 | _CPUCLOCK_SCHED)
        except OSError:
            raise BenchError(f"{self.name} ended during the measurement: {self.last_words()}") from None

    def last_words(self) -> str:
        """Return the last line that it wrote."""
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def close(self) -> None:
        """End the process, by force when it does not heed, and wait for it."""
        self._process.terminate()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def pin(pid: int, cpu: int) -> None:
    """Bind every thread of a process to one CPU; threads that it makes later inherit that."""
    for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - names are wanted
        os.sched_setaffinity(int(thread), {cpu})


def choose_cpus() -> tuple[int, int] | None:
    """Return two CPUs on different cores, for the backend and for the load, or None where there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    backend = allowed[-1]
    siblings = Path(f"/sys/devices/system/cpu/cpu{backend}/topology/thread_siblings_list")
    same_core = _parse_list(siblings.read_text()) if siblings.exists() else {backend}
    others = [cpu for cpu in allowed if cpu not in same_core] or allowed[:-1]
    return (backend, others[-1]) if others else None


def _parse_list(text: str) -> set[int]:
    """Return the numbers in a kernel's list such as ``0-3,8``."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
