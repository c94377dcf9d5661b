"""`xenbackend demo`: an embedded Xen, the real service, and a guest that tries its disk, shown as it happens.

Must not do a guest's I/O itself.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from xenbackend.cli import demo_image, output
from xenbackend.cli.arguments import add_json, duration, size
from xenbackend.errors import ConfigError, XenbackendError, printable
from xenbackend.units import SECTOR, format_duration, format_size

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
        help="show a disk at work, on a simulated Xen",
        description="Serve a chain to a simulated guest that writes, reads back and verifies. A raw image (aio:FILE) "
        "that is missing is made; of one that exists, the sectors that the guest writes are restored at the end. "
        "With --keep the host stays until Ctrl-C, with guests that use their disks, for you to play with.",
    )
    parser.add_argument("chain", nargs="?", metavar="CHAIN", help="the disk (default: log: on a temporary image)")
    parser.add_argument(
        "--area", type=size, default="64M", metavar="SIZE", help="how much of the disk to use (%(default)s)"
    )
    parser.add_argument("--seconds", type=duration, default=3.0, metavar="S", help="of random requests (%(default)s)")
    parser.add_argument(
        "--queues", type=int, choices=range(1, 9), default=2, metavar="1-8", help="rings of the guest (%(default)s)"
    )
    parser.add_argument("--no-persistent", action="store_true", help="a guest without persistent grants")
    parser.add_argument("--save", type=Path, metavar="FILE", help="a new file for the disk as the guest reads it")
    parser.add_argument(
        "--keep",
        type=int,
        nargs="?",
        const=1,
        metavar="N",
        help="have N guests (%(const)s) until Ctrl-C, and print the environment variables by which commands find this "
        "host; {n} "
        "in CHAIN is the guest's number",
    )
    parser.add_argument("--trace", action="store_true", help="show each change in xenstore")
    parser.add_argument("--quiet", action="store_true", help="only the summary")
    add_json(parser, "print the summary, or with --keep what there is, as JSON, and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; return 0 if every byte was what it had to be."""
    from rich.console import Console

    from xenbackend.block.chain import parse_chain
    from xenbackend.cli.check import open_once
    from xenbackend.embedded.machine import Machine
    from xenbackend.rig.frontend import DiskError
    from xenbackend.rig.guest_ring import BackendMisbehaved
    from xenbackend.rig.pattern import WrongData

    args.quiet |= args.json
    console = Console(highlight=False, soft_wrap=True, quiet=args.json)
    with ExitStack() as stack:
        if args.area < SECTOR:
            raise ConfigError(f"--area is {format_size(args.area)}; the least is one sector, 512 B")
        if args.keep is not None:
            return _keep(args, stack)
        chain = args.chain or _own_chain(stack, args.area)
        demo_image.make_missing(chain, args.area)
        if args.save:
            _check_new(args.save)
        open_once(parse_chain(chain), read_only=False)  # fails before a Xen is started for it
        watcher = Watcher(console, quiet=args.quiet, traces=args.trace)
        console.print(f"[bold]chain[/bold]  {_escape(chain)}", markup=True)
        machine = stack.enter_context(Machine(observer=watcher.changed))
        watcher.say(f"a simulated Xen, its xenstore and the service (pid {machine.service_pid}) are up")
        try:
            return _show(args, console, machine, watcher, chain)
        except (WrongData, BackendMisbehaved, DiskError, TimeoutError) as problem:
            raise XenbackendError(f"the guest gave up: {problem}") from problem


def _keep(args: argparse.Namespace, stack: ExitStack) -> int:
    """Run a host until somebody ends it."""
    from rich.console import Console

    from xenbackend.block.chain import parse_chain
    from xenbackend.cli import demo_keep
    from xenbackend.embedded.machine import Machine

    demo_keep.check(args)
    for number in range(1, args.keep + 1) if args.chain else ():
        chain = args.chain.replace(demo_keep.NUMBER, str(number))
        parse_chain(chain)
        demo_image.make_missing(chain, args.area)
    watcher = Watcher(Console(highlight=False, soft_wrap=True, stderr=True), quiet=args.quiet, traces=args.trace)
    return demo_keep.run(args, stack.enter_context(Machine(observer=watcher.changed)), stack)


class Watcher:
    """Prints what changes in xenstore, with the time since the start."""

    def __init__(self, console: Console, *, quiet: bool, traces: bool) -> None:
        self._console = console
        self._quiet = quiet
        self._traces = traces
        self._start = time.monotonic()
        self._lock = threading.Lock()  # the store calls from its own thread
        self._shown: dict[str, bytes | None] = {}

    def say(self, sentence: str) -> None:
        """Print one line of our own."""
        if not self._quiet:
            self._print(f"[bold]{_escape(sentence)}[/bold]")

    def changed(self, path: str, value: bytes | None) -> None:
        """Print one change of a vbd's nodes."""
        if not self._traces or not path.startswith("/local/") or not _OF_VBDS.search(path):
            return
        if self._shown.get(path, b"") == value:  # written again unchanged, or just made
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
    demo_image.make(image, area)
    return f"log:|aio:{image}"


def _check_new(path: Path) -> None:
    """Raise ConfigError for a file that exists: it could be the disk that is tried."""
    if path.exists():
        raise ConfigError(f"--save {path}: it exists; name a new file")
    if not path.parent.is_dir():
        raise ConfigError(f"--save {path}: there is no directory {path.parent}")


class HeldInterrupt:
    """Defers Ctrl-C until `check`: in the middle of a ring's bookkeeping it would leave the ring unusable."""

    def __init__(self) -> None:
        self.is_ignored = False
        self._has_come = False

    def __enter__(self) -> Self:
        self._former = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._former)

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed, unless it is ignored."""
        if self._has_come and not self.is_ignored:
            raise KeyboardInterrupt

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._has_come = True


def _show(args: argparse.Namespace, console: Console, machine: Machine, watcher: Watcher, chain: str) -> int:
    from xenbackend.embedded.exercise import Exercise
    from xenbackend.rig.frontend import Wishes

    guest = machine.create_guest(DOMID)
    try:
        path = machine.attach(DOMID, "xvda", chain)
        wishes = Wishes(persistent=not args.no_persistent, queues=args.queues, ring_order=1, indirect=256)
        frontend = guest.connect(path, wishes)
        facts = frontend.facts
        watcher.say(f"the guest has a disk of {format_size(facts.sectors * SECTOR)}; it begins to write")
        with ProgressBar(console, quiet=args.quiet) as progress, HeldInterrupt() as interrupt:

            def show(phase: Phase) -> None:
                progress.update(phase)
                interrupt.check()

            exercise = Exercise(frontend, args.area, os.getpid(), show)
            try:
                exercise.save()
                exercise.fill()
                exercise.mix(args.seconds)
                exercise.verify()
                seen = _ask_log(machine, chain)
            finally:
                interrupt.is_ignored = True  # the disk must get its former content back
                _put_back(exercise)
            if args.save:
                with args.save.open("xb") as file:
                    exercise.read_all(file.write)
        frontend.close()
        summary = _summary(console, machine, exercise, seen)  # after the end, when every request has been counted
        machine.detach(path)
        if seen is not None and seen != [(0, exercise.size // SECTOR)]:
            raise XenbackendError("log: did not see exactly what was written")
    finally:
        guest.close()
    left = {what: count for what, count in machine.xen.held().items() if count}
    if left:
        raise XenbackendError(f"left behind: {', '.join(f'{what}: {count}' for what, count in left.items())}")
    console.print("[bold green]verified:[/bold green] every sector held what the guest wrote; nothing is left behind")
    if args.json:
        output.print_json({"chain": chain, "size": facts.sectors * SECTOR, **summary})
    return 0


def _put_back(exercise: Exercise) -> None:
    """Restore the disk's former content. Raises: XenbackendError, which says that this failed."""
    try:
        exercise.restore()
    except (XenbackendError, TimeoutError) as problem:
        raise XenbackendError(f"the disk's former content could not be restored: {problem}") from problem


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
        self._bar.update(self._task, completed=phase.moved, rate=f"{rate / 2**20:.0f} MiB/s")


def _ask_log(machine: Machine, chain: str) -> list[tuple[int, int]] | None:
    """Return the ranges that `log:` saw written; None if the chain has no such layer, or several."""
    from xenbackend.block.chain import parse_chain

    names = [layer.driver.name for layer in parse_chain(chain).layers]
    return machine.written_ranges(f"{DOMID}/xvda") if names.count("log") == 1 else None


def _summary(
    console: Console, machine: Machine, exercise: Exercise, seen: list[tuple[int, int]] | None
) -> dict[str, Any]:
    """Print what the guest saw, and return it for scripts."""
    from rich.table import Table

    table = Table("phase", "moved", "MiB/s", "requests/s", "median", "99 %", title="what the guest saw")
    for column in table.columns[1:]:
        column.justify = "right"
    phases = []
    for phase in exercise.phases:
        seconds = phase.seconds or 1e-9
        phases.append(
            {"phase": phase.name, "bytes": phase.moved, "seconds": seconds, "requests": len(phase.latencies)}
            | {f"latency_p{share}_ns": round(phase.latency(share / 100) * 1e9) for share in (50, 99)}
        )
        table.add_row(
            phase.name,
            format_size(phase.moved),
            f"{phase.moved / seconds / 2**20:.0f}",
            f"{len(phase.latencies) / seconds:.0f}",
            format_duration(phase.latency(0.5)),
            format_duration(phase.latency(0.99)),
        )
    console.print(table)
    if seen is not None:
        written = sum(count for _, count in seen) * SECTOR
        console.print(f"log: saw {len(seen)} written range{'s' * (len(seen) != 1)}, {format_size(written)}")
    (vbd,) = machine.ask({"verb": "status"})["data"]
    counters = vbd["counters"]
    console.print(
        f"the worker answered {counters['reads']} reads, {counters['writes']} writes and "
        f"{counters['flushes']} flushes; errors: {counters['errors']}, guest errors: {counters['guest_errors']}"
    )
    return {"phases": phases, "counters": counters}


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(printable(text))
