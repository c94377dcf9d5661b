"""`python -m tests.xen.bed`: boots a real Xen, runs the suite of tests/xen in its dom0, and brings the results back.

Must not do without a word what it was not able to do: where something is missing it says so, and is an error where
success was promised (`--must`, or CI in the environment).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.xen.bed import machine, parcel, recipe
from tests.xen.bed.boot import Machine, run
from tests.xen.bed.image import cache_directory, cached, key_of
from tests.xen.bed.report import Report

DEFAULT_TESTS = ["tests/xen", "tests/contract/test_ports.py", "tests/contract/test_store.py"]
NO_TESTS = 5  # pytest's exit status
SKIPPED, BROKEN = 0, 1
FAILED = 1  # pytest's exit status


def main(argv: Sequence[str]) -> int:
    """Run, and return the exit status: the suite's, or 1 where it did not come to an end."""
    args = _parser().parse_args(argv)
    console = Console()
    place = cache_directory() / f"image-{key_of(recipe.FILES)}"
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
    parser.add_argument(
        "--again",
        action="store_true",
        help="what failed gets another chance on a fresh machine: emulation is not exact",
    )
    parser.add_argument("--results", type=Path, default=Path("build/xen"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("tests", nargs="*", default=DEFAULT_TESTS, help="default: all")
    return parser


def _run(args: argparse.Namespace, console: Console, place: Path) -> int:
    shutil.rmtree(args.results, ignore_errors=True)
    arguments = [*(["-k", args.k] if args.k else []), *args.tests]
    status, failed = _boot(args, console, place, arguments, args.results)
    if failed and args.again:
        console.print(f"{len(failed)} failed; once more, on a fresh machine", markup=False)
        status, failed = _boot(args, console, place, failed, args.results / "again")
    return status


def _boot(
    args: argparse.Namespace, console: Console, place: Path, arguments: list[str], results: Path
) -> tuple[int, list[str]]:
    """Boot once, and return the exit status and which tests failed."""
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="xen-") as directory, Report(console) as report:
        if not place.is_dir():
            report.step("building the dom0 image, which takes some minutes, once")
        image = cached(place.parent, place.name, recipe.build)
        report.step("packing")
        disk = parcel.pack(Path(directory), place.parent, arguments)
        report.step("booting Xen")
        in_time = run(Machine(image, disk, results / "console.txt"), report.take, args.timeout)
        parcel.unpack(disk, results.absolute())
    failed = report.failed if report.status == FAILED else []  # a suite that did not end has more to it
    return _verdict(args, console, report, results, in_time=in_time), failed


def _verdict(args: argparse.Namespace, console: Console, report: Report, results: Path, *, in_time: bool) -> int:
    if report.status is None:
        what = "dom0 ended before the suite" if in_time else f"the suite did not end within {args.timeout:g} s"
        where = f" in {report.running}" if report.running else ""
        console.print(f"error: {what}{where}; see {results}", markup=False)
        return BROKEN
    said = {0: "all passed", NO_TESTS: "no test matched", 99: "installing failed, see install.txt"}
    console.print(f"{said.get(report.status, 'failed')}; logs and junit.xml are in {results}", markup=False)
    return report.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
