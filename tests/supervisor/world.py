"""A model of what is around a vbd's automaton: xenstore, a toolstack, a frontend and a worker."""

from __future__ import annotations

from dataclasses import dataclass, field

from xenbackend import control
from xenbackend.blkif.features import Limits
from xenbackend.blkif.handshake import XenbusState
from xenbackend.supervisor import events
from xenbackend.supervisor.device import Device
from xenbackend.supervisor.paths import VbdPath

S = XenbusState
PATH = VbdPath("vbd", 0, 5, 51712)
LAYER = control.LayerFacts(
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
    """Everything around the automaton, with messages delivered only when `answer` is called."""

    node: dict[str, str] | None = field(default_factory=lambda: dict(NODE))
    theirs: S = S.INITIALISING
    inbox: list[control.Message | str] = field(default_factory=list)  # what the worker has been told
    is_running: bool = False
    is_connected: bool = False
    was_opened: bool = False
    limit: float | None = None
    is_forgotten: bool = False
    joined: events.Join | None = None  # as it was asked for last
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
        for action in self.device.handle(event):
            self._do(action)

    def _do(self, action: events.Action) -> None:
        match action:
            case events.Write():
                self._write(action)
            case events.Start():
                assert not self.is_running
                self.is_running = True
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
                assert not self.is_running
                self.is_forgotten = True

    def _write(self, action: events.Write) -> None:
        if self.node is None or self.node.get("state") != str(action.state.value):
            return
        state = action.keys.get("state")
        if state == "4":
            assert self.was_opened, "Connected before the chain was open"
            assert self.is_connected, "Connected before the rings are served"
        if state in ("2", "6"):
            assert not self.is_connected, "offered or closed with rings mapped"
        for key, value in action.keys.items():
            if value is None:
                self.node.pop(key, None)
            else:
                self.node[key] = value

    def answer(self) -> None:
        """Let the worker do the next thing that it was told, as it should."""
        if not self.inbox:
            return
        told = self.inbox.pop(0)
        if told == "open":
            self.was_opened = True
            self.send(control.Opened([LAYER]))
        elif told == "connect":
            self.is_connected = True
            self.send(control.Connected())
        elif isinstance(told, control.Disconnect):
            self.is_connected = False
            self.send(control.Disconnected())
        elif isinstance(told, control.Close):
            self.send(control.Closed())
            self.die("the worker ended unexpectedly with exit status 0")
        else:
            self.die(str(told))

    def die(self, sentence: str) -> None:
        """Let the worker process end."""
        self.is_running = self.is_connected = self.was_opened = False
        self.inbox.clear()
        self.send(events.Ended(sentence))

    def settle(self) -> None:
        """Let everything happen that follows, with a look in between as watches would cause."""
        for _ in range(20):
            self.see()
            self.answer()

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
