"""`xenbackend bench`: measure chains, and the peers that are installed, on one file in turn.

Must not measure or compute: it turns arguments into calls. Exit status 3: others disturbed the measurement, so that
nothing can be concluded.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from xenbackend.bench import plot, report
from xenbackend.bench.beside import NICE
from xenbackend.bench.plan import WORKS, select_works
from xenbackend.bench.session import FILE, IMAGES, Outcome, Session, is_read_only, run
from xenbackend.block.spec import parse_chain
from xenbackend.cli import output
from xenbackend.cli.arguments import add_json, duration, size

_CHAINS = [f"aio:{FILE}", f"log:|aio:{FILE}"]
_CACHED_DIRECTORY = Path("/dev/shm")  # noqa: S108 - tmpfs: the page cache and nothing else
_DISK_DIRECTORY = Path("/var/tmp")  # noqa: S108 - on a disk, where /tmp may not be

_DISTURBED = 3  # exit status
_WIDTH = 132  # characters, of a table that is not shown on a terminal


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure chains, and other backends beside them",
        description="Measure chains under load, through a simulated guest, with every read checked. The targets take "
        "turns in each round; figures are medians. Uses two CPUs, one for the backend and one for the load. If other "
        "programs or the hypervisor used the CPUs meanwhile, ratios are marked with ?, and the exit status is 3.",
        epilog="Workloads: " + "; ".join(f"{work.name}: {work.title}" for work in WORKS),
    )
    parser.add_argument(
        "chains",
        nargs="*",
        metavar="CHAIN",
        help=f"chains to measure; the others are compared with the first; {FILE} stands for a bench file. "
        f"A chain that does not name it is only read. Default: {' and '.join(_CHAINS)}",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="measure nbdkit, QEMU and fio too, as far as installed, and a ring server in C, the limit, where there is "
        "a C compiler",
    )
    parser.add_argument(
        "--image",
        choices=IMAGES,
        help="let the bench file be an image of this format, by qemu-img, and QEMU serve it too",
    )
    parser.add_argument("--direct", action="store_true", help="O_DIRECT on a disk instead of the page cache on tmpfs")
    parser.add_argument("--file", type=Path, help="where to make the bench file; it is removed at the end")
    parser.add_argument("--size", type=size, default=1 << 30, help="size of the bench file; default 1G")
    parser.add_argument("--work", action="append", default=[], metavar="NAME", help="only this workload; repeatable")
    parser.add_argument(
        "--overwrite", action="store_true", help="write to your own chains, too: this destroys their content"
    )
    parser.add_argument("--no-persistent", action="store_true", help="a frontend without persistent grants")
    _add_how(parser)
    parser.add_argument("--any", action="store_true", help="exit status 0 even if others disturbed the measurement")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a picture too; needs xenbackend[plot]")
    add_json(parser, "print JSON instead of tables")
    parser.set_defaults(run=main)


def _add_how(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how to measure."""
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement; default 1")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is repeated; default 5")
    parser.add_argument(
        "--poll",
        type=duration,
        default=100e-6,
        metavar="TIME",
        help="how long the load looks for answers before it sleeps; 0us sleeps at once, as a guest does, and shows "
        "what waking up costs this machine; default 100us",
    )
    parser.add_argument(
        "--beside",
        choices=NICE,
        default="",
        help="run a loop on each CPU meanwhile, of the lowest priority or of ours, and show what it loses because "
        "workers look for requests before they sleep: each chain is measured without that, too",
    )
    parser.add_argument(
        "--calls", action="store_true", help="count system calls per request afterwards, with perf or else strace"
    )


def main(args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.plot:
        plot.check()
    outcome = _measure(_session(args))
    rows = report.summarise(outcome.measured)
    if args.json:
        output.print_json(report.as_json(rows, outcome.usage, outcome.notes), indent=2)
    else:
        _print(rows, outcome)
    if args.plot:
        plot.save(rows, args.plot)
    return _DISTURBED if outcome.usage.disturbances and not args.any else 0


def _session(args: argparse.Namespace) -> Session:
    chains = args.chains or ([f"{IMAGES[args.image].driver}:{FILE}"] if args.image else _CHAINS)
    directory = _DISK_DIRECTORY if args.direct else _CACHED_DIRECTORY
    file = args.file or directory / f"xenbackend-bench-{os.getpid()}"
    for chain in chains:
        parse_chain(chain.replace(FILE, str(file)))  # report mistakes before measuring
    read_only = is_read_only(args.image or "raw") or (not args.overwrite and any(FILE not in chain for chain in chains))
    return Session(
        chains=chains,
        works=select_works(args.work, read_only=read_only, image=bool(args.image)),
        file=file,
        size=args.size,
        image=args.image or "raw",
        compare=args.compare,
        direct=args.direct,
        overwrite=args.overwrite,
        persistent=not args.no_persistent,
        rounds=args.rounds,
        seconds=args.seconds,
        poll=args.poll,
        beside=args.beside,
        calls=args.calls,
    )


def _measure(session: Session) -> Outcome:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    # Refreshed by hand: a thread that draws would compete with the load generator for the interpreter.
    with _ends_in_order(), Progress(*columns, console=Console(file=sys.stderr), auto_refresh=False) as bar:
        task = bar.add_task("starting", total=None)

        def progress(text: str, total: int) -> None:
            bar.update(task, description=text, total=total)
            bar.refresh()
            bar.advance(task)

        return run(session, progress)


@contextmanager
def _ends_in_order() -> Iterator[None]:
    """Make SIGTERM end the command as Ctrl-C does, so that backends are stopped and files removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(rows: list[report.Row], outcome: Outcome) -> None:
    from rich.console import Console

    # Without a terminal to set the width, a table is as wide as it needs.
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    for _, group in groupby(rows, key=lambda row: row.work.name):
        console.print(report.table(list(group), is_disturbed=bool(outcome.usage.disturbances)))
    console.print(report.legend(rows, outcome.usage, outcome.notes), highlight=False, markup=False)
