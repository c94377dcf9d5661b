"""One vbd in service: looks at its nodes, asks its automaton, and does what that answers.

Must not decide: what follows from what is in `device`.

What a guest can make this hold is bounded: two flags say that a look is due, however many events there were.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xenbackend import control, counters, journal
from xenbackend.blkif.features import MAXIMA, parse_frontend
from xenbackend.blkif.handshake import name, parse_state
from xenbackend.errors import ConfigError, GuestError, KernelError, StoreError, XenbackendError
from xenbackend.log import Brake, get_logger
from xenbackend.supervisor import claim, events
from xenbackend.supervisor.claim import Bus, Claim
from xenbackend.supervisor.device import Device
from xenbackend.supervisor.domain import boots_by_device_model, is_incoming
from xenbackend.supervisor.fleet import Fleet, Worker
from xenbackend.supervisor.memories import Memories
from xenbackend.supervisor.nodes import SENTENCE_MAX, Nodes
from xenbackend.supervisor.paths import VbdPath
from xenbackend.supervisor.settings import Settings
from xenbackend.supervisor.shown import Shown
from xenbackend.supervisor.spec import frontend_path
from xenbackend.supervisor.store import Store

Reply = Callable[[dict[str, Any]], None]
_LEVELS = ("debug", "info", "warning", "error", "critical")
_RETRY_S = 1.0  # after xenstore refused something although it is there
_LOG_BURST, _LOG_INTERVAL_S = 50, 30.0  # lines per vbd: what a guest can provoke stays below 64 KiB an hour


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every vbd of one service shares."""

    store: Store
    fleet: Fleet
    settings: Settings
    bus: Bus
    now: Callable[[], float]  # seconds of a clock that only goes forward
    time: Callable[[], float]  # seconds since 1970


class Vbd:
    """One vbd, its worker, and the journal that each of its workers goes on with."""

    def __init__(self, path: VbdPath, around: Surroundings) -> None:
        self.path = path
        self.device = Device(path, around.settings.limits, os.getpid())
        self.worker: Worker | None = None
        self.since = around.time()  # of the last change of our state
        self.is_forgotten = False
        self.node_changed = True
        self.theirs_changed = True
        self.deadline: float | None = None
        self._around = around
        self._retry_at = 0.0
        self._watched = ""
        self._memories = Memories()
        self._journal = -1  # once there was a worker
        self._shown = Shown(around.store, path)
        self._events: deque[events.Event] = deque()
        self._replies: dict[int, Reply] = {}
        self.scripts: list[Reply] = []  # of hotplug scripts that wait for an answer
        self._claim: Claim | None = None  # while the vbd is being taken from the kernel's backend
        self._claim_at = 0.0
        self._limits = around.settings.limits  # that a frontend has to keep to
        self._last_command = 0
        self._log = get_logger("supervisor", vbd=str(path))
        self._brake = Brake(_LOG_BURST, _LOG_INTERVAL_S, around.now)

    @property
    def token(self) -> str:
        """The token of the watch on the frontend's state."""
        return f"frontend/{self.path}"

    def next_deadline(self) -> float | None:
        """Return when `turn` has to be called at the latest."""
        if self._claim is not None:
            return self._claim_at
        retry_at = self._retry_at if self.node_changed or self.theirs_changed else None
        return min((each for each in (self.deadline, retry_at) if each is not None), default=None)

    def turn(self) -> bool:
        """Do what is due, and return whether there was anything."""
        now = self._around.now()
        if self._claim is not None:
            return self._go_on_claiming(now)
        is_due = (self.node_changed or self.theirs_changed) and now >= self._retry_at
        if is_due and self._around.store.is_connected:
            self._guarded(self._look)
        if self.deadline is not None and now >= self.deadline:
            self.deadline = None
            self.handle(events.Expired())
        return is_due

    def handle(self, event: events.Event) -> None:
        """Let the automaton see an event, and do what it answers; what comes of that is seen in turn."""
        self._events.append(event)
        if len(self._events) > 1:
            return  # called from within an action
        while self._events:
            error = self.device.error
            actions = self.device.handle(self._events[0])
            self._guarded(self._show_error)  # before the state: who sees the state looks for the reason
            for action in actions:
                self._guarded(self._perform, action)
            if self.device.error not in ("", error):
                self._say("error", self.device.error)
            self._events.popleft()
        self._guarded(self._show)
        if self.device.hotplug and not self.node_changed:
            is_open = self.device.hotplug == "connected"
            self._answer_scripts({"data": "connected"} if is_open else {"error": self.device.error})

    def hotplug(self, reply: Reply) -> None:
        """Do what the toolstack's hotplug script asks for: serve the vbd.

        `reply` gets ``{"data": "connected"}`` once the chain is open, or ``{"error": sentence}``.
        """
        self.scripts.append(reply)
        self._guarded(self._look_at_all)  # what was seen last may be of a former vbd in the same place
        self._take_from_kernel()
        if self._claim is None:
            self.handle(events.Called())

    def doubt(self) -> None:
        """Look at everything again and show it anew: xenstore was away."""
        self.node_changed, self._retry_at = True, 0.0
        self._shown.doubt()

    def counters_page(self) -> memoryview | None:
        """Return the counters as they are now, `counters.SIZE` bytes, without asking the worker; None without one."""
        return memoryview(os.pread(self._journal, counters.SIZE, 0)) if self.worker else None

    def command(self, layer: str, verb: str, arguments: list[str], reply: Reply) -> None:
        """Ask a layer; `reply` gets ``{"data": text}`` or ``{"error": sentence}``."""
        if self.worker is None:
            reply({"error": f"{self.path} has no worker: {self.device.error or 'its chain is not open'}"})
            return
        self._last_command += 1
        self._replies[self._last_command] = reply
        self.worker.send(control.Command(self._last_command, layer, verb, arguments))

    def _guarded(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function; where xenstore lets it down a fresh look will put things right."""
        try:
            function(*arguments)
        except StoreError as error:
            self.node_changed = True
            self._retry_at = self._around.now() + _RETRY_S
            if self._around.store.is_connected:
                self._say("warning", str(error))

    def _answer_scripts(self, answer: dict[str, Any]) -> None:
        scripts, self.scripts = self.scripts, []
        for reply in scripts:
            reply(answer)

    def _take_from_kernel(self) -> None:
        """Begin to take the vbd from the kernel's backend where that has it; looks wait until it is ours."""
        if self._claim is None and self._around.bus.has(self.path):
            self._claim = Claim(self._around.store, self._around.bus, self.path, self._around.now)
            self._claim_at = self._around.now()
            self._limits = MAXIMA  # a frontend that runs already goes by what blkback offered

    def _go_on_claiming(self, now: float) -> bool:
        assert self._claim is not None  # noqa: S101 - the caller has looked
        if now < self._claim_at:
            return False
        try:
            is_over = self._claim.step()
        except StoreError:
            self._claim_at = now + _RETRY_S
            return False
        except XenbackendError as error:
            self._claim, self.node_changed = None, True
            self._say("error", str(error))
            self._answer_scripts({"error": str(error)})
            return True
        if not is_over:
            self._claim_at = now + claim.PAUSE_S
            return False
        self._claim = None
        self._guarded(self._look_at_all)
        if self.scripts:
            self.handle(events.Called())
        return True

    def _look_at_all(self) -> None:
        self.node_changed = True
        self._look()

    def _look(self) -> None:
        store = self._around.store
        keys = self.device.keys
        if self.node_changed:
            keys = store.transact(lambda nodes: nodes.dictionary(self.path.backend)) or None
        frontend = self._watch_frontend(keys or {})
        theirs = parse_state(store.read_optional(f"{frontend}/state") if frontend else None)
        self.node_changed = self.theirs_changed = False
        self.handle(events.Seen(keys, theirs))

    def _watch_frontend(self, keys: dict[str, str]) -> str:
        """Watch the frontend's state, and return its directory; empty while there is none that we may look at."""
        try:
            frontend = frontend_path(self.path, keys) or ""
        except ConfigError:
            frontend = ""  # the automaton says so
        state = f"{frontend}/state" if frontend else ""
        if state != self._watched:
            if self._watched:
                self._around.store.unwatch(self._watched, self.token)
            self._watched = state
            if state:
                self._around.store.watch(state, self.token)
        return frontend

    def _perform(self, action: events.Action) -> None:
        match action:
            case events.Write():
                self._write(action)
            case events.Start():
                self._start(action)
            case events.Join():
                self._join(action)
            case events.Tell() if self.worker is not None:
                self.worker.send(action.message)
            case events.Kill() if self.worker is not None:
                self.worker.kill(action.sentence)
            case events.Limit():
                self.deadline = None if action.seconds is None else self._around.now() + action.seconds
            case events.Forget():
                self._forget()

    def _write(self, action: events.Write) -> None:
        def body(nodes: Nodes) -> bool:
            if parse_state(nodes.read_optional(f"{self.path.backend}/state")) is not action.state:
                return False  # the toolstack was faster, or has removed the node: never bring it back
            for key, value in action.keys.items():
                if value is None:
                    nodes.remove(f"{self.path.backend}/{key}")
                else:
                    nodes.write(f"{self.path.backend}/{key}", value)
            return True

        if not self._around.store.transact(body):
            self.node_changed = True
            return
        state = action.keys.get("state")
        if state is not None and parse_state(state) is not action.state:
            self.since = self._around.time()
            self._say("info", name(parse_state(state)), frontend=name(self.device.theirs))

    def _start(self, action: events.Start) -> None:
        spec, settings = action.spec, self._around.settings
        memories = self._memories.open_for(spec.chain)
        message = control.Open(
            vbd=str(self.path),
            host=settings.host,
            frontend_domid=self.path.frontend_domid,
            chain=spec.chain,
            read_only=spec.read_only,
            shareable=spec.shareable,
            resumes="hotplug-status" in (self.device.keys or {}),  # somebody had come as far as to open it
            memories=list(memories),
            may_wait=is_incoming(self._around.store, self.path.frontend_domid),
            settings={"poll_us": settings.poll_us},
            export=self._export_path(),
        )
        try:
            if self._journal < 0:
                self._journal = _make_journal()
            self.worker = self._around.fleet.start(self._take, self._end, self._memories)
        except KernelError as error:
            self.handle(events.Ended(str(error)))
            return
        self.worker.send(message, [self._journal, *memories.values()])

    def _export_path(self) -> str:
        """Return where the worker is to export the disk for a guest that boots from it; empty for one that does not."""
        if not (self.device.may_boot and boots_by_device_model(self._around.store, self.path.frontend_domid)):
            return ""
        name = str(self.path).replace("/", "-")
        return str(Path(self._around.settings.socket).parent / "nbd" / f"{name}.sock")

    def _join(self, action: events.Join) -> None:
        frontend = self._watched.removesuffix("/state")
        store = self._around.store
        self._take_from_kernel()
        if self._claim is not None:
            self.handle(events.Postponed())
            return
        try:
            chosen = parse_frontend(lambda key: store.read_optional(f"{frontend}/{key}"), self._limits)
        except GuestError as error:
            self.handle(control.Failed(str(error), errno.EINVAL))
            return
        except StoreError:
            self.handle(events.Postponed())
            raise
        rings = [control.RingParameters(list(ring.grefs), ring.event_channel) for ring in chosen.rings]
        agreed = control.Connect(
            chosen.protocol, rings, chosen.persistent, can_discard=action.can_discard, max_segments=action.max_segments
        )
        if self.worker is not None:
            self.worker.send(agreed)

    def _take(self, message: control.Message) -> None:
        """Take a worker's message."""
        match message:
            case control.Reply():
                reply = self._replies.pop(message.id, None)
                if reply is not None:
                    reply({"data": message.data} if message.ok else {"error": message.data})
            case control.Log():
                level = message.level if message.level in _LEVELS else "warning"
                self._say(level, message.event, **message.fields)
            case (
                control.Opened() | control.Failed() | control.Connected() | control.Halted()
                | control.Paused() | control.Disconnected() | control.Closed()
            ):  # fmt: skip
                self.handle(message)

    def _end(self, sentence: str) -> None:
        self.worker = None
        for reply in self._replies.values():
            reply({"error": f"{self.path}: the worker ended before it answered"})
        self._replies.clear()
        self.handle(events.Ended(sentence))

    def _show_error(self) -> None:
        if not self.is_forgotten:
            self._shown.error(self.device.error)

    def _show(self) -> None:
        if self.is_forgotten:
            return
        self._shown.status(
            {
                "chain": self.device.spec.chain if self.device.spec else "",
                "worker": str(self.worker.pid) if self.worker else "",
                "phase": self.device.phase.value,
                "since": datetime.fromtimestamp(self.since, UTC).isoformat(timespec="seconds"),
                "error": self.device.error[:SENTENCE_MAX],
            }
        )

    def _forget(self) -> None:
        self.is_forgotten = True
        self._memories.close()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1  # this may be called again
        store = self._around.store
        with suppress(StoreError):
            if self._watched:
                store.unwatch(self._watched, self.token)
            self._shown.remove()

    def _say(self, level: str, event: str, **fields: str) -> None:
        if not self._brake.allows():
            return
        held_back = self._brake.take_held_back()
        if held_back:
            fields = {**fields, "lines_held_back": str(held_back)}
        # A worker names its own fields: none of them may stand in for one of ours.
        own = {"event", "vbd", "component"}
        getattr(self._log, level)(event, **{key: value for key, value in fields.items() if key not in own})


def _make_journal() -> int:
    """Return the descriptor of an empty journal. Raises: KernelError."""
    try:
        fd = os.memfd_create("xenbackend-journal", os.MFD_CLOEXEC)
        os.ftruncate(fd, journal.SIZE)
    except OSError as error:
        raise KernelError("make a journal", error.errno or errno.EIO) from None
    return fd
