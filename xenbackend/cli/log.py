"""`xenbackend log`: read a record file, or ask the `log:` layer of a vbd which ranges were written.

Must not decide what a record means, nor what is dirty: `block.record` and the layer do.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any

from xenbackend.block import record
from xenbackend.block.record import Choice, Entry, Lost
from xenbackend.block.request import Op
from xenbackend.cli import output, waiting
from xenbackend.cli.arguments import add_json, add_order_options
from xenbackend.disks import parse_disk
from xenbackend.errors import ConfigError
from xenbackend.units import SECTOR, format_duration, format_size, format_time, parse_duration

_DISK_RANGE = struct.Struct("<QI4x")  # struct disk_range of blktap's log.h, x86-64: sector, count, padding
_PRECISION = "microseconds"  # of the times of requests
_TIME = len(format_time(0, _PRECISION))
_MAX_COUNT = 0xFFFF_FFFF // 8 * 8  # sectors of one such range; whole pieces of 4 KiB
_VERBS = {
    "get": "print the ranges that were written, and forget them",
    "peek": "print the ranges that were written",
    "start": "start tracking writes",
    "stop": "stop tracking writes, and keep the ranges that were found",
    "clear": "forget the ranges that were written",
    "status": "show whether writes are tracked, and how many ranges and bytes were written",
}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "log",
        help="show what was requested of a guest's disk, and what was written",
        description="Ask the log: layer of a disk in service which ranges were written, or print a file of requests "
        "that it recorded. See also: xenbackend drivers log",
    )
    commands = parser.add_subparsers(dest="log_command", required=True, metavar="COMMAND")
    _register_show(commands)
    for verb, help_text in _VERBS.items():
        is_ranges = verb in ("get", "peek")
        text = f"{help_text[0].upper()}{help_text[1:]}: by the log: layer of a disk in service."
        if verb == "get":
            text += " Ranges are forgotten only once they have been printed: a `get` that is interrupted loses none."
        command = commands.add_parser(verb, help=help_text, description=text)
        command.add_argument("vbd", metavar="DISK", help="such as 5/xvda or guest/xvda")
        command.add_argument(
            "--layer", default="log", help="the layer's driver, or its number in the chain (%(default)s)"
        )
        if is_ranges:
            command.add_argument(
                "--binary", action="store_true", help="16 bytes per range: u64 sector, u32 count, 4 zeros"
            )
        add_order_options(command)
        command.set_defaults(run=ranges if is_ranges else status, verb=f"log {verb}", command=verb)


def _register_show(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    show = commands.add_parser(
        "show",
        help="print, filter or sum up recorded requests",
        description="Print the requests that a log: layer has recorded in files, all or those that the options choose. "
        "Times are local, with --json nanoseconds since 1970.",
    )
    show.add_argument(
        "files", metavar="FILE", nargs="+", type=Path, help="record files, the oldest first: guest.rec.1 guest.rec"
    )
    show.add_argument(
        "--op", action="append", choices=[op.name.lower() for op in Op], help="only this operation; may be repeated"
    )
    show.add_argument("--since", metavar="TIME", help="a time such as 2025-01-31T12:00, or so long ago: 90s, 10m")
    show.add_argument(
        "--sectors", metavar="A-B", help="only requests that touch sectors A to B (512 bytes, B included)"
    )
    show.add_argument("--errors", action="store_true", help="only requests that failed")
    show.add_argument("--slower-than", metavar="TIME", help="only requests that took this long or longer, such as 5ms")
    ends = show.add_mutually_exclusive_group()
    ends.add_argument("--head", metavar="N", type=int, help="only the first N of them")
    ends.add_argument("--tail", metavar="N", type=int, help="only the last N of them")
    show.add_argument("--summary", action="store_true", help="sums instead of requests")
    add_json(show, "one JSON object a line for each request, or one for the summary; docs/json.md has its keys")
    show.set_defaults(run=show_records)


def show_records(arguments: argparse.Namespace) -> int:
    """Print the requests of record files, or their sums."""
    choice = choice_of(arguments, time.time_ns())
    entries = iter(_limited(_chosen(arguments.files, choice), arguments.head, arguments.tail))
    entries = chain(list(islice(entries, 1)), entries)  # report an unreadable file before printing anything
    if arguments.summary:
        summary = record.Summary()
        summary.add(entries)
        _print_summary(summary.result(), as_json=arguments.json)
        return 0
    if not arguments.json:
        print(f"{'time':{_TIME}}  {'op':7}  {'first sector':>14}  {'sectors':>10}  {'took':>9}  status")
    for entry in entries:
        print(json.dumps(_as_values(entry)) if arguments.json else _as_line(entry))
    return 0


def choice_of(arguments: argparse.Namespace, now_ns: int) -> Choice:
    """Return what the filters of a command line choose. Raises: ConfigError."""
    first, stop = _sectors(arguments.sectors) if arguments.sectors else (0, None)
    return Choice(
        ops=frozenset(Op[name.upper()] for name in arguments.op or [op.name for op in Op]),
        since_ns=_since_ns(arguments.since, now_ns) if arguments.since else 0,
        first=first,
        stop=stop,
        errors_only=arguments.errors,
        slower_than_ns=_duration_ns(arguments.slower_than) if arguments.slower_than else 0,
    )


def _since_ns(text: str, now_ns: int) -> int:
    try:
        return now_ns - round(parse_duration(text) * 1e9)
    except ValueError:
        pass
    try:
        return round(datetime.fromisoformat(text).timestamp() * 1e9)  # without a zone it is local time
    except ValueError:
        raise ConfigError(
            f"--since {text} is neither a time such as 2025-01-31T12:00 nor a duration such as 10m"
        ) from None


def _duration_ns(text: str) -> int:
    try:
        return round(parse_duration(text) * 1e9)
    except ValueError as error:
        raise ConfigError(f"--slower-than: {error}") from None


def _sectors(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ConfigError(f"--sectors {text} is not a range of sectors such as 2048-4095")
    return int(first) * SECTOR, (int(last) + 1) * SECTOR


def _chosen(files: Sequence[Path], choice: Choice) -> Iterator[Entry | Lost]:
    for path in files:
        try:
            with path.open("rb") as stream:
                for entry in record.read(stream):
                    if isinstance(entry, Lost) or (isinstance(entry, Entry) and choice.wants(entry)):
                        yield entry
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _limited(entries: Iterable[Entry | Lost], head: int | None, tail: int | None) -> Iterable[Entry | Lost]:
    if tail is not None:
        return deque(entries, maxlen=max(0, tail))
    return entries if head is None else islice(entries, max(0, head))


def _as_line(entry: Entry | Lost) -> str:
    if isinstance(entry, Lost):
        return f"{'':{_TIME}}  {entry.records} records are missing here"
    return (
        f"{format_time(entry.time_ns / 1e9, _PRECISION)}  {entry.op.name.lower():7}  {entry.offset // SECTOR:>14}  "
        f"{entry.length // SECTOR:>10}  {format_duration(entry.latency_ns / 1e9):>9}  {_status(entry.status)}"
    )


def _status(status: int) -> str:
    import errno

    return errno.errorcode.get(status, str(status)) if status else "ok"


def _as_values(entry: Entry | Lost) -> dict[str, Any]:
    if isinstance(entry, Lost):
        return {"lost": entry.records}
    return {
        "time_ns": entry.time_ns,
        "op": entry.op.name.lower(),
        "first_sector": entry.offset // SECTOR,
        "sectors": entry.length // SECTOR,
        "latency_ns": entry.latency_ns,
        "status": entry.status,
    }


def _print_summary(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        output.print_json(result)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("operation", box=None)
    for heading in ("requests", "bytes", "errors", "sequential", "p50", "p99", "max"):
        table.add_column(heading, justify="right")
    for op, sums in result["operations"].items():
        latencies = [format_duration(sums[f"latency_{each}_ns"] / 1e9) for each in ("p50", "p99", "max")]
        counts = [str(sums["requests"]), format_size(sums["bytes"]), str(sums["errors"])]
        table.add_row(op, *counts, f"{sums['sequential_share']:.0%}", *latencies)
    console = Console()
    console.print(table)
    for each in result["hottest"]:
        first = each["offset"] // SECTOR
        last = first + each["length"] // SECTOR - 1
        console.print(f"sectors {first}-{last}: {each['requests']} requests", highlight=False)
    console.print(f"in {format_duration(result['duration_s'])}; {result['lost']} records lost", highlight=False)


def ranges(arguments: argparse.Namespace) -> int:
    """Print the dirty ranges page by page.

    With `get`, asking for the next page makes the layer forget this one: so it is written out first.
    """
    out = sys.stdout.buffer
    if arguments.binary and arguments.json:
        raise ConfigError("--json and --binary exclude each other")
    form = _binary if arguments.binary else _json if arguments.json else _text
    for page in _pages(arguments):
        out.write(b"".join(form(first, count) for first, count in page))
        out.flush()
    if arguments.binary:
        out.write(_DISK_RANGE.pack(0, 0))  # as blktap2 ended its list
        out.flush()
    return 0


def _pages(arguments: argparse.Namespace) -> Iterator[list[tuple[int, int]]]:
    following: list[str] = []
    while True:
        *lines, last = _ask(arguments, following).splitlines()
        yield [(int(first), int(count)) for first, count in map(str.split, lines)]
        if last == "end":
            return
        following = [last.removeprefix("more ")]


def _binary(first: int, count: int) -> bytes:
    return b"".join(
        _DISK_RANGE.pack(first + done, min(count - done, _MAX_COUNT)) for done in range(0, count, _MAX_COUNT)
    )


def _json(first: int, count: int) -> bytes:
    return f'{{"first_sector": {first}, "sectors": {count}}}\n'.encode()


def _text(first: int, count: int) -> bytes:
    return f"{first} {count}\n".encode()


def status(arguments: argparse.Namespace) -> int:
    """Do a verb whose answer is the layer's status, and print that."""
    text = _ask(arguments, [])
    if not arguments.json:
        print(text, end="")
        return 0
    pairs = [line.split(" ", 1) for line in text.splitlines()]
    values = {key: int(value) if value.isdecimal() else value for key, value in pairs}
    output.print_json({"vbd": str(parse_disk(arguments.vbd)), **values})
    return 0


def _ask(arguments: argparse.Namespace, following: list[str]) -> str:
    vbd, layer, command = arguments.vbd, arguments.layer, arguments.command
    return waiting.order(arguments, lambda client: client.command(vbd, layer, command, *following))
