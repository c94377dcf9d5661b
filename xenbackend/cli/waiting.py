"""Gives an order to the service and lets the operator see on a terminal that it takes its time.

Must not import rich where nobody looks, nor for an order that is done at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xenbackend.disks import parse_disk
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.client import Waiting, give_order

_PATIENCE_S = 0.5  # an order that takes no longer needs no picture


def order(args: argparse.Namespace, request: dict[str, Any]) -> Answer:
    """Give an order, as --socket and --timeout say. Raises: ConfigError for a disk that cannot be; ServiceError."""
    what = f"{parse_disk(request['vbd'])}: {args.verb}" if "vbd" in request else str(args.verb)
    with shown(what) as waiting:
        return give_order(args.socket, request, what, args.timeout, waiting)


@contextmanager
def shown(title: str) -> Iterator[Waiting]:
    """Give what to call with the seconds that were waited; they are shown on a terminal, on standard error."""
    picture: Any = None

    def show(waited_s: float) -> None:
        nonlocal picture
        if waited_s < _PATIENCE_S or not sys.stderr.isatty():
            return
        if picture is None:
            from rich.console import Console

            picture = Console(stderr=True, highlight=False).status("")
            picture.start()
        picture.update(f"{title}: {waited_s:.0f} s")

    try:
        yield show
    finally:
        if picture is not None:
            picture.stop()
