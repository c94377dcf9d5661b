"""A model of what is around a vbd's automaton: xenstore, a toolstack, a frontend, a worker that outlives a service."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field, replace
from typing import Any

from xenbackend.blkif.features import Limits
from xenbackend.blkif.handshake import XenbusState
from xenbackend.protocol import messages
from xenbackend.protocol.messages import Stage
from xenbackend.supervisor.vbd import events
from xenbackend.supervisor.vbd.device import Device
from xenbackend.supervisor.vbd.phase import Phase
from xenbackend.supervisor.xenstore.paths import VbdPath

S = XenbusState
PATH = VbdPath("vbd", 0, 5, 51712)
LAYER = messages.LayerFacts(
    text="null:1G",
    size=1 << 30,
    sector_size=512,
    read_only=False,
    can_flush=True,
    can_discard=True,
    discard_granularity=4096,
    discard_alignment=0,
    physical_sector_size=512,
)
IDLE = messages.Standing(0, Stage.IDLE, "", read_only=False, shareable=False)
NODE = {
    "frontend": "/local/domain/5/device/vbd/51712",
    "params": "null:1G",
    "mode": "w",
    "online": "1",
    "script": "/etc/xen/scripts/block-xenbackend",
    "state": "1",
}


@dataclass
class World:
    """Everything around the automaton. The worker obeys an order only when `answer` is called.

    Each action of the automaton is checked against what must never happen: see `_do` and `_check`.
    """

    node: dict[str, str] | None = field(default_factory=lambda: dict(NODE))  # another object when it is made anew
    theirs: S = S.INITIALISING
    inbox: list[events.Action | str] = field(default_factory=list)  # orders that the worker has not obeyed yet
    is_running: bool = False
    is_connected: bool = False  # the worker has the rings, whatever it says
    limit: float | None = None
    lingers: bool = False  # the limit ends early when the guest is quiet
    is_forgotten: bool = False
    unheard: list[events.Event] = field(default_factory=list)  # events while there was no service
    is_away: bool = False  # the service, not the worker
    cannot: str = ""  # why the worker cannot open the chain now
    code: int = errno.EIO  # the errno of that
    top: messages.LayerFacts = LAYER  # the top layer that it reports once the chain is open
    joined: events.Join | None = None  # the last one
    lost: str = ""  # the failed flush that the worker was told of at its start
    runs_script: bool = True  # as libxl does once it has seen InitWait
    lives: int = 1  # how many vbds there have been at this path
    has_left: bool = False  # the guest has, for another host

    def __post_init__(self) -> None:
        self.standing = IDLE
        self.journal = ""  # the failed flush that a successor finds
        self.is_stopped = False
        self._begin()

    def _begin(self, *, has_past: bool = False) -> None:
        """Let the registry make a new object for the vbd."""
        self.device = Device(PATH, Limits(), has_past=has_past)
        self.is_forgotten = self.is_stopped = False
        self._life: dict[str, str] | None = None  # the node that the automaton has seen its own keys in
        self._seen: dict[str, str] | None = None
        if not has_past:
            self.journal = ""

    def see(self) -> None:
        """Let the automaton look at xenstore. First let the registry replace a vbd that is over; afterwards run the
        script.
        """
        if self.is_forgotten and not self.is_stopped and self.state is not None:
            self.lives += 1
            self._begin()
        if not self.is_away and not self.device.sight.is_over and self.node and "max-ring-page-order" in self.node:
            self._life = self._life or self.node
        self._seen = self._seen if self.is_away else self.node
        self.send(events.Seen(self.node, self.theirs, self.has_left))
        if self.runs_script and self.state == "2" and not self.device.sight.hotplug:
            self.send(events.Called())

    def send(self, event: events.Event) -> None:
        """Pass an event to the automaton, and carry out its actions."""
        if self.is_away:
            self.unheard.append(event)
            return
        if isinstance(event, events.Resume):
            self.journal = ""
            self.standing = replace(self.standing, flush_failed="")
        self.is_stopped |= isinstance(event, events.Stop)
        if not self.is_forgotten:
            for action in self.device.handle(event):
                self._do(action)

    def _do(self, action: events.Action) -> None:
        is_of_this_life = self._life is None or self._life is self._seen or self.device.is_leaving
        match action:
            case events.Write():
                self._write(action)
            case events.Start():
                assert not self.is_running, "two workers"
                assert is_of_this_life, "a worker for a vbd that is over"
                self.is_running, self.lost, self.standing = True, action.lost, IDLE
                self.journal = self.journal or action.lost
                self.inbox.append("open")
            case events.Join():
                self.inbox.append("connect")
                self.joined = action
            case events.Leave() | events.Close():
                self.inbox.append(action)
            case events.Kill():
                self.inbox[:] = [action.sentence]
            case events.Limit():
                self.limit, self.lingers = action.seconds, action.quiet_s is not None
            case events.Forget():
                assert not self.is_running or self.device.is_leaving, "a worker that nobody knows"
                self.is_forgotten = True

    def _write(self, action: events.Write) -> None:
        if self.node is None or self.node.get("state") != str(action.state.value):
            return
        if action.params is not None and self.node.get("params") != action.params:
            return
        if action.mark is not None and action.mark not in self.node:
            return
        assert self._life is None or self._life is self.node, "written into another vbd's node"
        self._check(action)
        for key, value in action.keys.items():
            if value is None:
                self.node.pop(key, None)
            else:
                self.node[key] = value

    def _check(self, action: events.Write) -> None:
        """Check that a write is allowed."""
        assert not self.device.sight.is_over, "written into a vbd that is over"
        state = action.keys.get("state")
        was_connected = action.state is S.CONNECTED
        if state == "4" and not was_connected:
            assert self.standing.layers, "Connected before the chain was open"
            assert self.is_connected, "Connected before the rings are served"
        if state == "2":
            assert not self.is_connected, "offered with rings mapped"
        if state == "6":
            assert not self.is_running, "Closed while there is a worker"
        is_wanted = self.device.sight.spec is not None and (self.node or {}).get("online") != "0"
        is_refused = "rings" in self.device.error  # by `refuse`: the frontend is not connected, whatever its state
        if was_connected and is_wanted and self.device.sight.theirs is S.CONNECTED and not is_refused:
            assert state in (None, "4"), "a guest that is connected was let down"

    def say(self, **changes: Any) -> None:
        """Change the worker's standing and let it report that, unless it has orders that it has not obeyed yet."""
        self.standing = replace(self.standing, **changes)
        self.journal = self.standing.flush_failed or self.journal
        if self.is_running and not self.inbox:
            self.send(self.standing)

    def lie(self, stage: Stage) -> None:
        """Let the worker report a wrong stage once."""
        if self.is_running and not self.inbox:
            self.send(replace(self.standing, stage=stage))

    def answer(self) -> None:
        """Let the worker obey its next order, as it should."""
        if not self.inbox:
            return
        told = self.inbox.pop(0)
        if told == "open" and self.cannot:
            self.say(failure=self.cannot, errno=self.code)
        elif told == "open":
            chain = self.device.sight.spec.chain if self.device.sight.spec else ""
            self.say(stage=Stage.OPEN, chain=chain, layers=[self.top], flush_failed=self.journal)
        elif told == "connect":
            self.journal = self.journal if self.joined and self.joined.goes_on else ""
            self.is_connected = True
            self.say(stage=Stage.SERVING, flush_failed=self.journal, halted="")
        elif isinstance(told, events.Leave):
            self.is_connected = False
            self.say(stage=Stage.OPEN)
        elif told == "report":
            self.say()
        elif isinstance(told, events.Close):
            self.die("the worker ended unexpectedly with exit status 0")
        else:
            self.die(str(told))

    def refuse(self, sentence: str) -> None:
        """Let the worker answer its next order with a failure."""
        assert self.inbox.pop(0) in ("open", "connect")
        self.say(failure=sentence, errno=5)
        self.standing = replace(self.standing, failure="", errno=0)

    def die(
        self, sentence: str, *, has_progressed: bool = False, is_unfinished: bool = False, has_waited: bool = False
    ) -> None:
        """Let the worker process end."""
        self.is_running, self.is_connected, self.standing = False, False, IDLE
        self.inbox.clear()
        self.send(events.Ended(sentence, has_progressed, is_unfinished, has_waited=has_waited))

    def lose_service(self) -> None:
        """Let the service die; its worker goes on."""
        self.is_away, self.limit = True, None

    def begin_service(self) -> None:
        """Let the next service start with what is there, and hear what happened meanwhile."""
        life = self._life
        self._begin(has_past=True)
        if self.is_running:  # `Inherited` tells the automaton so
            self.device = Device(PATH, Limits())
        self.is_away = False
        self._life = self._seen = life
        unheard, self.unheard = self.unheard, []
        if self.is_running or any(isinstance(each, events.Ended) for each in unheard):
            self.send(events.Inherited())
            self.inbox += ["report"] if self.is_running else []
            for event in unheard:
                if isinstance(event, events.Ended):  # a standing answers no order of this service
                    self.send(event)

    def replace_service(self) -> None:
        """Let a new service take over from this one."""
        self.send(events.Stop(leaves=True))
        assert self.is_forgotten
        self.begin_service()

    def settle(self) -> None:
        """Let everything happen that follows, with looks as watches would cause them, and let time pass."""
        for _ in range(20):
            self.see()
            self.answer()
            self.rest()

    def rest(self) -> None:
        """Let the time pass until the next worker starts, or until a removed frontend no longer lingers."""
        if self.device.phase is Phase.RESTING or self.lingers:
            self.send(events.Expired())

    @property
    def state(self) -> str | None:
        """Our state in the store."""
        return None if self.node is None else self.node.get("state")


def connected() -> World:
    """Return a world whose vbd has come up in the usual way."""
    world = World()
    world.settle()
    world.theirs = S.INITIALISED
    world.settle()
    world.theirs = S.CONNECTED
    world.settle()
    return world


def remove(world: World) -> None:
    """Do what libxl does to remove a vbd."""
    assert world.node is not None
    world.node["online"] = "0"
    if world.node["state"] != "6":
        world.node["state"] = "5"
