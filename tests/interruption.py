"""What a long run does when somebody ends it: once, in order, and with a sentence instead of a traceback."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit status, as shells have it


@contextmanager
def heard_once() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first SIGINT, and ignore those that follow, until what is within has ended.

    A terminal sends one, and `tests.ci.contained` another, while what was begun is being ended.
    """

    def interrupt(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
