"""Running programs in dom0, with the time they took, and waiting for what they bring about.

Must not wait without an end: whatever does not come fails with a sentence that says what was waited for.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.1
TIMEOUT_S = 120.0  # everything is 20 to 50 times slower here than on a real machine


@dataclass(frozen=True, slots=True)
class Result:
    """How a program ended."""

    out: str
    err: str
    status: int
    seconds: float


class Failed(AssertionError):
    """A program failed that should not have."""


def run(*command: object, check: bool = True, timeout_s: float = TIMEOUT_S, text: str = "") -> Result:
    """Run a program to its end with `text` as its input. Raises: Failed, when `check` and its status is not 0."""
    words = [str(word) for word in command]
    began = time.monotonic()
    done = subprocess.run(
        words, input=text, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
    )
    result = Result(done.stdout, done.stderr, done.returncode, time.monotonic() - began)
    if check and result.status:
        raise Failed(f"{' '.join(words)} ended with {result.status}\n{result.out}{result.err}")
    return result


def xl(*arguments: object, check: bool = True, timeout_s: float = TIMEOUT_S) -> Result:
    """Run xl."""
    return run("xl", *arguments, check=check, timeout_s=timeout_s)


def xenbackend(*arguments: object, check: bool = True, timeout_s: float = TIMEOUT_S) -> Result:
    """Run our own command as the operator does."""
    return run("xenbackend", *arguments, check=check, timeout_s=timeout_s)


def until(what: str, look: Callable[[], T], timeout_s: float = TIMEOUT_S) -> T:
    """Look again and again until there is something, and return it. Raises: Failed, naming `what` did not happen."""
    end = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (found := look()):
        if time.monotonic() > end:
            raise Failed(f"this did not happen within {timeout_s:g} s: {what}")
        pause.wait(POLL_S)
    return found
