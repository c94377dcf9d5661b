"""Administrators: one or two at once give orders about a disk, and the answers are compared with what is true.

Must not kill anything, nor wait for kills: each disk's orders have a thread of their own. `plan` chooses the orders,
`judge` finds the lies.

A client waits as long as the order takes, or waits a moment and then looks at the service's `orders`, or hangs up. In
each case the round is over when none of its orders is under way any more.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tests.chaos.judge import Entry, Told, Truth, untrue
from tests.chaos.plan import MOST_SNAPSHOTS, Manner, Wish, has_unnamed, next_wishes
from xenbackend.errors import XenbackendError
from xenbackend.protocol.client import ServiceError, give_order
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.xenstore.store import Store

if TYPE_CHECKING:
    from tests.chaos.host import GuestProcess

PATIENCE_S = 60.0
FOLLOWING_S = 20.0  # in which params and the worker must follow an answer
PAUSE_S = 0.002
PAUSED_S = 0.05
IN_FLIGHT = 512  # answers that a guest may still take after a pause was answered
Ask = Callable[[dict[str, Any]], Any]  # asks the service, which may just be restarting


@dataclass(slots=True)
class Tally:
    """Counts of orders and answers, and the lies that were found."""

    ended: Counter[tuple[str, str]] = field(default_factory=Counter)  # by verb and code
    heard: Counter[str] = field(default_factory=Counter)  # answers, by code
    rounds: Counter[int] = field(default_factory=Counter)  # by how many ordered at once
    lies: list[str] = field(default_factory=list)


class Desk:
    """Gives administrators' orders about all disks."""

    def __init__(self, control: str, store: str, ask: Ask) -> None:
        """Give orders at the control socket; `store` is xenstored's address."""
        self.tally = Tally()
        self._control, self._store, self._ask = control, store, ask
        self._pool = ThreadPoolExecutor(32, "administrator")
        self._rounds: dict[str, Future[None]] = {}
        self._truths: dict[str, Truth] = {}  # after the last round, by disk
        self._images = count(1)
        self._snapshots: Counter[str] = Counter()
        self._lock = threading.Lock()

    def order(self, guest: GuestProcess, random: Random) -> bool:
        """Begin a round about a disk; False if one is under way."""
        self._reap(guest.vbd)
        if guest.vbd in self._rounds:
            return False
        self._rounds[guest.vbd] = self._pool.submit(self._round, guest, Random(random.getrandbits(64)))
        return True

    def chain(self, vbd: str) -> str:
        """Return the chain that a disk has since its last round; empty if there was none."""
        return self._truths[vbd].chain if vbd in self._truths else ""

    def finish(self) -> None:
        """Wait until nothing is under way. Raises: the exception of a round."""
        for each in self._rounds.values():
            each.result(2 * PATIENCE_S)
        self._rounds.clear()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _reap(self, vbd: str) -> None:
        if vbd in self._rounds and self._rounds[vbd].done():
            self._rounds.pop(vbd).result()

    def keep(self, guest: GuestProcess) -> None:
        """Have a disk's unnamed file get a name. Raises: AssertionError, if that is refused while all is well."""
        request = {"file": str(self._new_image(guest))}
        self._carry_out(guest, self._before(guest), [[Wish("keep", request, Manner.PATIENT, 0.0, 0.0)]])
        assert not has_unnamed(self.chain(guest.vbd)), f"{guest.vbd}: its unnamed file gets no name"

    def _round(self, guest: GuestProcess, random: Random) -> None:
        before = self._before(guest)
        may_grow = self._snapshots[guest.vbd] < MOST_SNAPSHOTS
        wishes = next_wishes(random, guest.disk, before.chain, self._new_image(guest), may_grow=may_grow)
        self._carry_out(guest, before, wishes)

    def _before(self, guest: GuestProcess) -> Truth:
        return self._truths.get(guest.vbd) or self._look(guest.vbd, self._policy(guest.vbd))

    def _new_image(self, guest: GuestProcess) -> Path:
        return guest.images / f"{guest.vbd.replace('/', '-')}-{next(self._images)}.img"

    def _carry_out(self, guest: GuestProcess, before: Truth, wishes: list[list[Wish]]) -> None:
        """Give the orders of one round, and judge the answers; there is a list for each administrator."""
        vbd = guest.vbd
        known = {each["number"] for each in self._entries(vbd)}
        parts = [self._pool.submit(self._administer, guest, each) for each in wishes]
        told = [each for part in parts for each in part.result(2 * PATIENCE_S)]
        entries = [each for each in self._ended(vbd) if each["number"] not in known]
        after, lies = self._judge(vbd, before, told, entries)
        self._truths[vbd] = after
        with self._lock:
            self.tally.ended.update((each["verb"], each["code"]) for each in entries)
            self.tally.heard.update("nothing" if each.answer is None else each.answer.code.value for each in told)
            self.tally.rounds[len(wishes)] += 1
            self.tally.lies += [f"{vbd}: {lie}" for lie in lies]
            self._snapshots[vbd] += [(each["verb"], each["code"]) for each in entries].count(("snapshot", Code.OK))

    def _judge(self, vbd: str, before: Truth, told: list[Told], entries: list[Entry]) -> tuple[Truth, list[str]]:
        """Compare what was told with what is true, once params and the worker have had time to follow."""
        give_up = time.monotonic() + FOLLOWING_S
        policy = self._policy(vbd)
        while True:
            after = self._look(vbd, policy)
            lies = untrue(before, told, entries, after)
            if not lies or time.monotonic() > give_up:
                return after, lies
            _pause(PAUSE_S)

    def _administer(self, guest: GuestProcess, wishes: list[Wish]) -> list[Told]:
        """Give one order after another; an administrator who has paused a disk resumes it."""
        told = []
        for wish in wishes:
            if wish.verb == "pause":
                told += self._pause_and_resume(guest, wish)
            else:
                told.append(self._give(guest, wish))
        return told

    def _pause_and_resume(self, guest: GuestProcess, wish: Wish) -> list[Told]:
        guest.rests = True
        told = [self._give(guest, wish)]
        answer = told[0].answer
        number = None if answer is None else answer.order
        if (number, Code.OK) in [(each["number"], each["code"]) for each in self._ended(guest.vbd, verb="pause")]:
            before = guest.answers
            _pause(PAUSED_S)
            [status] = self._ask({"verb": "status", "vbd": guest.vbd})
            if guest.answers - before > IN_FLIGHT or not status["paused"]:
                with self._lock:
                    self.tally.lies.append(f"{told[0]}, and it had {guest.answers - before} answers; {status}")
        resume = Wish("resume", {}, Manner.PATIENT, 0.0, 0.0)
        give_up = time.monotonic() + PATIENCE_S
        while (answer := told[-1].answer) is None or told[-1].verb != "resume" or answer.code is not Code.OK:
            assert time.monotonic() < give_up, f"{guest.vbd} cannot be resumed: {told[-1]}"
            told.append(self._give(guest, resume))
        guest.rested_ns = time.monotonic_ns()
        guest.rests = False
        return told

    def _give(self, guest: GuestProcess, wish: Wish) -> Told:
        """Give an order in the client's manner, and return what it was told."""
        _pause(wish.after_s)
        [status] = self._statuses(guest.vbd)
        told = Told(wish.verb, wish.request, worker=status["worker"] or 0)
        request = {"verb": wish.verb, "vbd": guest.vbd, **wish.request}
        if wish.manner is Manner.GONE:
            self._go_away(request, wish.wait_s)
            return told
        try:
            wait_s = None if wish.manner is Manner.PATIENT else wish.wait_s
            told.answer = give_order(self._control, request, f"{guest.vbd}: {wish.verb}", wait_s)
        except ServiceError as problem:
            told.answer = problem.answer
        return told

    def _go_away(self, request: dict[str, Any], after_s: float) -> None:
        """Send an order, and hang up before it is answered."""
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as near:
            near.connect(self._control)
            near.sendall(json.dumps(request).encode() + b"\n")
            _pause(after_s / 10)

    def _entries(self, vbd: str) -> list[Entry]:
        return [each for each in self._ask({"verb": "orders"}) if each["vbd"] == vbd]

    def _ended(self, vbd: str, verb: str = "") -> list[Entry]:
        """Return the orders about a disk (of one verb), once none of them is under way. Raises: AssertionError.

        A ping comes first: when it is answered, the service has taken all earlier requests.
        """
        give_up = time.monotonic() + PATIENCE_S
        while True:
            self._ask({"verb": "ping"})
            entries = [each for each in self._entries(vbd) if verb in ("", each["verb"])]
            if all(each["ended"] is not None for each in entries):
                return entries
            assert time.monotonic() < give_up, f"{vbd}: an order never ends: {entries[-3:]}"
            _pause(PAUSE_S)

    def _statuses(self, vbd: str) -> list[dict[str, Any]]:
        """Return the service's description of a disk, which it may just be taking over."""
        give_up = time.monotonic() + PATIENCE_S
        while not (found := [each for each in self._ask({"verb": "status"}) if each["vbd"] == vbd]):
            assert time.monotonic() < give_up, f"{vbd} is not served any more"
            _pause(PAUSE_S)
        return found

    def _look(self, vbd: str, policy: str) -> Truth:
        """Return what is true of a disk now."""
        [status] = self._statuses(vbd)
        layers = "|".join(each["layer"] for each in status["layers"] if not each["parent_of"])
        return Truth(
            status["chain"],
            self._params(status["node"]),
            layers,
            status["paused"],
            policy,
            status["worker"] or 0,
            status["worker_since"] or 0.0,
        )

    def _policy(self, vbd: str) -> str:
        """Return a disk's policy; asking for it changes nothing."""
        return str(self._ask({"verb": "policy", "vbd": vbd})["policy"])

    def _params(self, node: str) -> str:
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                with Store(self._store) as store:
                    return store.read(f"/local/domain/0/backend/{node}/params")
            except (XenbackendError, OSError):
                if time.monotonic() > give_up:
                    raise
                _pause(PAUSE_S)


def _pause(seconds: float) -> None:
    """Let others run."""
    threading.Event().wait(seconds)
