"""`xenbackend demo`: an embedded Xen, the real service and a guest that tries its disk, shown as it happens.

Must not do a guest's I/O itself.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xenbackend.units import format_duration, format_size, parse_size

if TYPE_CHECKING:
    from rich.console import Console

    from xenbackend.embedded.exercise import Exercise, Phase
    from xenbackend.embedded.machine import Machine

DOMID = 1
_OF_VBDS = re.compile(r"/(backend|device|xenbackend)/")
_STATES = {
    "1": "Initialising", "2": "InitWait", "3": "Initialised", "4": "Connected", "5": "Closing", "6": "Closed",
}  # fmt: skip


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "demo",
        help="show the whole thing at work, on a simulated Xen",
        description="Serve a chain to a simulated guest that writes, reads back and verifies. Every sector that it "
        "writes to a disk of yours is put back before the end.",
    )
    parser.add_argument("chain", nargs="?", metavar="CHAIN", help="the disk (default: log: on an image of its own)")
    parser.add_argument("--area", type=parse_size, default="64M", metavar="SIZE", help="how much to try (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of random requests (%(default)s)")
    parser.add_argument("--queues", type=int, default=2, help="rings of the guest (%(default)s)")
    parser.add_argument("--no-persistent", action="store_true", help="a guest without persistent grants")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the disk as the guest reads it at the end")
    parser.add_argument("--quiet", action="store_true", help="only the summary")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show it; 0 when every byte was what it had to be."""
    from rich.console import Console

    from xenbackend.block.chain import parse_chain
    from xenbackend.embedded.machine import Machine

    console = Console(highlight=False, soft_wrap=True)
    with ExitStack() as stack:
        chain = args.chain or _own_chain(stack, args.area)
        parse_chain(chain)
        watcher = Watcher(console, quiet=args.quiet)
        console.print(f"[bold]chain[/bold]  {chain}", markup=True)
        machine = stack.enter_context(Machine(observer=watcher.changed))
        watcher.say(f"a simulated Xen, its xenstore and the service (pid {machine.service_pid}) are up")
        return _show(args, console, machine, watcher, chain)


class Watcher:
    """Prints what changes in xenstore, with the time since the start."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet
        self._start = time.monotonic()
        self._lock = threading.Lock()  # the store tells from its own thread
        self._shown: dict[str, bytes | None] = {}

    def say(self, sentence: str) -> None:
        """Print one line of our own."""
        if not self._quiet:
            self._print(f"[bold]{_escape(sentence)}[/bold]")

    def changed(self, path: str, value: bytes | None) -> None:
        """Print one change of a vbd's nodes."""
        if self._quiet or not path.startswith("/local/") or not _OF_VBDS.search(path):
            return
        if self._shown.get(path, b"") == value:  # written again, or just made
            return
        self._shown[path] = value
        if value is None:
            self._print(f"[dim]{_escape(path)} removed[/dim]")
            return
        text = value.decode("latin-1")
        if path.endswith("/state"):
            self._print(f"{_escape(path)} = [green]{text} {_STATES.get(text, '')}[/green]")
        elif text:
            self._print(f"[dim]{_escape(path)} = {_escape(text)}[/dim]")

    def _print(self, markup: str) -> None:
        with self._lock:
            self._console.print(f"[cyan]{time.monotonic() - self._start:7.3f}[/cyan]  {markup}", markup=True)


def _own_chain(stack: ExitStack, area: int) -> str:
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="xenbackend-demo-"))
    image = Path(directory) / "disk.img"
    with image.open("wb") as file:
        file.truncate(max(area, 1 << 20))
    return f"log:|aio:{image}"


def _show(args: argparse.Namespace, console: Console, machine: Machine, watcher: Watcher, chain: str) -> int:
    from xenbackend.embedded.exercise import Exercise
    from xenbackend.rig.frontend import Wishes

    guest = machine.create_guest(DOMID)
    try:
        path = machine.attach(DOMID, "xvda", chain)
        wishes = Wishes(persistent=not args.no_persistent, queues=args.queues, ring_order=1, indirect=256)
        frontend = guest.connect(path, wishes)
        facts = frontend.facts
        watcher.say(f"the guest has a disk of {format_size(facts.sectors * 512)}; it begins to write")
        with ProgressBar(console, quiet=args.quiet) as progress:
            exercise = Exercise(frontend, args.area, os.getpid(), progress.update)
            try:
                exercise.save()
                exercise.fill()
                exercise.mix(args.seconds)
                exercise.verify()
                seen = _ask_log(machine, chain)
            finally:
                exercise.restore()
            if args.save:
                with args.save.open("wb") as file:
                    exercise.read_all(file.write)
        _summary(console, machine, exercise, seen)
        if seen is not None and seen != [(0, exercise.size // 512)]:
            console.print("[red]log: did not see exactly what was written[/red]")
            return 1
        frontend.close()
        machine.detach(path)
    finally:
        guest.close()
    left = {what: count for what, count in machine.xen.held().items() if count}
    if left:
        console.print(f"[red]left behind: {left}[/red]")
        return 1
    console.print("[bold green]verified:[/bold green] every sector held what the guest wrote; nothing is left behind")
    return 0


class ProgressBar:
    """A progress bar over the phases, with throughput."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("{task.description:>16}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            console=console,
            disable=quiet,
        )
        self._task: Any = None
        self._phase: Phase | None = None
        self._next = 0.0

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, phase: Phase) -> None:
        """Take a phase's progress; shown ten times a second."""
        now = time.monotonic()
        if phase is not self._phase:
            self._phase = phase
            self._task = self._bar.add_task(phase.name, total=phase.total or None, rate="")
        elif now < self._next and phase.moved != phase.total:
            return
        self._next = now + 0.1
        rate = phase.moved / phase.seconds if phase.seconds else 0
        self._bar.update(self._task, completed=phase.moved, rate=f"{rate / 1e6:.0f} MB/s")


def _ask_log(machine: Machine, chain: str) -> list[tuple[int, int]] | None:
    """Return the ranges that `log:` saw written; None for a chain without it."""
    from xenbackend.block.chain import parse_chain

    names = [layer.driver.name for layer in parse_chain(chain).layers]
    return machine.written_ranges(f"{DOMID}/xvda") if names.count("log") == 1 else None


def _summary(console: Console, machine: Machine, exercise: Exercise, seen: list[tuple[int, int]] | None) -> None:
    from rich.table import Table

    table = Table("phase", "moved", "MB/s", "requests/s", "median", "99 %", title="what the guest saw")
    for column in table.columns[1:]:
        column.justify = "right"
    for phase in exercise.phases:
        seconds = phase.seconds or 1e-9
        table.add_row(
            phase.name,
            format_size(phase.moved),
            f"{phase.moved / seconds / 1e6:.0f}",
            f"{len(phase.latencies) / seconds:.0f}",
            format_duration(phase.latency(0.5)),
            format_duration(phase.latency(0.99)),
        )
    console.print(table)
    if seen is not None:
        written = sum(count for _, count in seen) * 512
        console.print(f"log: saw {len(seen)} written range{'s' * (len(seen) != 1)}, {format_size(written)}: {seen[:4]}")
    (vbd,) = machine.ask({"verb": "status"})["data"]
    counters = vbd["counters"]
    console.print(
        f"the worker (pid {vbd['worker']}) answered {counters['reads']} reads, {counters['writes']} writes and "
        f"{counters['flushes']} flushes; errors: {counters['errors']}, guest errors: {counters['guest_errors']}"
    )


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
