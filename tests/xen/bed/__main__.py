"""`python -m tests.xen.bed`: boots a real Xen, runs the suite of tests/xen in its dom0, and brings the results back.

Must not do without a word what it was not able to do: where something is missing it says so, and is an error where
success was promised (`--must`, or CI in the environment).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.ci import flaky
from tests.xen.bed import machine, parcel, portions, recipe, wheels
from tests.xen.bed.again import FAILED, Outcome, repeat
from tests.xen.bed.boot import Machine, run
from tests.xen.bed.image import cache_directory, cached, key_of
from tests.xen.bed.report import Failure, Report

NO_TESTS = 5  # pytest's exit status
SKIPPED, BROKEN = 0, 1
DIED = 98  # the machine, before pytest had a status


def main(argv: Sequence[str]) -> int:
    """Run, and return the exit status: the suite's, or 1 where it did not come to an end."""
    args = _parser().parse_args(argv)
    console = Console()
    place = cache_directory() / f"image-{key_of(recipe.FILES, wheels.requirements())}"
    reason = machine.missing(builds=not place.is_dir())
    if reason:
        is_error = args.must or bool(os.environ.get("CI"))
        console.print(f"{'error' if is_error else 'skipped'}: no Xen to test on: {reason}", markup=False)
        return BROKEN if is_error else SKIPPED
    try:
        return _run(args, console, place)
    except subprocess.CalledProcessError as error:
        console.print(f"error: {error}\n{error.stderr or ''}", markup=False, highlight=False)
        return BROKEN


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests.xen.bed", description="Run tests/xen in the dom0 of an emulated Xen.")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only tests that match, as pytest has it")
    parser.add_argument("--must", action="store_true", help="it is an error when this machine cannot do it")
    parser.add_argument("--part", type=_part, metavar="K/N", help="only the core, and the K-th of N parts of the rest")
    parser.add_argument("--failed", action="store_true", help="only what failed last")
    parser.add_argument("--again", action="store_true", help="what failed is run once more, on a fresh machine")
    parser.add_argument("--results", type=Path, default=Path("build/xen"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--silence",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="end a machine that says nothing for so long of its own time, at work or with nothing to do (%(default)s)",
    )
    parser.add_argument("tests", nargs="*", help="default: all")
    return parser


def _part(text: str) -> list[str]:
    number, count = map(int, text.split("/"))
    if not 1 <= number <= count:
        raise ValueError(text)
    return portions.part(number, count)


def _run(args: argparse.Namespace, console: Console, place: Path) -> int:
    last = args.results / "failed.json"
    tests = args.tests or args.part or list(portions.WHOLE)
    if args.failed:
        tests = [*json.loads(last.read_text())]
    shutil.rmtree(args.results, ignore_errors=True)

    def again(tests: Sequence[str], number: int) -> tuple[int, list[Failure]]:
        console.print(f"{len(tests)} failed; once more, on a fresh machine", markup=False)
        return _boot(args, console, place, tests, args.results / f"again-{number}")

    words = ["-k", args.k] if args.k else []
    status, failures = _boot(args, console, place, [*words, *tests], args.results)
    outcome = Outcome(status, failures)
    if failures and args.again:
        outcome = repeat(failures, again, flaky.known())
    for line in outcome.lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if outcome.failures:
        last.write_text(json.dumps({each.test: each.reason for each in outcome.failures}))
    return outcome.status


def _boot(
    args: argparse.Namespace, console: Console, place: Path, arguments: Sequence[str], results: Path
) -> tuple[int, list[Failure]]:
    """Boot once, and return the exit status and which tests failed."""
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="xen-") as directory, Report(console) as report:
        if not place.is_dir():
            report.step("building the dom0 image, which takes some minutes, once")
        image = cached(place.parent, place.name, recipe.build)
        report.step("packing")
        disk = parcel.pack(Path(directory), arguments)
        report.step("booting Xen")
        in_time = run(Machine(image, disk, results / "console.txt"), report.take, args.silence)
        parcel.unpack(disk, results.absolute())
    failures = report.failures if report.status == FAILED else []  # a suite that did not end has more to it
    return _verdict(args, console, report, results, in_time=in_time), failures


def _verdict(args: argparse.Namespace, console: Console, report: Report, results: Path, *, in_time: bool) -> int:
    if report.status is None:
        what = "dom0 ended before the suite" if in_time else f"nothing was said for {args.silence:g} s"
        where = f" in {report.running}" if report.running else ""
        console.print(f"error: {what}{where}; see {results}", markup=False)
        return DIED
    said = {0: "all passed", NO_TESTS: "no test matched", 99: "installing failed, see install.txt"}
    console.print(f"{said.get(report.status, 'failed')}; logs and junit.xml are in {results}", markup=False)
    return report.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
