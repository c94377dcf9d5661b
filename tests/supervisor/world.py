"""A model of what is around a vbd's automaton: xenstore, a toolstack, a frontend, a worker that outlives a service."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from xenbackend.blkif.features import Limits
from xenbackend.blkif.handshake import XenbusState
from xenbackend.protocol import messages
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
)
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
    """Everything around the automaton, with messages delivered only when `answer` is called.

    Every write is held to what must never happen: see `_check`.
    """

    node: dict[str, str] | None = field(default_factory=lambda: dict(NODE))
    theirs: S = S.INITIALISING
    inbox: list[messages.Message | str] = field(default_factory=list)  # what the worker has been told
    is_running: bool = False
    is_connected: bool = False
    was_opened: bool = False
    limit: float | None = None
    is_forgotten: bool = False
    unheard: list[events.Event] = field(default_factory=list)  # said while there was no service
    is_away: bool = False  # the service, not the worker
    services: int = 1  # that there were
    cannot: str = ""  # why the worker cannot open the chain now
    joined: events.Join | None = None  # as it was asked for last
    lost: str = ""  # what the worker was told at its start
    runs_script: bool = True  # as libxl does once it has seen InitWait

    def __post_init__(self) -> None:
        self.device = Device(PATH, Limits())

    def see(self) -> None:
        """Let the automaton look, and the toolstack do what it does then."""
        self.send(events.Seen(self.node, self.theirs))
        if self.runs_script and self.state == "2" and not self.device.hotplug:
            self.send(events.Called())

    def send(self, event: events.Event) -> None:
        """Hand over an event and do what is answered."""
        if self.is_away:
            self.unheard.append(event)
            return
        for action in self.device.handle(event):
            self._do(action)

    def _do(self, action: events.Action) -> None:
        match action:
            case events.Write():
                self._write(action)
            case events.Start():
                assert not self.is_running, "two workers"
                self.is_running, self.lost = True, action.lost
                self.inbox.append("open")
            case events.Join():
                self.inbox.append("connect")
                self.joined = action
            case events.Tell():
                self.inbox.append(action.message)
            case events.Kill():
                self.inbox[:] = [action.sentence]
            case events.Limit():
                self.limit = action.seconds
            case events.Forget():
                assert not self.is_running or self.device.is_leaving, "a worker that nobody knows"
                self.is_forgotten = True

    def _write(self, action: events.Write) -> None:
        if self.node is None or self.node.get("state") != str(action.state.value):
            return
        self._check(action)
        for key, value in action.keys.items():
            if value is None:
                self.node.pop(key, None)
            else:
                self.node[key] = value

    def _check(self, action: events.Write) -> None:
        """See that a write may be."""
        state = action.keys.get("state")
        was_connected = action.state is S.CONNECTED
        if state == "4" and not was_connected:
            assert self.was_opened, "Connected before the chain was open"
            assert self.is_connected, "Connected before the rings are served"
        if state in ("2", "6"):
            assert not self.is_connected, "offered or closed with rings mapped"
        is_wanted = self.device.spec is not None and (self.node or {}).get("online") != "0"
        if was_connected and is_wanted and self.device.theirs is S.CONNECTED and not self.device._failure:
            assert state in (None, "4"), "a guest that is connected was let down"

    def answer(self) -> None:
        """Let the worker do the next thing that it was told, as it should."""
        if not self.inbox:
            return
        told = self.inbox.pop(0)
        if told == "open" and self.cannot:
            self.send(messages.Failed(self.cannot, 5))
        elif told == "open":
            self.was_opened = True
            self.send(messages.Opened([LAYER]))
        elif told == "connect":
            self.is_connected = True
            self.send(messages.Connected())
        elif isinstance(told, messages.Disconnect):
            self.is_connected = False
            self.send(messages.Disconnected())
        elif isinstance(told, messages.Report):
            self.send(replace(self.standing(), report=told.id))
        elif isinstance(told, messages.Close):
            self.send(messages.Closed())
            self.die("the worker ended unexpectedly with exit status 0")
        else:
            self.die(str(told))

    def standing(self) -> messages.Standing:
        """Return where the worker stands."""
        phase = "serving" if self.is_connected else "open" if self.was_opened else "idle"
        layers = [LAYER] if self.was_opened else []
        chain = "null:1G" if self.was_opened else ""
        return messages.Standing(
            phase, chain, read_only=False, shareable=False, layers=layers, export="", halted="", paused="", trouble=""
        )

    def die(self, sentence: str, *, has_progressed: bool = False) -> None:
        """Let the worker process end."""
        self.is_running = self.is_connected = self.was_opened = False
        self.inbox.clear()
        self.send(events.Ended(sentence, has_progressed))

    def lose_service(self) -> None:
        """Let the service die, and its worker go on."""
        self.is_away, self.limit = True, None

    def begin_service(self) -> None:
        """Let the next service find what is there; it hears what was said meanwhile."""
        self.device = Device(PATH, Limits())
        self.is_away = self.is_forgotten = False
        unheard, self.unheard = self.unheard, []
        if self.is_running or any(isinstance(each, events.Ended) for each in unheard):
            self.services += 1
            self.send(events.Inherited(self.services))
            self.inbox += [messages.Report(self.services)] if self.is_running else []
            for event in unheard:
                self.send(event)

    def replace_service(self) -> None:
        """Let a new service take over from this one."""
        self.send(events.Stop(leaves=True))
        assert self.is_forgotten
        self.begin_service()

    def settle(self) -> None:
        """Let everything happen that follows, with a look in between as watches would cause, and time go by."""
        for _ in range(20):
            self.see()
            self.answer()
            self.rest()

    def rest(self) -> None:
        """Let the time pass that lies between a death and the next worker."""
        if self.device.phase is Phase.RESTING:
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
