"""A progress bar for long work, and Ctrl-C that stops the work only between two steps.

Must not do the work that it shows.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Progress = Callable[[int, int], None]  # bytes done and bytes in all

_PAUSE_S = 0.1  # between two pictures


@contextmanager
def watched(title: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Give a function to call between two steps, which raises KeyboardInterrupt if the operator wants to stop.

    The bar is shown on a terminal only, and on standard error. A second Ctrl-C does not wait for the step.
    """
    with _deferred_signals() as is_wanted:
        if quiet or not sys.stderr.isatty():
            yield lambda _done, _total: _stop_if(is_wanted())
            return
        with _bar(title) as show:

            def progress(done: int, total: int) -> None:
                show(done, total)
                _stop_if(is_wanted())

            yield progress


@contextmanager
def _deferred_signals() -> Iterator[Callable[[], bool]]:
    asked = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True))
    more = (TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, *more, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task(title, total=None)
        shown = 0.0

        def show(done: int, total: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= _PAUSE_S or done == total:
                shown = now
                bar.update(task, completed=done, total=total, refresh=True)

        yield show


def _stop_if(is_wanted: bool) -> None:  # noqa: FBT001 - the name says it
    if is_wanted:
        raise KeyboardInterrupt
