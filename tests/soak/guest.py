"""A guest of a soak, as a process of its own: sixteen disks at most, all loaded at once, every sector compared.

Must not wait for one disk while another one has answered. It says one line of JSON when it is connected, one now and
then, and one when it has ended.
"""

from __future__ import annotations

import argparse
import json
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.full_rings import FullRings
from tests.workload import Load, make_model, read_all
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.rig.guest import Guest as Memory
from xenbackend.supervisor.xenstore.store import Store

PAGES = 8192
SECTORS = 2048  # of a disk
DEPTH = 4  # requests of any kind that a disk has in flight
# By turns: requests of every kind, and full rings of whole pages, which are most of the requests.
REQUESTS, ROUNDS = 64, 64
PATIENCE_S = 60.0  # for one answer
TELL_S = 5.0


class LoadedDisk:
    """One disk, kept busy."""

    def __init__(self, frontend: Frontend, path: str, seed: int) -> None:
        self.frontend = frontend
        self.path = path
        self.model = make_model(seed, SECTORS, can_discard=frontend.facts.can_discard)
        self.load = Load(frontend, self.model)
        self.rings = FullRings(frontend, self.model)
        self.answered_at = time.monotonic()
        self._turns = self._take_turns()

    @property
    def finished(self) -> int:
        """How many requests were answered."""
        return self.load.finished + self.rings.finished

    def step(self) -> bool:
        """Ask for more, and take what is answered; return whether there may be more at once. Raises: WrongData."""
        if next(self._turns):
            self.answered_at = time.monotonic()
            return True
        return False

    def finish(self) -> None:
        """Wait for all that is in flight, and read all of the disk. Raises: WrongData and others."""
        self.load.finish()
        self.rings.finish()
        read_all(self.frontend, self.model)

    def _take_turns(self) -> Iterator[int]:
        """Ask for more, again and again, and yield how many answers have come, instead of waiting."""
        load, rings = self.load, self.rings
        while True:
            end = load.begun + REQUESTS
            while load.settled < end:
                load.top_up(min(end - load.begun, DEPTH - (load.begun - load.finished)))
                yield load.take()  # which pushes what was asked for
            for _ in range(ROUNDS):
                rings.begin()
                while rings.settled < rings.begun:
                    yield rings.take()


class Guest:
    """All disks of one guest."""

    def __init__(self, memory: Memory, store: Store, frontends: list[str], seed: int) -> None:
        """Connect them."""
        self.slowest_s = 0.0
        self.disks: list[LoadedDisk] = []
        self._poll = select.poll()
        self._by_port: dict[int, LoadedDisk] = {}
        for number, path in enumerate(frontends):
            frontend = Frontend(memory, store, path, Wishes(persistent=number % 2 == 0, queues=1 + number % 4 // 2))
            frontend.connect(PATIENCE_S)
            self.disks.append(LoadedDisk(frontend, path, seed + number))
            for ring in frontend.rings:
                self._by_port[ring.port.fileno()] = self.disks[-1]
                self._poll.register(ring.port.fileno(), select.POLLIN)

    def run(self, is_over: list[int]) -> None:
        """Keep all of them busy, and say so now and then. Raises: WrongData, TimeoutError and others."""
        busy, told_at = set(self.disks), time.monotonic()
        for disk in self.disks:  # it has waited for the others to connect
            disk.answered_at = told_at
        while not is_over:
            busy |= {self._by_port[fd] for fd, _ in self._poll.poll(0 if busy else 1000)}
            busy = {disk for disk in busy if disk.step()}
            self._see_answers()
            if time.monotonic() - told_at > TELL_S:
                told_at = time.monotonic()
                _say(event="goes on", **self.counts())

    def finish(self) -> None:
        """Read all of each disk. Raises: WrongData and others."""
        for disk in self.disks:
            disk.finish()

    def counts(self) -> dict[str, float]:
        """Return what was done."""
        return {
            "requests": sum(disk.finished for disk in self.disks),
            "fewest": min(disk.finished for disk in self.disks),
            "sectors": sum(disk.model.verified for disk in self.disks),
            "errors": sum(disk.model.failures for disk in self.disks),
            "slowest_s": self.slowest_s,
        }

    def _see_answers(self) -> None:
        now = time.monotonic()
        for disk in self.disks:
            self.slowest_s = max(self.slowest_s, now - disk.answered_at)
            if now - disk.answered_at > PATIENCE_S:
                raise TimeoutError(f"{disk.path} has not answered for {PATIENCE_S:g} s")


def main(arguments: list[str]) -> int:
    """Run until SIGTERM, then read all of each disk; say how it went."""
    parser = argparse.ArgumentParser()
    for name in ("directory", "store"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--domid", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("frontends", nargs="+")
    args = parser.parse_args(arguments)
    is_over: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: is_over.append(1))
    try:
        _serve(args, is_over)
    except Exception as problem:
        _say(event="failed", problem=f"{type(problem).__name__}: {problem}")
        return 1
    return 0


def _serve(args: argparse.Namespace, is_over: list[int]) -> None:
    memory = Memory(Path(args.directory), args.domid, PAGES)
    guest = Guest(memory, Store(args.store), args.frontends, args.seed)
    _say(event="connected")
    guest.run(is_over)
    guest.finish()
    _say(event="ended", **guest.counts())


def _say(**event: object) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
