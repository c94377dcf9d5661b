"""`xenbackend orders [N]`: what became of the last orders.

Must not decide anything: the service keeps the ledger.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from xenbackend.cli.arguments import add_json, add_socket
from xenbackend.cli.columns import print_rows
from xenbackend.cli.output import print_json
from xenbackend.client import Client
from xenbackend.errors import printable
from xenbackend.protocol.codes import Code
from xenbackend.units import format_duration, format_time

HEADINGS = ("order", "began", "took", "by", "disk", "what", "ended", "from -> to")
_STACKS = ((0, 6), (4, 5), (1, 2), (3, 7))  # of the headings, on a terminal
Entry = dict[str, Any]


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "orders",
        help="show how the last orders ended",
        description="Show the last 1,000 orders, the latest at the end: when each began, how long it took, who gave "
        "it (user and process), for which disk, how it ended, and which chain it led from and to. They are remembered "
        "over restarts of the service, until `xenbackend stop`.",
    )
    parser.add_argument("number", nargs="?", type=_number, metavar="N", help="only this one, with all that is known")
    add_json(parser)
    add_socket(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print all orders, or one."""
    client = Client(args.socket)
    found = client.orders() if args.number is None else [client.order(args.number)]
    entries = [each.values for each in found]
    if args.json:
        print_json({"orders": entries})
    elif args.number is not None:
        for entry in entries:
            print("\n".join(f"{key + ':':8}{value}" for key, value in details(entry) if value))
    else:
        print_rows([HEADINGS, *(words(each) for each in entries)], _STACKS)
    return 0


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of an order, such as 17")
    return int(text)


def words(entry: Entry) -> tuple[str, ...]:
    """Return an order as the words of HEADINGS."""
    change = " -> ".join(printable(entry[key]) for key in ("from", "to") if entry[key])
    sentence = f"  # {printable(entry['error'])}" if entry["error"] else ""
    number, began, who = str(entry["number"]), format_time(entry["began"]), _who(entry["who"])
    return (
        number,
        began,
        _took(entry),
        who,
        entry["vbd"] or "-",
        entry["verb"],
        _end(entry),
        (change or "-") + sentence,
    )


def details(entry: Entry) -> list[tuple[str, str]]:
    """Return everything known of an order, with headings for people."""
    texts = {key: printable(str(entry[key])) for key in ("vbd", "verb", "from", "to", "error")}
    return [
        ("order", str(entry["number"])), ("what", texts["verb"]), ("disk", texts["vbd"]), ("by", _who(entry["who"])),
        ("from", texts["from"]), ("to", texts["to"]), ("began", format_time(entry["began"])), ("took", _took(entry)),
        ("ended", _end(entry)), ("error", texts["error"]),
    ]  # fmt: skip


def _end(entry: Entry) -> str:
    return str(entry["code"]).replace(Code.UNDER_WAY, "under way")


def _took(entry: Entry) -> str:
    ended = time.time() if entry["ended"] is None else entry["ended"]
    return format_duration(max(0.0, ended - entry["began"])).replace(" ", "")


def _who(who: dict[str, Any]) -> str:
    """Return who gave an order as one word: command, process and user."""
    if not who:
        return "-"
    command = printable(str(who.get("command", ""))) or "?"
    return f"{command}[{who.get('pid', '?')}],uid={who.get('uid', '?')}"
