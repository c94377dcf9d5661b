"""Runs one shell command after another, and ends a command when it is itself told to end.

Must not know what a command is for.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended: its exit status and how many seconds it took."""

    status: int
    seconds: float


class Interrupted(KeyboardInterrupt):
    """A signal ended a command."""


class Runner:
    """Runs commands; their output goes where ours goes."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._is_interrupted = False
        for number in _SIGNALS:
            signal.signal(number, self._interrupt)

    def _interrupt(self, _number: int, _frame: object) -> None:
        """Pass a signal on as SIGTERM, which make passes on to its commands; they tidy up, and are waited for."""
        self._is_interrupted = True
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    def run(self, command: str, *, directory: Path | None = None) -> Ran:
        """Run a shell command to its end. Raises: Interrupted."""
        began = time.monotonic()
        sys.stdout.flush()
        self._child = subprocess.Popen(["bash", "-c", f"set -o pipefail; {command}"], cwd=directory)
        status = self._child.wait()
        self._child = None
        if self._is_interrupted:
            raise Interrupted
        return Ran(status, time.monotonic() - began)
