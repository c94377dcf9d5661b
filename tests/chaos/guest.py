"""A guest as a process of its own: connects to its disk, and compares every sector that it reads until told to end.

Must not know what happens to the backend. It prints one line of JSON when it is connected and one when it has ended;
the times of its answers are in a file that others map.
"""

from __future__ import annotations

import argparse
import json
import mmap
import select
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tests.chaos.plan import Disk
from tests.full_rings import FullRings
from tests.workload import Load, make_model, read_all
from xenbackend.blkif.abi import BLKIF_MAX_SEGMENTS_PER_REQUEST, LAYOUTS
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.rig.guest import Guest
from xenbackend.supervisor.xenstore.store import Store

PAGES = 8192
PATIENCE_S = 60.0  # for one answer
# By turns: requests of every kind; full rings of requests for one page, which are most requests; a few of requests for
# many pages, mostly reads, which verify most of the sectors: eleven for each request of all.
REQUESTS, ROUNDS, ROUNDS_OF_MANY = 64, 64, 6
# words of the file: time of the last answer in ns; requests begun, answered, answered before the oldest that is not
LAST, BEGUN, ANSWERED, SETTLED = range(4)


class Clock:
    """Notes when answers came, for others to see, and the longest time without one."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")
        self.longest_s, self.longest_at = 0.0, 0

    def tick(self, loads: list[Load | FullRings]) -> None:
        """Take note of answers that came just now; only one of a guest's `loads` has requests in flight."""
        now = time.monotonic_ns()
        passed_s = (now - self._words[LAST]) / 1e9
        if self._words[LAST] and passed_s > self.longest_s:
            self.longest_s, self.longest_at = passed_s, now
        self._words[LAST] = now
        self._words[BEGUN] = sum([load.begun for load in loads])
        self._words[ANSWERED] = sum([load.finished for load in loads])
        self._words[SETTLED] = sum([load.settled for load in loads])


def main(arguments: list[str]) -> int:
    """Run until SIGTERM, then verify the whole disk, leave a copy of it, and print how it went."""
    parser = argparse.ArgumentParser()
    for name in ("directory", "store", "frontend", "disk", "clock", "content"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--domid", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args(arguments)
    is_over: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: is_over.append(1))
    clock = Clock(Path(args.clock))
    disk = Disk(**json.loads(args.disk))
    try:
        counts = _serve(args, disk, clock, is_over)
    except Exception as problem:
        _say(event="failed", problem=f"{type(problem).__name__}: {problem}")
        return 1
    _say(event="ended", longest_s=clock.longest_s, longest_at=clock.longest_at, **counts)
    return 0


def _serve(args: argparse.Namespace, disk: Disk, clock: Clock, is_over: list[int]) -> dict[str, int]:
    wishes = Wishes(
        layout=LAYOUTS[disk.protocol],
        ring_order=disk.ring_order,
        queues=disk.queues,
        persistent=disk.persistent,
        indirect=disk.indirect,
        discard=disk.discard,
    )
    frontend = Frontend(Guest(Path(args.directory), args.domid, PAGES), Store(args.store), args.frontend, wishes)
    frontend.connect(PATIENCE_S)
    frontend._idle = lambda timeout_s: _sleep(frontend, timeout_s)  # xenstore may be away from now on
    _say(event="connected", disk=asdict(disk))
    model = make_model(args.seed, disk.sectors, can_discard=frontend.facts.can_discard, first=disk.first)
    loads: list[Load | FullRings] = []
    full = partial(FullRings, frontend, model, PATIENCE_S, lambda _: clock.tick(loads))
    single, many = full(), full(pages=BLKIF_MAX_SEGMENTS_PER_REQUEST, most_writes=0.1)
    load = Load(frontend, model, PATIENCE_S, lambda _: clock.tick(loads))
    loads += [single, many, load]
    while not is_over:
        load.run(REQUESTS)
        load.finish()
        for rings in [single] * ROUNDS + [many] * ROUNDS_OF_MANY:
            if not is_over:
                rings.run(1)
    # like every read before, this raises at the first sector that is not what it must be
    with Path(args.content).open("wb") as file:
        read_all(frontend, model, file.write)
    requests = sum(each.finished for each in loads)
    return {"requests": requests, "sectors": model.verified, "errors": model.failures, "is_timed": disk.is_timed}


def _sleep(frontend: Frontend, timeout_s: float) -> None:
    poll = select.poll()
    for ring in frontend.rings:
        poll.register(ring.port.fileno(), select.POLLIN)
    poll.poll(timeout_s * 1000)


def _say(**event: object) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
