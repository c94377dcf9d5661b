"""`xenbackend top`: a live view of all disks, or the same in lines for scripts.

Must not give an order, nor ignore keys while a service does not answer.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from xenbackend.cli import pictures, top_rows
from xenbackend.cli.arguments import add_json, add_socket
from xenbackend.cli.columns import print_rows
from xenbackend.cli.output import print_json
from xenbackend.cli.pictures import Picture
from xenbackend.cli.top_rows import History, Row, View
from xenbackend.client import Client, ServiceError
from xenbackend.errors import printable
from xenbackend.protocol.client import Waiting

if TYPE_CHECKING:
    from xenbackend.cli.top_screen import Frame
    from xenbackend.cli.top_terminal import Terminal

ANSWER_S = 5.0
_HOLD_S = 3600.0  # longest wait for a key while a picture is held
COLUMNS = ("disk", "guest", "state", "r/s", "w/s", "rB/s", "wB/s", "queue", "mean-us", "p99-us", "errors", "chain")
_STACKS = ((0, 1), (2, 7), (3, 5), (4, 6), (8, 9), (10,), (11,))  # of them, on a terminal without a screen
_INTERVALS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


def register(subparsers: Any) -> None:
    """Add the command."""
    from xenbackend.cli.top_screen import KEYS

    parser = subparsers.add_parser(
        "top",
        help="watch all disks at work",
        description="Watch all disks: requests and bytes per second, requests under way, and latency: the mean and the "
        "bound below which 99 of 100 requests lie, both of the last interval, and how the mean has developed. "
        "Without a terminal, or with --once or --count, it prints lines for scripts.",
        epilog=f"Keys: {KEYS}.",
    )
    parser.add_argument("vbds", nargs="*", metavar="DISK", help="only these disks, such as 5/xvda or guest/xvda")
    parser.add_argument(
        "--interval",
        type=pictures.interval,
        default=2.0,
        metavar="SECONDS",
        help="time between two refreshes (%(default)s)",
    )
    parser.add_argument("--sort", choices=top_rows.SORTS, default="disk", help="what to sort by (%(default)s)")
    parser.add_argument("--reverse", action="store_true", help="that comes last")
    parser.add_argument(
        "--filter", default="", metavar="TEXT", help="only disks whose name, guest, state or chain has it"
    )
    parser.add_argument("--layers", action="store_true", help="show each layer, and what it counts")
    parser.add_argument("--once", action="store_true", help="print one interval, and exit")
    parser.add_argument("--count", type=_count, metavar="N", help="print N intervals, and exit")
    add_json(parser, "print one object for each interval; docs/json.md has its keys")
    add_socket(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Watch until the operator ends it."""
    view = View(args.sort, args.reverse, args.filter, args.layers)
    if args.once or args.count or args.json or not sys.stdout.isatty():
        _print(args, view)
        return 0
    from rich.console import Console

    from xenbackend.cli import top_terminal  # late: scripts have no terminal

    top_terminal.check()
    look(args)  # report what is wrong from the start as a sentence
    console = Console(highlight=False)
    with top_terminal.Terminal(console) as terminal:
        bars = top_rows.BARS if console.encoding.lower().startswith("utf") else top_rows.PLAIN_BARS
        try:
            Live(args, view, terminal, bars).run()
        except KeyboardInterrupt:
            return 0
    return 0


def look(args: argparse.Namespace, waiting: Waiting | None = None) -> Picture:
    """Ask the service. Raises: ServiceError, also for a disk that it does not serve."""
    client = Client(args.socket, waiting=waiting, answer_s=ANSWER_S)
    disks = client.disks(*args.vbds)  # first: it knows a name that is none without asking anybody
    return Picture(client.service(), disks, time.monotonic())


@dataclass(slots=True)
class _State:
    """The state that keys change."""

    view: View
    interval_s: float
    first: int = 0
    is_held: bool = False
    with_keys: bool = True
    typing: str | None = None
    has_ended: bool = False


class Live:
    """The live view: looks, keys, pictures."""

    def __init__(self, args: argparse.Namespace, view: View, terminal: Terminal, bars: str) -> None:
        self._args = args
        self._terminal = terminal
        self._bars = bars
        self._state = _State(view, args.interval)
        self._history = History()
        self._rows: list[Row] = []
        self._service = "waiting for the service"
        self._note = ""

    def run(self) -> None:
        """Go on until a key ends it."""
        due = time.monotonic()
        while not self._state.has_ended:
            now = time.monotonic()
            if now >= due and not self._state.is_held:
                self._look()
                due = max(due, now) + self._state.interval_s
            self._draw()
            left_s = _HOLD_S if self._state.is_held else due - time.monotonic()
            self._heed(self._terminal.wait(left_s))

    def _look(self) -> None:
        try:
            picture = look(self._args, self._meanwhile)
        except _Ended:
            return
        except ServiceError as problem:  # it is tried again; the last picture stays
            self._note = str(problem)
            return
        self._rows, self._note = self._history.take(picture), ""
        self._service = pictures.service_line(picture)

    def _meanwhile(self, waited_s: float) -> None:
        """React to keys while the service does not answer."""
        if waited_s > 1.0:
            self._note = f"the service has not answered for {waited_s:.0f} s"
        self._heed(self._terminal.wait(0))
        self._draw()
        if self._state.has_ended:
            raise _Ended

    def _draw(self) -> None:
        from xenbackend.cli import top_screen

        width, height = self._terminal.size
        self._terminal.draw(top_screen.lines(self._frame(), width, height))

    def _frame(self) -> Frame:
        from xenbackend.cli.top_screen import Frame

        state = self._state
        rows = top_rows.arranged(self._rows, state.view)
        state.first = max(0, min(state.first, len(rows) - 1))
        held = "held; " if state.is_held else ""
        service = f"{held}{self._service}"
        return Frame(rows, state.view, service, state.first, self._note, state.typing, state.with_keys, self._bars)

    def _heed(self, keys: list[str]) -> None:
        for key in keys:
            if self._state.typing is not None:
                self._type(key)
            else:
                self._press(key)

    def _type(self, key: str) -> None:
        """Change the filter by a key; its effect is seen at once."""
        state = self._state
        text = state.typing or ""
        if key in ("enter", "escape"):
            state.typing = None
            if key == "escape":
                state.view = replace(state.view, filter="")
            return
        text = text[:-1] if key == "backspace" else text + key if len(key) == 1 and key.isprintable() else text
        state.typing = text
        state.view = replace(state.view, filter=text)

    def _press(self, key: str) -> None:
        state = self._state
        page = max(1, self._terminal.size[1] - 3)
        moves = {
            "up": -1,
            "down": 1,
            "page up": -page,
            "page down": page,
            "home": -len(self._rows),
            "end": len(self._rows),
        }
        if key in moves:
            state.first = max(0, state.first + moves[key])
        elif key == "q":
            state.has_ended = True
        elif key in ("s", "S"):
            state.view = state.view.next_sort(1 if key == "s" else -1)
        elif key == "r":
            state.view = replace(state.view, is_reversed=not state.view.is_reversed)
        elif key == "l":
            state.view = replace(state.view, with_layers=not state.view.with_layers)
        elif key in ("/", "f"):
            state.typing = state.view.filter
        elif key == " ":
            state.is_held = not state.is_held
        elif key in ("+", "-"):
            state.interval_s = _other_interval(state.interval_s, 1 if key == "+" else -1)
            self._note = f"a look every {state.interval_s:g} s"
        elif key == "?":
            state.with_keys = not state.with_keys


class _Ended(Exception):
    """A key has ended the view while we waited for the service."""


def _other_interval(now_s: float, step: int) -> float:
    nearest = min(range(len(_INTERVALS)), key=lambda place: abs(_INTERVALS[place] - now_s))
    return _INTERVALS[max(0, min(len(_INTERVALS) - 1, nearest + step))]


def _print(args: argparse.Namespace, view: View) -> None:
    """Print each interval, until there were as many as wanted, or until interrupted."""
    history = History()
    history.take(look(args))
    left = 1 if args.once else args.count
    while left is None or left > 0:
        time.sleep(args.interval)
        picture = look(args)
        rows = top_rows.arranged(history.take(picture), view)
        if args.json:
            print_json(
                {"time": time.time(), "service": picture.service.values, "vbds": [top_rows.values(row) for row in rows]}
            )
        else:
            _print_lines(rows, view)
        sys.stdout.flush()
        left = None if left is None else left - 1


def _print_lines(rows: list[Row], view: View) -> None:
    layers = [top_rows.layers(row) if view.with_layers else [] for row in rows]
    below = [[f"  {place}  {layer}" for place, layer in enumerate(each)] for each in layers]
    print_rows([COLUMNS, *map(_cells, rows)], _STACKS, below=[[], *below])


def _cells(row: Row) -> list[str]:
    rates = [f"{row.moved.rates[each]:.0f}" if row.moved.rates else "-" for each in pictures.RATES]
    times = ["-" if each is None else f"{each / 1e3:.0f}" for each in (row.moved.mean_ns, row.moved.p99_ns)]
    known = row.known
    words = [known.vbd, printable(known.guest) or "-", row.condition, *rates, str(row.in_flight), *times]
    return [*words, str(pictures.errors(known)), printable(known.chain) or "-"]


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)
