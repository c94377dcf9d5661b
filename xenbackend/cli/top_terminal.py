"""The terminal of `xenbackend top`: keys without echo, the alternate screen, and everything restored at the end.

Must not know what is shown, nor what a key means.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from xenbackend.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_ESCAPES = {
    "\x1b[A": "up", "\x1b[B": "down", "\x1bOA": "up", "\x1bOB": "down", "\x1b[5~": "page up", "\x1b[6~": "page down",
    "\x1b[H": "home", "\x1b[F": "end", "\x7f": "backspace", "\x08": "backspace", "\r": "enter", "\n": "enter",
    "\x1b": "escape",
}  # fmt: skip
_LONGEST = max(map(len, _ESCAPES))


def check() -> None:
    """Check that the terminal can be drawn on. Raises: ConfigError."""
    kind = os.environ.get("TERM", "")
    if kind in ("", "dumb", "unknown"):
        raise ConfigError(f"TERM is {kind or 'not set'}: nothing can be drawn there; use --once, or --count N")


class Terminal:
    """A terminal that is ours within this context. Raises, at Ctrl-C or a signal: KeyboardInterrupt, SystemExit."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._fd = sys.stdin.fileno() if sys.stdin.isatty() else -1  # without one there are no keys, but a picture
        self._usual: Any = None
        self._signals, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # a byte for each signal wakes select(2)

    def __enter__(self) -> Self:
        self._former = {
            number: signal.signal(number, handler)
            for number, handler in (
                (signal.SIGTERM, _end), (signal.SIGHUP, _end), (signal.SIGTSTP, self._suspend),
                (signal.SIGWINCH, _nothing),
            )
        }  # fmt: skip
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()
        signal.set_wakeup_fd(-1)
        for number, handler in self._former.items():
            signal.signal(number, handler)
        os.close(self._signals)
        os.close(self._wake)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines at present."""
        return self._console.size.width, self._console.size.height

    def draw(self, lines: Sequence[Text]) -> None:
        """Show these lines from the top; there are as many as the terminal has."""
        from rich.console import Group

        self._console.update_screen(Group(*lines))

    def wait(self, seconds: float) -> list[str]:
        """Wait for keys, a signal, or the end of this time; return the keys, by name or character."""
        fds = [self._signals, *([self._fd] if self._fd >= 0 else [])]
        ready, _, _ = select.select(fds, [], [], max(0.0, seconds))
        if self._signals in ready:
            os.read(self._signals, 1024)
        if self._fd not in ready:
            return []
        text = os.read(self._fd, 1024).decode(errors="replace")
        if not text:  # the terminal has gone
            raise SystemExit(128 + signal.SIGHUP)
        return split(text)

    def _take(self) -> None:
        if self._fd >= 0:
            self._usual = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd, termios.TCSADRAIN)
        self._console.set_alt_screen(True)
        self._console.show_cursor(False)

    def _give_back(self) -> None:
        self._console.show_cursor(True)
        self._console.set_alt_screen(False)
        if self._usual is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._usual)

    def _suspend(self, _number: int, _frame: FrameType | None) -> None:
        """Give the terminal back to the shell as it was, until we are continued."""
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()


def split(text: str) -> list[str]:
    """Return what was typed as single keys; escape sequences of keys that we do not know are dropped."""
    keys = []
    place = 0
    while place < len(text):
        found = next(
            (text[place : place + size] for size in range(_LONGEST, 0, -1) if text[place : place + size] in _ESCAPES),
            "",
        )
        if found == "\x1b" and text[place + 1 : place + 2] in ("[", "O"):  # a key that we do not know
            end = place + 2
            while end < len(text) and not text[end].isalpha() and text[end] != "~":
                end += 1
            place = end + 1
            continue
        keys.append(_ESCAPES[found] if found else text[place])
        place += len(found) or 1
    return keys


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the signal has woken `wait`."""


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
