"""Running programs in dom0, with the time they waited, and waiting for what they bring about.

Must not wait without an end: whatever does not come fails with a sentence that says what was waited for.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.xen.tools import idle
from tests.xen.tools.idle import Patience

T = TypeVar("T")
POLL_S = 0.1
_TICKS = os.sysconf("SC_CLK_TCK")
LIBXL_TIMEOUT_S = 10.0  # the shortest that libxl has, in real time
xl_has_waited: list[str] = []  # command lines of xl that waited for one of them; a test says whether it may
driver_domains: set[str] = set()  # that run: while dom0 has nothing to do one of them may be at work for it
TIMEOUT_S = 60.0  # of a machine that has nothing to do, like every time-out here (`idle`)


@dataclass(frozen=True, slots=True)
class Result:
    """How a program ended."""

    out: str
    err: str
    status: int
    idle_s: float  # meanwhile, of that CPU of dom0 which had most to do; of the machine, beside a driver domain

    @property
    def has_waited(self) -> bool:
        """Whether it waited for one of libxl's time-outs: on a slow machine only the CPUs tell that from work."""
        return self.idle_s > 0.8 * LIBXL_TIMEOUT_S  # others have something to do now and then


class Failed(AssertionError):
    """A program failed that should not have."""


def run(*command: object, check: bool = True, text: str = "") -> Result:
    """Run a program to its end with `text` as its input. Raises: Failed, when `check` and its status is not 0."""
    words = [str(word) for word in command]
    look = idle.idle_s if driver_domains else _idle_s
    before = look()
    out, err, status = _communicate(words, text)
    idle_s = min(after - former for former, after in zip(before, look(), strict=True))
    result = Result(out, err, status, idle_s)
    if check and result.status:
        raise Failed(f"{' '.join(words)} ended with {result.status}\n{result.out}{result.err}")
    return result


def _communicate(words: list[str], text: str) -> tuple[str, str, int]:
    """Return what a program said and its status. Raises: Failed, when it does not end though nobody is at work."""
    patience, rest = Patience(), text or None
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace") as program:
        while True:
            try:
                out, err = program.communicate(rest, timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                rest = None  # it goes on with what it has begun to send
                if patience.spent_s() > TIMEOUT_S:
                    program.kill()
                    raise Failed(f"{' '.join(words)} did not end; the machine was idle for {TIMEOUT_S:g} s") from None
            else:
                return out, err, program.returncode


def _idle_s() -> list[float]:
    """Return how long each CPU has had nothing to do since the machine was booted. Source: proc(5), /proc/stat."""
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    return [sum(map(int, words[4:6])) / _TICKS for words in lines if re.fullmatch(r"cpu\d+", words[0])]


def xl(*arguments: object, check: bool = True) -> Result:
    """Run xl, and note it where it waits for one of libxl's time-outs."""
    result = run("xl", *arguments, check=False)
    words = " ".join(map(str, ("xl", *arguments)))
    if result.has_waited:
        xl_has_waited.append(f"{words}, for {result.idle_s:.0f} s")
    if check and result.status:
        raise Failed(f"{words} ended with {result.status}\n{result.out}{result.err}")
    return result


def xenbackend(*arguments: object, check: bool = True) -> Result:
    """Run our own command as the operator does."""
    return run("xenbackend", *arguments, check=check)


def until(what: str, look: Callable[[], T], timeout_s: float = TIMEOUT_S) -> T:
    """Look again and again until there is something, and return it. Raises: Failed, naming `what` did not happen."""
    patience, pause = Patience(), threading.Event()
    while not (found := look()):
        if patience.spent_s() > timeout_s:
            raise Failed(f"this did not happen though the machine was idle for {timeout_s:g} s: {what}")
        pause.wait(POLL_S)
    return found
