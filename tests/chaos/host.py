"""The host of a chaos run: a machine, guests as processes, and what can be done to everything below them.

Must not choose what is done, nor judge it.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

from tests import luks_images, places
from tests.chaos.engines import KINDS, Cluster, NbdServers
from tests.chaos.guest import ANSWERED, BEGUN, LAST, SETTLED
from tests.chaos.orders import Desk
from tests.chaos.plan import LUKS, ORDERS, Disk, Step, content, disks, has_unnamed, is_ordered_of
from xenbackend.block.spec import parse_chain
from xenbackend.embedded.machine import Machine
from xenbackend.errors import XenbackendError
from xenbackend.image.compare import compare
from xenbackend.image.create import create
from xenbackend.image.names import image_of_file
from xenbackend.rig.pattern import make
from xenbackend.supervisor.xenstore.paths import VbdPath

PATIENCE_S = 60.0  # for anything that must happen eventually
FIRST_DOMID = 11
PAUSE_S = 0.001  # between two looks
REST_S = 0.05


def pause(seconds: float) -> None:
    """Let other processes run for a while: the moment of a step is what a chaos run varies."""
    select.select([], [], [], seconds)


class ChaosError(AssertionError):
    """Something happened that must not happen."""


class GuestProcess:
    """One guest and its disk."""

    def __init__(self, machine: Machine, directory: Path, number: int, disk: Disk, seed: int) -> None:
        self.disk = disk
        self.domid = FIRST_DOMID + number
        self.vbd = f"{self.domid}/xvda"
        self.images = directory  # where its snapshots go
        self.rests = False  # an administrator has paused its disk, or is about to do so
        self.rested_ns = 0  # when that was over
        store = machine.xenstored.add_domain_socket(self.domid)
        machine.store.write(f"/local/domain/{self.domid}/name", f"chaos-{number}")
        self.path: VbdPath = machine.attach(self.domid, "xvda", disk.chain)
        self.content = directory / f"content-{number}"  # of its disk, once it has ended
        clock = directory / f"clock-{number}"
        clock.write_bytes(bytes(mmap.PAGESIZE))
        with clock.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "tests.chaos.guest",
                "--directory", str(machine.directory), "--store", store, "--frontend", self.path.frontend,
                "--disk", json.dumps(asdict(disk)), "--clock", str(clock), "--content", str(self.content),
                "--domid", str(self.domid), "--seed", str(guest_seed(seed, number)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C reaches only us, who end it
        )  # fmt: skip

    @property
    def last_answer_ns(self) -> int:
        """The time of its last answer, in ns of the host's monotonic clock."""
        return self._words[LAST]

    @property
    def begun(self) -> int:
        """How many requests it had begun when it last had an answer."""
        return self._words[BEGUN]

    @property
    def answers(self) -> int:
        """How many of them were answered."""
        return self._words[ANSWERED]

    @property
    def settled(self) -> int:
        """How many of them were answered before the oldest that was not."""
        return self._words[SETTLED]

    def hear(self) -> dict[str, Any]:
        """Return the next event that it prints. Raises: ChaosError, if it is neither connected nor ended."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 2 * PATIENCE_S)
        line = self.process.stdout.readline() if ready else ""
        said: dict[str, Any] = json.loads(line) if line else {"event": "silence"}
        if said["event"] not in ("connected", "ended"):
            raise ChaosError(f"guest {self.vbd} ({self.disk.chain}): {said.get('problem', said['event'])}")
        return said

    def check(self) -> None:
        """Check that it still runs. Raises: ChaosError."""
        if self.process.poll() is not None:
            self.hear()
            raise ChaosError(f"guest {self.vbd} has ended")


class Host:
    """A machine with guests under load. Use it as a context manager."""

    def __init__(self, guests: int, seed: int, slow: Path, engine: str = "") -> None:
        """Prepare; images that are to be on a real disk are below `slow`. With an engine, the disks are its own."""
        self._engine = engine
        self._engines: NbdServers | Cluster | None = None
        self.guests: list[GuestProcess] = []
        self._count, self._seed, self._slow = guests, seed, slow
        self._random = Random(seed)
        self._undo = ExitStack()
        self.actions: dict[str, Callable[[GuestProcess], None]] = {
            "kill a worker": self._kill_worker,
            "kill every worker": self._kill_all,
            "kill a worker twice": self._kill_worker_twice,
            "kill the service": self._kill_service,
            "kill both": self._kill_both,
            "stop a worker for a moment": self._stop_worker,
            "replace the service": self._replace_service,
            ORDERS: self._order,
            "xenstore goes away": self._lose_xenstore,
        }
        self.kills = {"workers": 0, "services": 0}

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            directory = undo.enter_context(places.directory(places.MEMORY))
            self.log = directory / "service.log"
            settings = directory / "settings.toml"
            settings.write_text(f'scratch = "{directory}"\n')
            self.machine = undo.enter_context(Machine(log=self.log, config=settings))
            if self._engine:
                engines = undo.enter_context(KINDS[self._engine](directory / "engine", self._seed))
                self._add(engines)
                plan = engines.disks[: self._count]
            else:
                plan = disks(directory, self._slow, _make_image)[: self._count]
            for number, disk in enumerate(plan):
                if disk.first:  # what only `cow:` has must not look like what is below
                    image = Path(disk.chain.rpartition(":")[2])
                    image.write_bytes(make(guest_seed(self._seed, number), 0, [disk.first] * disk.sectors))
                guest = GuestProcess(self.machine, directory, number, disk, self._seed)
                undo.callback(_end, guest.process)
                self.guests.append(guest)
            for guest in self.guests:
                guest.hear()
            self.desk = Desk(self.machine.control, self.machine.xenstored.address, self._ask)
            undo.callback(self.desk.close)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _add(self, engines: NbdServers | Cluster) -> None:
        """Add the actions on servers, and on the links to them."""
        self._engines = engines

        def act(name: str, guest: GuestProcess) -> None:
            engines.actions[name](self.guests.index(guest), self._ask)
            self.kills["servers"] = engines.kills

        self.actions |= {name: partial(act, name) for name in engines.actions}

    def is_timed(self, number: int, since_ns: int) -> bool:
        """Return whether a guest's waits since then say how long we take, and not its disk's faults or link."""
        is_slowed = self._engines is not None and self._engines.is_slowed(number, since_ns)
        return self.guests[number].disk.is_timed and not is_slowed

    def link_faults(self) -> dict[str, int]:
        """Return how often connections had each fault; empty without links."""
        return {} if self._engines is None else self._engines.counts()

    @property
    def answers(self) -> int:
        """How many requests of all guests were answered."""
        return sum(guest.answers for guest in self.guests)

    def rest(self) -> None:
        """Leave the guests alone for a moment. Raises: ChaosError if one has ended."""
        pause(REST_S)
        for guest in self.guests:
            guest.check()

    def missed_wakeups(self) -> int:
        """Return how many requests only the safety poll has found; the counters outlive the workers."""
        return sum(int(each["counters"].get("missed_wakeups", 0)) for each in self._ask({"verb": "status"}))

    def finish(self) -> list[dict[str, Any]]:
        """Have the guests verify their disks and end; return the last event of each. Raises: ChaosError.

        Unnamed files get a name first: otherwise they would be gone before they are compared.
        """
        self.desk.finish()
        for guest in self.guests:
            if has_unnamed(self.desk.chain(guest.vbd) or guest.disk.chain):
                self.desk.keep(guest)
        for guest in self.guests:
            guest.process.terminate()
        ends = [guest.hear() for guest in self.guests]
        chains = {guest: self.desk.chain(guest.vbd) or guest.disk.chain for guest in self.guests}
        self.machine.stop_service()
        for guest, chain in chains.items():  # what an administrator would write into its vm.cfg
            self._compare(guest, chain)
        return ends

    def _compare(self, guest: GuestProcess, chain: str) -> None:
        """Check that a chain has the content that the guest read from its disk at the end."""
        stored, seen = parse_chain(content(chain)), parse_chain(f"aio:{guest.content}")
        differs_at = compare(stored, seen, lambda *_: None).differs_at
        if differs_at is not None:
            self.desk.tally.lies.append(
                f"{guest.vbd}: {chain} is in service, and differs at {differs_at} from its disk"
            )

    def do(self, step: Step) -> int:
        """Carry out a step, and return when it was done, in ns. Raises: ChaosError."""
        guest = self.guests[step.guest]
        pause(step.after_s)  # at any moment
        self.actions[step.action](guest)
        return time.monotonic_ns()

    def wait_for_answers(self, since_ns: int) -> dict[int, float]:
        """Wait until every guest has had an answer since then; return the seconds that each took, by its number.

        Guests whose disk an administrator paused meanwhile are left out. Raises: ChaosError.
        """
        waiting = dict(enumerate(self.guests))
        took: dict[int, float] = {}
        give_up = time.monotonic() + PATIENCE_S
        while waiting:
            for number, guest in list(waiting.items()):
                guest.check()
                if guest.rests or guest.rested_ns > since_ns:
                    del waiting[number]
                elif guest.last_answer_ns > since_ns:
                    took[number] = (guest.last_answer_ns - since_ns) / 1e9
                    del waiting[number]
            if waiting and time.monotonic() > give_up:
                stuck = ", ".join(f"{guest.vbd} ({guest.disk.chain})" for guest in waiting.values())
                raise ChaosError(f"no answer for {PATIENCE_S:g} s: {stuck}\n{self._last_words()}")
            pause(PAUSE_S)
        return took

    def wait_until_settled(self) -> None:
        """Wait until every guest has had an answer to each request that it has begun so far. Raises: ChaosError.

        Otherwise worker after worker may die while one slow request is in flight: for us each death follows answers,
        but the service takes that request for one that kills its workers.
        """
        begun = [(guest, guest.begun) for guest in self.guests]
        give_up = time.monotonic() + PATIENCE_S
        while waiting := [guest for guest, count in begun if guest.settled < count and not guest.rests]:
            for guest in waiting:
                guest.check()
            if time.monotonic() > give_up:
                stuck = ", ".join(f"{guest.vbd} ({guest.disk.chain})" for guest in waiting)
                raise ChaosError(f"a request was not answered for {PATIENCE_S:g} s: {stuck}\n{self._last_words()}")
            pause(PAUSE_S)

    def _last_words(self) -> str:
        with suppress(XenbackendError):
            status = self.machine.ask({"verb": "status"})["data"]
            lines = [f"{each['vbd']} {each['phase']} {each['worker']} {each['error']}" for each in status]
            return "\n".join([*lines, *self.log.read_text().splitlines()[-20:]])
        return "\n".join(self.log.read_text().splitlines()[-20:])

    def _ask(self, request: dict[str, Any]) -> Any:
        """Ask the service, which may just be starting again."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.machine.ask(request)["data"]
            except (XenbackendError, ValueError) as problem:  # also one that ends while it answers
                if time.monotonic() > give_up:
                    raise ChaosError(f"the service does not answer: {problem}\n{self._last_words()}") from problem
                pause(PAUSE_S)

    def _worker(self, guest: GuestProcess) -> int:
        """Return the process that serves a guest, once there is one."""
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up:
            for each in self._ask({"verb": "status"}):
                if each["domid"] == guest.domid and each["worker"]:
                    return int(each["worker"])
            pause(PAUSE_S)
        raise ChaosError(f"nobody serves {guest.vbd}\n{self._last_words()}")

    def _kill_worker(self, guest: GuestProcess) -> None:
        self._kill("workers", self._worker(guest))

    def _kill(self, kind: str, pid: int) -> None:
        with suppress(ProcessLookupError):  # it may have ended since it was asked for
            os.kill(pid, signal.SIGKILL)
            self.kills[kind] += 1

    def _kill_all(self, _guest: GuestProcess) -> None:
        for each in self._ask({"verb": "status"}):
            if each["worker"]:
                self._kill("workers", int(each["worker"]))

    def _kill_worker_twice(self, guest: GuestProcess) -> None:
        """Kill a worker, and its successor at whatever point it has reached."""
        first = self._worker(guest)
        self._kill_worker(guest)
        give_up = time.monotonic() + PATIENCE_S
        while self._worker(guest) == first and time.monotonic() < give_up:
            pass
        self._kill_worker(guest)

    def _kill_service(self, _guest: GuestProcess) -> None:
        self._kill("services", int(self._ask({"verb": "ping"})["pid"]))

    def _kill_both(self, guest: GuestProcess) -> None:
        service, worker = int(self._ask({"verb": "ping"})["pid"]), self._worker(guest)
        self._kill("services", service)
        self._kill("workers", worker)

    def _stop_worker(self, guest: GuestProcess) -> None:
        pid = self._worker(guest)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            pause(0.05)
            os.kill(pid, signal.SIGCONT)

    def _replace_service(self, _guest: GuestProcess) -> None:
        before = int(self._ask({"verb": "ping"})["pid"])
        self.machine.replace_service()
        give_up = time.monotonic() + PATIENCE_S
        while int(self._ask({"verb": "ping"})["pid"]) == before:
            if time.monotonic() > give_up:
                raise ChaosError("the service was not replaced")
            pause(PAUSE_S)

    def _order(self, guest: GuestProcess) -> None:
        """Have administrators give orders about this disk and others, without waiting for them."""
        for each in self.guests:
            if each is guest or is_ordered_of(self._random):
                self.desk.order(each, self._random)

    def _lose_xenstore(self, _guest: GuestProcess) -> None:
        self.machine.xenstored.stop()
        pause(0.05)
        self.machine.xenstored.start()
        self.machine.store.close()
        self.machine.store.reconnect()


def guest_seed(seed: int, number: int) -> int:
    """Return the seed of a guest's data."""
    return seed * 100 + number


def _make_image(kind: str, file: Path) -> None:
    if kind in LUKS:
        raw = file if LUKS[kind] == "aio" else file.with_suffix(".raw")
        raw.write_bytes(luks_images.luks2(luks_images.Made(bytes(4 << 20))))
        if raw != file:  # over the encrypted image, which so becomes a parent
            create(LUKS[kind], str(file), None, parent=image_of_file("raw", str(raw)))
        return
    create(kind, str(file), 4 << 20)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()
