"""`python -m tests.xen.bed`: boots a real Xen, runs the suite of tests/xen in its dom0, and brings the results back.

Must not skip anything silently: if something is missing, it says so, and that is an error if success was promised
(`--must`, or CI in the environment).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from tests.ci import flaky
from tests.interruption import INTERRUPTED, heard_once
from tests.part import Part
from tests.xen.bed import machine, portions, recipe
from tests.xen.bed.again import FAILED, Outcome, repeat
from tests.xen.bed.image import cache_directory
from tests.xen.bed.release import NEWEST, RELEASES
from tests.xen.bed.report import Failure
from tests.xen.bed.session import NO_TESTS, Bed

LAST = "failed.json"  # among the results: what failed, and why
SKIPPED, BROKEN = 0, 1


def main(argv: Sequence[str]) -> int:
    """Run, and return the exit status: the suite's, or 1 if it did not finish."""
    args = _parser().parse_args(argv)
    console = Console()
    place = cache_directory() / recipe.name_of(RELEASES[args.xen])
    reason = machine.missing(builds=not place.is_dir())
    if reason:
        is_error = args.must or bool(os.environ.get("CI"))
        console.print(f"{'error' if is_error else 'skipped'}: no Xen to test on: {reason}", markup=False)
        return BROKEN if is_error else SKIPPED
    try:
        with heard_once():
            return _run(args, console, place)
    except subprocess.CalledProcessError as error:
        console.print(f"error: {error}\n{error.stderr or ''}", markup=False, highlight=False)
        return BROKEN
    except KeyboardInterrupt:
        sentence = "interrupted: the machines are off, and nothing is known of what has no line above"
        console.print(sentence, markup=False, soft_wrap=True)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests.xen.bed", description="Run tests/xen in the dom0 of an emulated Xen.")
    parser.add_argument("--xen", choices=RELEASES, default=NEWEST.xen, help="the version to boot (%(default)s)")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only tests that match, as pytest has it")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="run each test N times")
    parser.add_argument("--must", action="store_true", help="it is an error when this machine cannot do it")
    parser.add_argument("--part", type=Part.parse, metavar="K/N", help="the core, and the K-th of N parts of the rest")
    parser.add_argument("--failed", action="store_true", help="only what failed last")
    parser.add_argument("--again", action="store_true", help="what failed is run once more, on a fresh machine")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help=f"default: build/xen, and build/xen-VERSION for others than {NEWEST.xen}",
    )
    parser.add_argument("--cpus", type=int, default=1, choices=(1, 2), help="of a machine (%(default)s)")
    parser.add_argument(
        "--silence",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="end a machine that says nothing for so long of its own time, at work or with nothing to do (%(default)s)",
    )
    parser.add_argument("tests", nargs="*", help="default: all")
    return parser


def _run(args: argparse.Namespace, console: Console, place: Path) -> int:
    results = args.results or Path("build", "xen" if args.xen == NEWEST.xen else f"xen-{args.xen}")
    last = results / LAST
    words = [*(["-k", args.k] if args.k else ()), *([f"--times={args.times}"] if args.times > 1 else ())]
    bed = Bed(console, RELEASES[args.xen], place, words, args.cpus, args.silence)
    if args.failed and not last.exists():
        console.print(f"nothing failed last: there is no {last}", markup=False)
        return NO_TESTS
    if args.failed or args.tests or args.k:  # few, as a rule: to boot twice would take longer
        shares = [[*json.loads(last.read_text())] if args.failed else args.tests or list(portions.WHOLE)]
    else:
        shares = portions.halves(portions.part(args.part.number, args.part.count) if args.part else portions.WHOLE)
    with _emptied(results) as is_ours:
        if not is_ours:
            sentence = f"error: another run puts its results into {results}: wait for it, or choose others by --results"
            console.print(sentence, markup=False, soft_wrap=True)
            return BROKEN
        return _run_shares(bed, shares, results, again=args.again)


@contextmanager
def _emptied(results: Path) -> Iterator[bool]:
    """Empty a directory, and keep it for this run alone; False if another run has it."""
    results.mkdir(parents=True, exist_ok=True)
    fd = os.open(results, os.O_RDONLY | os.O_DIRECTORY)
    is_ours = False
    try:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        for each in results.iterdir() if is_ours else ():
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        yield is_ours
    finally:
        os.close(fd)


def _run_shares(bed: Bed, shares: Sequence[Sequence[str]], results: Path, *, again: bool) -> int:
    def repeated(tests: Sequence[str], number: int) -> tuple[int, list[Failure]]:
        bed.console.print(f"{len(tests)} failed; once more, on a fresh machine", markup=False)
        return bed.run([tests], results / f"again-{number}")

    status, failures = bed.run(shares, results)
    outcome = Outcome(status, failures)
    if failures and status == FAILED and again:
        outcome = repeat(failures, repeated, flaky.known())
    for line in outcome.lines:
        bed.console.print(line, markup=False, highlight=False, soft_wrap=True)
    if outcome.failures:
        (results / LAST).write_text(json.dumps({each.test: each.reason for each in outcome.failures}))
    return outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
