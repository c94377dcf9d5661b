"""Administrators, several at once: each gives an order, waits for the answer or gives up, and compares the answer.

Must not wait: a step does what is possible now. An answer is compared with the truth at the moment at which the service
gives it (`Judge`), and once more when a client has read it.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.model.images import LARGEST

if TYPE_CHECKING:
    from tests.model.guests import Place
    from tests.model.world import World

VERBS = {  # how often each is chosen
    "set": 30, "snapshot": 8, "resize": 6, "pause": 12, "resume": 14, "policy": 8, "upgrade": 10, "command": 8,
    "status": 4, "orders": 4, "ping": 1, "nonsense": 3,
}  # fmt: skip
POLICIES = ("read=retry", "read=error", "write=pause,read=retry", "all=retry", "nospace=pause", "bogus=1")
_EXCHANGES = ("set", "snapshot", "resize")


class Asking:
    """One request over the control socket that is under way."""

    def __init__(self, world: World, request: dict[str, Any], place: Place | None) -> None:
        """Connect and send. Raises: OSError."""
        self.request = request
        self.place = place
        self.life = place.life if place is not None else 0
        self.began = world.clock()
        self.answer: dict[str, Any] | None = None
        self.is_over = False
        self._world = world
        self._line = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect(world.control)
            self._socket.send(json.dumps(request).encode() + b"\n")
        except OSError:
            self._socket.close()
            raise

    def poll(self) -> bool:
        """Read what there is; True once the request is over. Without an `answer` the service has gone."""
        if self.is_over:
            return True
        try:
            data = self._socket.recv(1 << 20)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self._line += data
        if data and not self._line.endswith(b"\n"):
            return False
        if data:
            self.answer = json.loads(self._line)
        self.give_up()
        return True

    def give_up(self) -> None:
        """Hang up."""
        self.is_over = True
        self._socket.close()


class Administrator:
    """One administrator. `order`: the number of its order that is still under way, as it was told."""

    def __init__(self, world: World) -> None:
        self.asking: Asking | None = None
        self.order: int | None = None
        self._world = world
        self._random = world.random

    def step(self) -> bool:
        """Do one thing: ask, give up, take an answer."""
        if self.asking is None:
            return self._world.may_order() and self._give()
        if self.asking.poll():
            asking, self.asking = self.asking, None
            self._hear(asking)
            return True
        if self._random.random() < 0.004:
            self._world.note("client: gave up")
            self.asking.give_up()
            self.asking = None
            return True
        return False

    def _give(self) -> bool:
        world = self._world
        if not world.can_be_asked():
            return False
        verb = self._random.choices(list(VERBS), list(VERBS.values()))[0]
        places = [each for each in world.places if each.is_there]
        if self.order is not None and self._random.random() < 0.7:
            request: dict[str, Any] = {"verb": "orders", "order": self.order}
            place = None
        elif verb in ("status", "orders", "ping"):
            request, place = {"verb": verb}, None
        elif not places:
            return False
        else:
            place = self._random.choice(places)
            request = self._request(verb, place)
        if self._random.random() < 0.25:
            request["wait"] = self._random.choice([0, 0.001, 0.05, 1, 20])
        self.asking = world.ask(request, place)
        return True

    def _request(self, verb: str, place: Place) -> dict[str, Any]:
        random, world = self._random, self._world
        request: dict[str, Any] = {"verb": verb, "vbd": place.name()}
        if verb == "set":
            request["chain"], request["replace"] = self._chain(place)
            request["dry_run"] = random.random() < 0.15
        elif verb == "snapshot":
            request["file"] = world.images.new_name(".qcow2") if random.random() < 0.8 else world.existing_file
            request["format"] = random.choice(["", "", "qcow2", "bogus"])
        elif verb == "policy":
            request["policy"] = random.choice(POLICIES) if random.random() < 0.9 else ""
        elif verb == "command":
            request["layer"] = random.choice(["log", "log", "0", "aio", "nobody"])
            request["command"] = random.choice(["status", "start", "stop", "peek", "get", "clear", "nonsense"])
            request["arguments"] = random.choice([[], [], [], ["x"]])
        elif verb == "resize":
            world.grow(place)
        elif verb == "nonsense":
            world.note("answer: nonsense")
            request = random.choice([
                {"verb": "set", "vbd": place.name()},
                {"verb": "set", "vbd": place.name(), "chain": 5},
                {"verb": "set", "vbd": place.name(), "chain": "nobody:x"},
                {"verb": "set", "vbd": place.name(), "chain": "aio:relative"},
                {"verb": "pause", "vbd": "77/xvda"},
                {"verb": "snapshot", "vbd": place.name(), "file": "relative"},
                {"verb": "command", "vbd": place.name(), "layer": "log", "command": "status", "arguments": [5]},
                {"verb": "teapot"},
                {"verb": "orders", "order": 10**9},
            ])  # fmt: skip
        return request

    def _chain(self, place: Place) -> tuple[str, bool]:
        """Return a chain to ask for, and whether with `--replace`."""
        random, world = self._random, self._world
        assert place.truth is not None
        bottom = place.truth.chain.split("|")[-1]
        image = world.images.of_chain(bottom)
        chance = random.random()
        replaces = random.random() < 0.15
        if chance < 0.12:
            bottom, replaces = f"aio:{world.images.make_raw(LARGEST).path}", random.random() < 0.5
        elif chance < 0.18:
            bottom = random.choice([f"aio:{world.small_file}", "aio:/nowhere/at/all", "ram:1M", "null:1G"])
            replaces &= bottom != f"aio:{world.small_file}"  # which nobody would refuse while there is no worker
        elif chance < 0.30 and image is not None and bottom.startswith("aio:"):
            bottom = f"aio:{world.images.link(image)}"
        filters = random.choice(["", "", "log:|", "log:track=off|", "log:|log:track=off|"])
        return f"{filters}{bottom}", replaces

    def _hear(self, asking: Asking) -> None:
        answer, world = asking.answer, self._world
        if answer is None:
            world.note("client: the service went away")
            return
        world.read_answer(asking, answer)
        if asking.request["verb"] == "orders" and "order" in asking.request and answer["code"] == "ok":
            if answer["data"][0]["ended"] is not None:
                self.order = None
        elif answer["code"] == "under-way" and "order" in answer:
            self.order = answer["order"]


class Judge:
    """Compares the service's answers with what is true."""

    def __init__(self, world: World) -> None:
        self._world = world

    def asked(self, request: dict[str, Any], place: Place | None, number: int) -> None:
        """Note that the service takes up an order."""
        truth = place.truth if place is not None else None
        if truth is None:
            return
        verb = request.get("verb")
        if verb == "resume":
            truth.is_paused = False
            truth.resumed += 1
        elif verb == "pause":
            truth.pausing[number] = truth.resumed
        elif verb == "set" and isinstance(request.get("chain"), str) and request.get("dry_run") is not True:
            truth.targets[number] = request["chain"]

    def answers(self, request: dict[str, Any], place: Place | None, number: int, answer: Any) -> None:
        """Check an answer of the service. `place`: that of the order's vbd, None if that life of it is over."""
        verb, code = str(request.get("verb")), answer.code.value
        if place is None or place.truth is None:
            return
        truth, data = place.truth, answer.data if isinstance(answer.data, dict) else {}
        worker = self._world.worker_of(place)
        if verb in _EXCHANGES:
            target = truth.targets.pop(request.get("file") if verb == "snapshot" else number, None)
            if request.get("dry_run") is not True:
                self._exchange(place, target, code, data.get("chain"))
        elif verb == "pause" and code == "ok":
            if not data.get("paused"):
                if truth.pausing.get(number) == truth.resumed:
                    self._world.blame(f"{place}: it is not paused, says the answer ok, and nobody has resumed it")
                return
            place.poll()
            truth.is_paused = truth.pausing.get(number) == truth.resumed  # else the service was stopped meanwhile
            if worker is not None and worker.connection is not None and worker.connection.engine.in_flight:
                self._world.blame(f"{place}: paused, says the answer, with requests in flight")
        elif verb == "upgrade" and code == "ok" and worker is not None and data.get("worker") != worker.pid:
            self._world.blame(f"{place}: worker {data.get('worker')} serves, says the answer; {worker.pid} does")

    def _exchange(self, place: Place, target: str | None, code: str, chain: Any) -> None:
        truth, world = place.truth, self._world
        assert truth is not None
        if code in ("busy", "invalid"):
            return
        if code not in ("ok", "failed", "bug"):  # nobody was told how it ended
            truth.targets |= {target: target} if target else {}
            return
        if chain is None:
            if code == "ok":
                world.blame(f"{place}: an answer without the chain that is in service")
            return
        if code == "ok" and target is not None and chain != target:
            world.blame(f"{place}: {target} was ordered, {chain} is in service, says the answer ok")
        worker = world.worker_of(place)
        if worker is not None and worker.chain and worker.chain != chain:
            world.blame(f"{place}: the answer {code} says {chain}; {worker.chain} is in service")
        if chain != truth.chain:
            if chain not in (target, *truth.targets.values()):  # of other orders' ends nobody was told
                world.blame(f"{place}: the answer {code} says {chain}; {truth.chain} was in service")
            if world.images.of_chain(chain) is not world.images.of_chain(truth.chain):
                place.leave_image(world.images.of_chain(truth.chain))
            truth.chain = chain
        truth.targets.clear()  # one exchange excludes the others


def existing(path: Path) -> str:
    """Return the name of a file that is there, and is no image."""
    with suppress(FileExistsError):
        path.write_bytes(b"x")
    return str(path)
