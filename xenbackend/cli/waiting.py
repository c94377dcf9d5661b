"""Gives an order to the service, and shows on a terminal how long it takes.

Must not import rich without a terminal, nor for an order that is done at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from xenbackend.client import Client
from xenbackend.disks import parse_disk
from xenbackend.protocol.client import Waiting

PATIENCE_S = 0.5  # an order that takes no longer needs no picture
SEEN_S = 1.0  # between two looks at what an order waits for

Look = Callable[[], str]
_T = TypeVar("_T")


def order(args: argparse.Namespace, give: Callable[[Client], _T], look: Look | None = None) -> _T:
    """Give an order, as --socket and --timeout say; on a terminal `look` tells every second what it waits for.

    Raises: ConfigError, if the disk's name is not valid; ServiceError.
    """
    name = str(getattr(args, "vbd", ""))
    what = f"{parse_disk(name)}: {args.verb}" if name else str(args.verb)
    with shown(what, look) as waiting:
        return give(Client(args.socket, timeout_s=args.timeout, waiting=waiting))


@contextmanager
def shown(title: str, look: Look | None = None) -> Iterator[Waiting]:
    """Give a function to call with the seconds waited so far, which it shows on a terminal, on standard error."""
    picture: Any = None
    seen, look_at = "", 0.0

    def show(waited_s: float) -> None:
        nonlocal picture, seen, look_at
        if waited_s < PATIENCE_S or not sys.stderr.isatty():
            return
        if look is not None and waited_s >= look_at:
            seen, look_at = look(), waited_s + SEEN_S
        from rich.text import Text

        if picture is None:
            from rich.console import Console

            picture = Console(stderr=True, highlight=False).status("")
            picture.start()
        picture.update(Text(f"{title}: {waited_s:.0f} s{'; it waits for ' * bool(seen)}{seen}"))

    try:
        yield show
    finally:
        if picture is not None:
            picture.stop()
