"""Busy loops beside the measured targets, to see how much CPU time a worker takes from them by polling for requests.

Must not outlive the bench, however it ends: a loop checks from time to time whether its parent still exists.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from xenbackend.bench.server import Server
from xenbackend.errors import ConfigError

NICE = {"nice19": 19, "equal": None}  # the nice value of the loops; None: the same as ours
_PROGRAM = """
import os, sys
parent, *nice = map(int, sys.argv[1:])
if nice:
    os.setpriority(os.PRIO_PROCESS, 0, *nice)
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


class Loops:
    """A busy loop on each CPU that we may use, in our own session. Raises: ConfigError, BenchError."""

    def __init__(self, kind: str, directory: Path) -> None:
        """Start them. `kind` is a key of `NICE`; `directory` is for their logs."""
        self._undo = ExitStack()
        self._loops: list[Server] = []
        nice = NICE[kind]
        if nice is not None and os.getpriority(os.PRIO_PROCESS, 0) >= nice:
            raise ConfigError(f"loops at nice {nice} have no effect: the bench itself runs at nice {nice} or more")
        arguments = [sys.executable, "-S", "-c", _PROGRAM, str(os.getpid()), *([] if nice is None else [str(nice)])]
        try:
            for cpu in sorted(os.sched_getaffinity(0)):
                loop = Server(f"loop on CPU {cpu}", arguments, directory / f"loop-{cpu}.log", cpu=cpu)
                self._loops.append(loop)
                self._undo.callback(loop.close)
        except BaseException:
            self._undo.close()
            raise

    def cpu_time(self) -> float:
        """Return the CPU time in seconds that all loops have got so far. Raises: BenchError if one has ended."""
        return sum(loop.cpu_time() for loop in self._loops)

    def close(self) -> None:
        """End them."""
        self._undo.close()
