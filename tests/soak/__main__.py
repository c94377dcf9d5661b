"""`make soak`: many disks on one service, all under verified load for long, and nothing that grows meanwhile.

Must not kill anything: that is `make chaos`. A run that fails, or has fewer disks than the scoreboard asks for, leaves
no figure. What is measured is how long so many disks were served without an error, a wrong sector, a disk without an
answer for a minute, a worker that ended, or a process that opened more and more.
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests import places
from tests.interruption import INTERRUPTED, heard_once
from tests.soak.guest import PATIENCE_S, SECTORS
from tests.stamp import stamp
from xenbackend.embedded.machine import Machine
from xenbackend.image.create import create

DISKS = 128  # that a figure of the scoreboard is of
_EACH = 16  # disks of a guest
_FIRST_DOMID = 11
# by turns; images lie in memory, so that the disk of a host is not what is measured
_CHAINS = ("aio:{raw}", "log:|aio:{raw}", "qcow2:{qcow2}", "vhd:{vhd}")
_GROWTH = 3  # descriptors that the service may have more of in the end: a client's connection


class SoakError(AssertionError):
    """Something happened that must not."""


class GuestProcess:
    """One guest with its disks, and what it said last."""

    def __init__(self, machine: Machine, directory: Path, number: int, disks: int, seed: int) -> None:
        self.domid = _FIRST_DOMID + number
        self.counts: dict[str, float] = {}
        store = machine.xenstored.add_domain_socket(self.domid)
        machine.store.write(f"/local/domain/{self.domid}/name", f"soak-{number}")
        paths = [
            machine.attach(self.domid, f"xvd{chr(ord('a') + each)}", _chain(directory, self.domid, each)).frontend
            for each in range(disks)
        ]
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "tests.soak.guest", "--directory", str(machine.directory), "--store", store,
                "--domid", str(self.domid), "--seed", str(seed * 1000 + number * _EACH), *paths,
            ],
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C reaches only us, who end it
        )  # fmt: skip

    def hear(self, *expected: str) -> None:
        """Wait for the next thing that it says. Raises: SoakError where that is none of these."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 2 * PATIENCE_S)
        line = self.process.stdout.readline() if ready else ""
        said: dict[str, Any] = json.loads(line) if line else {"event": "silence"}
        if (event := said.pop("event")) not in expected:
            raise SoakError(f"guest {self.domid}: {said.get('problem', event)}")
        self.counts = said
        if event != expected[-1]:
            self.hear(*expected)

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


def main(arguments: Sequence[str]) -> int:
    """Run, print what was seen, and return 0 where nothing was amiss."""
    parser = argparse.ArgumentParser(prog="tests.soak", description="Many disks under verified load, for long.")
    parser.add_argument("--hours", type=float, default=1.0, help="(%(default)s)")
    parser.add_argument("--disks", type=int, default=DISKS, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures there, of a run that has none less"
    )
    args = parser.parse_args(arguments)
    if args.json and args.disks >= DISKS:
        args.json.unlink(missing_ok=True)  # a run that fails has no figures
    try:
        with heard_once():
            figures = run(args.hours, args.disks, args.seed)
    except SoakError as problem:
        print(f"failed with --seed {args.seed}: {problem}")
        return 1
    except KeyboardInterrupt:
        print("interrupted: a run that is not over has no figures")
        return INTERRUPTED
    for name, value in figures.items():
        print(f"{name:<44}{value:g}")
    if args.json and args.disks >= DISKS:
        figures["hours"] = figures[_HOURS]
        args.json.write_text(json.dumps({**figures, **stamp()}, indent=1) + "\n")
    return 0


_HOURS = "hours under load, all disks at once"


def run(hours: float, disks: int, seed: int) -> dict[str, float]:
    """Do it, and return the figures. Raises: SoakError."""
    with ExitStack() as undo:
        directory = undo.enter_context(places.directory(places.MEMORY))
        machine = undo.enter_context(Machine())
        guests = []
        for number, first in enumerate(range(0, disks, _EACH)):
            guests.append(GuestProcess(machine, directory, number, min(_EACH, disks - first), seed))
            undo.callback(guests[-1].end)
        _hear_all(guests, "connected")
        began = time.monotonic()
        _hear_all(guests, "goes on")  # all of them have answers
        before = _descriptors(machine)
        while (passed := time.monotonic() - began) < hours * 3600:
            _hear_all(guests, "goes on")
        after = _descriptors(machine)
        for guest in guests:
            guest.process.terminate()
        _hear_all(guests, "goes on", "ended")
        _compare(before, after)
        if errors := sum(guest.counts["errors"] for guest in guests):
            raise SoakError(f"guests had {errors:g} errors")
        return {
            "disks": disks,
            _HOURS: passed / 3600,
            "requests verified": sum(guest.counts["requests"] for guest in guests),
            "of the disk with the fewest": min(guest.counts["fewest"] for guest in guests),
            "sectors verified": sum(guest.counts["sectors"] for guest in guests),
            "longest time without an answer, s": max(guest.counts["slowest_s"] for guest in guests),
            "descriptors of the service": after["service"],
        }


def _hear_all(guests: Sequence[GuestProcess], *expected: str) -> None:
    for guest in guests:
        guest.hear(*expected)


def _compare(before: dict[str, int], after: dict[str, int]) -> None:
    """See that the same processes run, and have no more open. Raises: SoakError."""
    if before.keys() != after.keys():
        raise SoakError(f"a worker has ended that nobody killed: {sorted(before.keys() ^ after.keys())}")
    if grown := {name: (before[name], count) for name, count in after.items() if count > before[name] + _GROWTH}:
        raise SoakError(f"descriptors, in the beginning and in the end: {grown}")


def _chain(directory: Path, domid: int, number: int) -> str:
    text = _CHAINS[number % len(_CHAINS)]
    kind = next(each for each in ("raw", "qcow2", "vhd") if f"{{{each}}}" in text)
    file = directory / f"{domid}-{number}.{kind}"
    create(kind, str(file), SECTORS * 512)
    return text.format(**{kind: file})


def _descriptors(machine: Machine) -> dict[str, int]:
    """Return how many descriptors the service has, and each worker, by its disk and process."""
    status = machine.ask({"verb": "status"})["data"]
    found = {f"{each['vbd']} {each['worker']}": _count(each["worker"]) for each in status}
    return {"service": _count(machine.service_pid), **found}


def _count(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
