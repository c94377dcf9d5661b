"""The whole model in one process, and the scheduler, which chooses what happens next.

Must not sleep, nor let anything but the seed decide.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tests.model import checks, seams
from tests.model.fleet import WorkerProcess
from tests.model.guests import Place
from tests.model.images import LARGEST, Images
from tests.model.machine import Clock, Died, Loop, Machine
from tests.model.openers import LocalOpener
from tests.model.operators import Administrator, Asking, Judge, existing
from tests.model.service import ServiceProcess
from tests.model.xenstore import Xenstored
from xenbackend.supervisor.vbd.vbd_log import UNFINISHED
from xenbackend.supervisor.xenstore.paths import VbdPath

if TYPE_CHECKING:
    import socket

PLACES = 3
_UNDER_WAY = re.compile("([a-z]+) is under way, order")
ADMINISTRATORS = 3
_REST_S = 1.0  # before a service that could not start is started again
_SETTLED_S = 65.0  # more than any limit of the product


class Wrong(Exception):
    """The run found something wrong; the text says all of it."""


class World:
    """Everything that there is.

    notes      how often each thing happened
    faults     sentences about what was wrong
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.random = Random(seed)
        self.clock = Clock()
        self.machine = Machine(f"model-{seed}-{directory.name}")
        self.xenstored = Xenstored()
        self.images = Images(directory, self.random)
        self.notes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.log: list[dict[str, Any]] = []
        self.control = str(directory / "control.sock")
        self.existing_file = existing(directory / "taken")
        self.small_file = str(directory / "small")
        Path(self.small_file).write_bytes(bytes(4096))
        self.kept: dict[str, int] = {}
        self.places = [Place(self, VbdPath("vbd", 0, 5 + number, 51712)) for number in range(PLACES)]
        self.administrators = [Administrator(self) for _ in range(ADMINISTRATORS)]
        self.judge = Judge(self)
        self.workers: list[WorkerProcess] = []
        self.service: ServiceProcess | None = None
        self.orders = 0  # given
        self.answered = 0  # requests of guests
        self.steps = 0
        self.is_calm = False  # nobody is killed, nothing goes away, nothing new is begun
        self._pipes: dict[int, WorkerProcess] = {}
        self._spares: list[int] = []
        self.openers: dict[int, LocalOpener] = {}  # by the inode of the socket that their worker has
        self._pids = 1 << 23  # no process has such a number
        self._lives: dict[int, tuple[Place, int]] = {}  # of a vbd, by its journal's inode
        self._limit = 0
        self._read = 0  # of the log
        self._start_at = 0.0  # of the next service

    # for the other modules

    def note(self, what: str) -> None:
        """Count what happened."""
        self.notes[what] += 1

    def blame(self, sentence: str) -> None:
        """Take note of a fault."""
        self.faults.append(f"step {self.steps}: {sentence}")

    def new_loop(self, on_bug: Callable[[Exception], None] | None) -> Loop:
        """Return the loop of a process."""
        return Loop(self.clock, self.random.randrange, on_bug)

    def point(self, name: str) -> None:
        """Perhaps kill the running process at this point."""
        running = self.machine.running
        if self.is_calm or running is None:
            return
        self.notes[f"reached: {name}"] += 1
        if self.random.random() < 0.004:
            self.note(f"killed: {name}")
            running.is_dead = True
            raise Died(name)

    def before_operation(self, operation: str) -> None:
        """Be at the kill point before an operation of the service on xenstore."""
        self.point(f"service: before {operation.lower().replace('_', ' ')} in xenstore")

    def can_be_asked(self) -> bool:
        """Return whether a service listens at the control socket."""
        return os.path.exists(self.control)  # noqa: PTH110 - a text

    def may_order(self) -> bool:
        """Return whether an administrator may give another order."""
        return not self.is_calm and self.orders < self._limit

    def ask(self, request: dict[str, Any], place: Place | None) -> Asking | None:
        """Send a request to the service; None if nobody listens."""
        try:
            asking = Asking(self, request, place)
        except OSError:
            return None
        if request["verb"] != "hotplug":
            self.orders += 1
        return asking

    def read_answer(self, asking: Asking, answer: dict[str, Any]) -> None:
        """Take note of an answer that came."""
        self.note(f"answer: {asking.request['verb']} {answer['code']}")
        if answer["code"] == "busy" and (found := _UNDER_WAY.match(answer.get("error", ""))):
            self.note(f"barred: {asking.request['verb']} by {found[1]}")
        if answer["code"] == "bug":
            self.blame(f"{asking.request} was answered by a bug: {answer.get('error')}")
        if (answer["code"] == "ok") != ("error" not in answer):
            self.blame(f"{asking.request} was answered {answer}")

    # workers

    def new_worker(self, far: socket.socket) -> int:
        """Make a worker at the other end of a socket, and return its pidfd."""
        reading, writing = os.pipe()
        with self.machine.outside():
            self._spares.append(os.dup(reading))  # so that no other pipe gets the inode
        self._pids += 1
        worker = WorkerProcess(self, far, writing, self._pids)
        self._pipes[os.fstat(reading).st_ino] = worker
        self.workers.append(worker)
        return reading

    def process_of(self, pidfd: int) -> WorkerProcess:
        """Return the worker of a pidfd."""
        return self._pipes[os.fstat(pidfd).st_ino]

    def send_kill(self, worker: WorkerProcess) -> None:
        """Send SIGKILL as the service does: it may take a moment."""
        worker.is_dying = True

    def has_ended(self, worker: WorkerProcess) -> None:
        """Take note that a worker has ended."""
        if worker in self.workers:
            self.workers.remove(worker)
        place = self.place_of(worker)
        if place is not None:
            place.lost_worker()

    def orders_open(self, order: Any, journal_fd: int) -> None:
        """Take note for which life of a vbd the service has a worker open a chain."""
        place = next(each for each in self.places if str(each.path) == order.vbd)
        self._lives.setdefault(os.fstat(journal_fd).st_ino, (place, place.life))

    def is_to_open(self, journal_fd: int) -> None:
        """Take note that the running worker takes that order."""
        worker = self.machine.running
        assert isinstance(worker, WorkerProcess)
        place, life = self._lives[os.fstat(journal_fd).st_ino]
        worker.vbd = f"{place}#{life}"

    def place_of(self, worker: WorkerProcess) -> Place | None:
        """Return the place that a worker serves, None if that life is over."""
        return next((each for each in self.places if each.is_there and f"{each}#{each.life}" == worker.vbd), None)

    def worker_of(self, place: Place) -> WorkerProcess | None:
        """Return the worker of a place's present life."""
        return next((each for each in self.workers if each.vbd == f"{place}#{place.life}"), None)

    def serves(self, worker: WorkerProcess, chain: str, how: str) -> None:
        """Check whether a worker may serve a chain from now on."""
        place = self.place_of(worker)
        if place is None or place.truth is None:
            return
        place.poll()  # answers so far came through the former chain
        truth = place.truth
        if chain == truth.chain:
            return
        if chain not in truth.targets.values():
            self.blame(f"{place}: {how} {chain}, which nobody ordered; {truth.chain} is in service")
        if self.images.of_chain(chain) is not self.images.of_chain(truth.chain):
            place.leave_image(self.images.of_chain(truth.chain))
        truth.chain = chain

    # the service

    def vbd_of(self, place: Place) -> Any:
        """Return the service's object for a place, None if there is none."""
        service = self.service.service if self.service is not None else None
        return service._registry.vbds.get(place.path) if service is not None else None

    def place_of_vbd(self, vbd: Any) -> Place | None:
        """Return the place of one of the service's vbds, None if that life is over."""
        inode = os.fstat(vbd.handover._journal).st_ino
        place = next((each for each in self.places if each.path == vbd.path), None)
        if place is None or not place.is_there:
            return None
        return place if self._lives.get(inode, (place, place.life))[1] == place.life else None

    def has_opened(self, worker: WorkerProcess, chain: str) -> None:
        """Check whether a worker may have opened a chain."""
        place = self.place_of(worker)
        if (
            place is not None
            and place.truth is not None
            and chain not in (place.truth.chain, *place.truth.targets.values())
        ):
            self.blame(f"{place}: a worker opens {chain}, which nobody ordered; {place.truth.chain} is in service")

    def has_branched(self, worker: WorkerProcess, former: str, file: str, chain: str) -> None:
        """Take note of the image `file` that a worker has made over its own; `chain` would serve through it."""
        parent = self.images.of_chain(former)
        if parent is not None:
            self.images.branched(chain, parent)
        place = self.place_of(worker)
        if place is not None and place.truth is not None:
            place.truth.targets[file] = chain

    def ends(self, place: Place) -> None:
        """Take note that a life of a vbd is over."""

    def check_closed(self, place: Place) -> None:
        """Check that no worker has the image any more: the backend's state is Closed."""
        worker = self.worker_of(place)
        if worker is not None and worker.chain:
            self.blame(f"{place}: our state is Closed, and worker {worker.pid} has {worker.chain} open")

    def service_is_over(self, service: ServiceProcess, *, rests: bool = False) -> None:
        """Take note that the service has ended or died; `rests`: a while passes before it is started again."""
        for opener in self.openers.values():
            opener.lose_service()
        if self.service is service:
            self.service = None
            self._start_at = self.clock.now + (_REST_S if rests else 0.0)

    # what happens

    def run(self, orders: int) -> None:
        """Have so many orders given, and let everything come to rest. Raises: Wrong."""
        self._limit = orders
        with seams.applied(self):
            self._begin()
            while self.orders < orders and not self.faults:
                self._step()
            if not self.faults:
                self._settle()
            self._close()
        if self.faults:
            raise Wrong("\n".join(self.faults))

    def _begin(self) -> None:
        for place in self.places:
            place.attach(self._new_chain(place))
        self.service = ServiceProcess(self)

    def _new_chain(self, place: Place) -> str:
        """Return a chain for a disk that is attached: its own image, or another one."""
        if place.base is None or self.random.random() < 0.3:
            place.base = self.images.make_raw()
        chain = place.last_chain if place.last_chain and self.random.random() < 0.5 else f"aio:{place.base.path}"
        return chain if self.images.of_chain(chain) else f"aio:{place.base.path}"

    def grow(self, place: Place) -> None:
        """Enlarge the image of a disk, if it is a raw one."""
        image = self.images.of_chain(place.truth.chain) if place.truth else None
        if image is not None and image.path.endswith(".raw") and self.random.random() < 0.7:
            size = os.stat(image.path).st_size  # noqa: PTH116 - a text
            if size < LARGEST:
                os.truncate(image.path, size + 65536)

    def _step(self) -> None:
        self.steps += 1
        chance = self.random.random()
        if chance < 0.62:
            self._pass_one()
        elif chance < 0.80:
            self.random.choice(self.administrators).step()
        elif chance < 0.985:
            self._step_place(self.random.choice(self.places))
        elif chance < 0.9905:
            self._step_toolstack(self.random.choice(self.places))
        elif chance < 0.9935:
            self._kill_somebody()
        elif chance < 0.9945:
            self._step_service()
        elif chance < 0.995:
            self._step_xenstore()
        else:
            self.clock.now += self.random.random() * 0.05

    def _runnable(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = []
        if self.service is None:
            found += [self._start_service] * (self.clock.now >= self._start_at)
        elif self.service.has_something():
            found += [self.service.step] * 2
        for worker in self.workers:
            if worker.has_something():
                found.append(worker.step)
            if worker.loop is not None:
                found += [partial(worker.do_job, number) for number in range(len(worker.loop.jobs.waiting))]
            if worker.is_dying:
                found += [worker.kill] * 4
        return found

    def _pass_one(self) -> bool:
        """Step a loop, or do a job; if all sleep, let time pass until one does not."""
        found = self._runnable()
        if found:
            self.random.choice(found)()
            self._check_log()
            return True
        return self._pass_time()

    def _pass_time(self, until: float | None = None) -> bool:
        loops = [self.service.loop if self.service else None, *(worker.loop for worker in self.workers)]
        due = [when for loop in loops if loop is not None and (when := loop.due()) is not None]
        due += [self._start_at] if self.service is None else []
        next_at = min(due, default=self.clock.now + 1.0)
        if until is not None and next_at > until:
            return False
        self.clock.now = max(self.clock.now, next_at)
        return True

    def _step_place(self, place: Place) -> bool:
        if not self.xenstored.is_up:
            return place.poll()
        return place.hear_script() or place.run_script() or place.step_frontend() or place.finish_removal()

    def _step_toolstack(self, place: Place) -> None:
        chance = self.random.random()
        if not self.xenstored.is_up:
            return
        if not place.is_there:
            place.attach(self._new_chain(place))
        elif chance < 0.35 and not place.is_leaving:
            place.request_removal(force=self.random.random() < 0.3)
        elif chance < 0.55:
            place.make_anew(self._new_chain(place))
        elif chance < 0.75:
            place.destroy()

    def _kill_somebody(self) -> None:
        if self.workers:
            self.note("killed: worker: between steps")
            self.random.choice(self.workers).kill()

    def _step_service(self) -> None:
        chance, service = self.random.random(), self.service
        if service is None:
            return
        if chance < 0.45:
            self.note("killed: service: between steps")
            if self.random.random() < 0.3 and self.workers:
                self.note("killed: service and a worker at once")
                self.random.choice(self.workers).kill()
            service.kill("killed")
        elif service.has_begun:
            number = signal.SIGTERM if chance < 0.7 or not self._may_forget() else signal.SIGINT
            self.note(f"service: {number.name}")
            if number is signal.SIGINT:  # ends with it, as does all that it knew
                for place in self.places:
                    place.may_go_on()
            service.stop(number)

    def _may_forget(self) -> bool:
        """Return whether an orderly stop loses nothing, as xenstore can be told everything."""
        return self.xenstored.is_up

    def _step_xenstore(self) -> None:
        if self.xenstored.is_up:
            if self.service is None or self.service.is_stopping:
                return
            self.note("xenstore: goes away")
            self.xenstored.go_down()
        else:
            self._xenstore_comes()

    def _xenstore_comes(self) -> None:
        self.xenstored.come_up()
        for place in self.places:
            place.reconnect()

    def _start_service(self) -> None:
        self.service = ServiceProcess(self)

    def _check_log(self) -> None:
        """Check that the log reports no fault of ours."""
        for line in self.log[self._read :]:
            text = f"{line.get('event')} {line.get('reason', '')} {line.get('exception', '')}"
            if line.get("event") == UNFINISHED and self._is_nobodys(str(line.get("vbd"))):
                continue
            if line.get("level") == "critical" or "a bug" in text or "broke the protocol" in text or "a fault" in text:
                self.blame(f"the log says: {line}")
        self._read = len(self.log)

    def _is_nobodys(self, name: str) -> bool:
        """Return whether the disk of that name has no living guest; its domain may have died a moment ago."""
        return not any(place.name() == name and place.has_domain for place in self.places)

    # the end

    def _settle(self) -> None:
        """Begin nothing new, and let everything come to rest: all questions answered, all guests served."""
        self.is_calm = True
        if not self.xenstored.is_up:
            self._xenstore_comes()
        self._rest(_SETTLED_S)
        for place in self.places:
            if place.is_there:
                self._ask_and_rest({"verb": "resume", "vbd": place.name()}, place)
                place.may_submit = 5
        self._rest(_SETTLED_S)
        if not self.faults:
            checks.at_rest(self)
        for place in self.places:
            if place.is_there and not place.is_leaving:
                place.request_removal()
        self._rest(_SETTLED_S)
        if not self.faults:
            checks.when_all_is_gone(self)

    def _ask_and_rest(self, request: dict[str, Any], place: Place | None) -> dict[str, Any] | None:
        asking = self.ask(request, place)
        self._rest(_SETTLED_S, asking)
        if asking is None or not asking.poll():
            self.blame(f"nobody answers {request}")
            return None
        return asking.answer

    def ask_now(self, request: dict[str, Any]) -> Any:
        """Ask the service while everything is at rest, and return the data of its answer."""
        answer = self._ask_and_rest(request, None)
        return answer["data"] if answer is not None and answer["code"] == "ok" else None

    def _rest(self, seconds: float, asking: Asking | None = None) -> None:
        """Run until nothing has happened for so many seconds, or until a question is answered."""
        until = self.clock.now + seconds
        idle = 0
        while not self.faults and not (asking is not None and asking.poll()):
            self.steps += 1
            found = self._runnable()
            if found:
                self.random.choice(found)()
                self._check_log()
            acted = [each.step() for each in self.administrators if each.asking is not None]
            acted += [self._step_place(place) for place in self.places]
            idle = 0 if found or any(acted) else idle + 1
            if idle > 1 and not self._pass_time(until):
                self.clock.now = until
                break

    def _close(self) -> None:
        """End everything."""
        self.is_calm = True
        for each in self.administrators:
            if each.asking is not None:
                each.asking.give_up()
        for worker in list(self.workers):
            worker.kill()
        if self.service is not None:
            self.service.kill("the run is over")
        for place in self.places:
            place.close()
        for opener in self.openers.values():
            opener.kill()
        for fd in [*self.kept.values(), *self._spares]:
            os.close(fd)
        self.machine.close()
