"""Gives an order to the service, waits for its end, and lets the operator see on a terminal that it takes its time.

A service that ends meanwhile leaves its orders to the next one: whoever has set no --timeout waits for what that says.
Must not import rich where nobody looks, nor for an order that is done at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from xenbackend.disks import parse_disk
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.client import ServiceError, Waiting, call, give_order
from xenbackend.protocol.codes import Code

PATIENCE_S = 0.5  # an order that takes no longer needs no picture
SEEN_S = 1.0  # between two looks at what an order waits for
LOOK_S = 0.25  # between two looks for the end of an order that another service has taken over
RETURN_S = 30.0  # the longest that a service is away that somebody starts again

Look = Callable[[], str]
# Their answers hold nothing that would be lost.
FOLLOWED = ("set", "snapshot", "resize", "keep", "drop", "pause", "resume", "upgrade")


def order(args: argparse.Namespace, request: dict[str, Any], look: Look | None = None) -> Answer:
    """Give an order, as --socket and --timeout say; on a terminal `look` says every second what it waits for.

    Raises: ConfigError for a disk that cannot be; ServiceError.
    """
    what = f"{parse_disk(request['vbd'])}: {args.verb}" if "vbd" in request else str(args.verb)
    with shown(what, look) as waiting:
        try:
            return give_order(args.socket, request, what, args.timeout, waiting)
        except ServiceError as problem:
            is_followed = args.timeout is None and request["verb"] in FOLLOWED and not request.get("dry_run")
            if not is_followed or problem.answer.code is not Code.UNDER_WAY:
                raise
            return _follow(args.socket, request, problem, waiting)


def _follow(socket: str, request: dict[str, Any], problem: ServiceError, waiting: Waiting) -> Answer:
    """Return the answer to an order that the service has left to the next one.

    Raises: ServiceError, as that ended; `problem` where nobody knows of the order, or no service comes.
    """
    begun = time.monotonic()
    while True:
        try:
            entry = _entry(call(socket, {"verb": "orders"}).data, problem.answer.order, request["verb"])
            disks = call(socket, {"verb": "status"}).data
        except ServiceError as silence:
            is_away = silence.answer.code in (Code.UNREACHABLE, Code.GONE)
            if not is_away or time.monotonic() - begun >= RETURN_S:
                raise problem from None
        else:
            if entry is None:
                raise problem
            if entry["ended"] is not None:
                return _ended(entry, disks)
        time.sleep(LOOK_S)
        waiting(time.monotonic() - begun)


def _entry(entries: list[dict[str, Any]], number: int | None, verb: str) -> dict[str, Any] | None:
    """Return an order by its number, or the last one of this process: a service that was killed told no number."""
    ours = [
        each
        for each in entries
        if each["number"] == number
        or (number is None and each["who"].get("pid") == os.getpid() and each["verb"] == verb)
    ]
    return ours[-1] if ours else None


def _ended(entry: dict[str, Any], disks: list[dict[str, Any]]) -> Answer:
    """Return what an order's entry says, with what is in service now. Raises: ServiceError where that is no success."""
    data = {}
    for disk in disks:
        if disk["vbd"] == entry["vbd"]:
            data = {"chain": disk["chain"], "layers": disk["layers"]}
    answer = Answer(Code(entry["code"]), data, entry["error"], entry["number"])
    if answer.code is not Code.OK:
        raise ServiceError(answer)
    return answer


@contextmanager
def shown(title: str, look: Look | None = None) -> Iterator[Waiting]:
    """Give what to call with the seconds that were waited; they are shown on a terminal, on standard error."""
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
