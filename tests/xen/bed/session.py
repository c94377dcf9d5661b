"""One run of tests: a machine for each share of them, side by side, and the outcome of all.

Must not choose the shares, nor what is run again.

A machine has one CPU as a rule. With two, a CPU that waits for a lock of the other one spins while the host lets that
one wait: beside a busy neighbour a test took up to fourteen times as long.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from tests.xen.bed import parcel, recipe
from tests.xen.bed.again import FAILED, PASSED
from tests.xen.bed.boot import Machine, run
from tests.xen.bed.image import cached
from tests.xen.bed.release import Release
from tests.xen.bed.report import Failure, Report

NO_TESTS = 5  # pytest's exit status
DIED = 98  # the machine, before pytest had a status
_SAID = {PASSED: "all passed", NO_TESTS: "no test matched", 99: "installing failed, see install.txt"}


@dataclass(frozen=True, slots=True)
class Bed:
    """What the machines have in common.

    Attributes:
        console: shows what happens.
        release: what the machines boot.
        place: of the image, which is built if it is missing.
        words: for pytest, besides the tests.
        cpus: of each machine.
        silence_s: how long a machine may print nothing, in seconds of its own time.
    """

    console: Console
    release: Release
    place: Path
    words: Sequence[str]
    cpus: int
    silence_s: float

    def run(self, shares: Sequence[Sequence[str]], results: Path) -> tuple[int, list[Failure]]:
        """Run each share of tests on a machine of its own; return the exit status of all, and which tests failed.

        Raises: CalledProcessError, if the image or a parcel cannot be made.
        """
        stop = threading.Event()
        with (
            tempfile.TemporaryDirectory(prefix="xen-") as directory,
            self.console.status("packing") as spinner,
            ThreadPoolExecutor(len(shares)) as pool,
        ):
            image = self._image()
            places = [
                results / f"machine-{number}" if len(shares) > 1 else results for number in range(1, len(shares) + 1)
            ]
            running = []
            try:
                for number, (tests, place) in enumerate(zip(shares, places, strict=True), 1):
                    place.mkdir(parents=True, exist_ok=True)
                    (inside := Path(directory, f"{number}")).mkdir()
                    disk = parcel.pack(inside, [*self.words, *tests])
                    report = Report(self.console, spinner, label=f"{number} " if len(shares) > 1 else "")
                    running.append(
                        pool.submit(self._boot, Machine(image, disk, place / "console.txt", self.cpus), report, stop)
                    )
                ended = [each.result() for each in running]
            except BaseException:
                stop.set()
                raise
        failures = [failure for status, failures in ended if status == FAILED for failure in failures]
        return together([status for status, _ in ended]), failures

    def _image(self) -> Path:
        if not self.place.is_dir():
            what = f"the image of {self.release.suite} with Xen {self.release.xen}"
            self.console.print(f"building {what}, which takes some minutes, once", markup=False)
        return cached(self.place.parent, self.place.name, partial(recipe.build, self.release))

    def _boot(self, machine: Machine, report: Report, stop: threading.Event) -> tuple[int, list[Failure]]:
        report.step(f"booting Xen {self.release.xen}")
        in_time = run(machine, report.take, self.silence_s, stop)
        results = machine.console.parent.absolute()
        parcel.unpack(machine.parcel, results)
        if report.status is None and stop.is_set():
            report.step(f"switched off{f' in {report.running}' if report.running else ''}; its logs are in {results}")
            return DIED, []
        if report.status is None:
            what = "dom0 ended before the suite" if in_time else f"nothing was said for {self.silence_s:g} s"
            where = f" in {report.running}" if report.running else ""
            report.step(f"error: {what}{where}; see {results}")
            return DIED, []
        report.step(f"{_SAID.get(report.status, 'failed')}; logs and junit.xml are in {results}")
        return report.status, report.failures


def together(statuses: Sequence[int]) -> int:
    """Return one status for all machines: the worst; machines without tests do not count."""
    counted = [status for status in statuses if status != NO_TESTS] or [NO_TESTS]
    return max(counted)
