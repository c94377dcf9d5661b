"""One vbd in service: looks at its nodes, asks its automaton, and does what that answers.

Must not decide: what follows from what is in `device`.

What a guest can make this hold is bounded: two flags say that a look is due, however many events there were.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xenbackend import counters, journal
from xenbackend.blkif.features import MAXIMA, parse_frontend
from xenbackend.blkif.handshake import name, parse_state
from xenbackend.errors import ConfigError, GuestError, KernelError, StoreError, XenbackendError
from xenbackend.protocol import messages
from xenbackend.supervisor.service.fleet import Worker
from xenbackend.supervisor.vbd import events
from xenbackend.supervisor.vbd.claim import Claim, Taking
from xenbackend.supervisor.vbd.context import Context
from xenbackend.supervisor.vbd.device import Device
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.negotiation import connect_of
from xenbackend.supervisor.vbd.orders import Orders
from xenbackend.supervisor.vbd.vbd_log import VbdLog
from xenbackend.supervisor.xenstore.domain import boots_by_device_model, is_incoming
from xenbackend.supervisor.xenstore.lookout import Lookout
from xenbackend.supervisor.xenstore.nodes import SENTENCE_MAX, Nodes
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.shown import Shown

Reply = Callable[[dict[str, Any]], None]
_LEVELS = ("debug", "info", "warning", "error", "critical")
_RETRY_S = 1.0  # after xenstore refused something although it is there
LONG_S = 60.0  # a worker that lived so long did not die in vain


class Vbd:
    """One vbd, its worker, and what its workers leave to each other."""

    def __init__(self, path: VbdPath, context: Context, inherited: Mapping[str, int] | None = None) -> None:
        """Begin, or go on with the descriptors that an earlier service left. Raises: KernelError."""
        self.path = path
        self.device = Device(path, context.settings.limits, os.getpid())
        self.worker: Worker | None = None
        self.since = context.time()  # of the last change of our state
        self.is_forgotten = False
        self.node_changed = True
        self.theirs_changed = True
        self.deadline: float | None = None
        self._context = context
        self._retry_at = 0.0
        self._lookout = Lookout(context.store, path)
        self._say = VbdLog(path, context.now).say
        self.handover = Handover(context.keeper, path, inherited, lambda sentence: self._say("warning", sentence))
        self.orders = Orders(self, context.settings.on_error)
        self._progress = journal.progress(self.handover.page)  # of the guest, when the last worker ended
        self._worker_since = context.now()
        self._shown = Shown(context.store, path)
        self._events: deque[events.Event] = deque()
        self._replies: dict[int, Reply] = {}
        self.scripts: list[Reply] = []  # of hotplug scripts that wait for an answer
        noted = self.handover.notes.get("claim")
        self._taking = Taking(self._begin_claim, context.now, self._begin_claim(noted) if noted else None)
        self._limits = MAXIMA if noted else context.settings.limits  # that a frontend has to keep to
        self._last_command = int(context.time() * 1e6)  # a reply to an earlier service's command answers none of ours
        if self.handover.worker is None and self.handover.swapped() is None:
            self.handover.note(swap=None)  # the worker that was to put another chain in has gone before it did
        if self.handover.worker is not None:
            self.worker = context.fleet.adopt(self.handover.worker, self._take, self._end)
            report = self._last_command
            self.handle(events.Inherited(report))
            self.tell(messages.Report(report) if self.handover.is_readable else messages.Close())

    @property
    def token(self) -> str:
        """The token of the watch on the frontend's state."""
        return self._lookout.token

    def next_deadline(self) -> float | None:
        """Return when `turn` has to be called at the latest."""
        if self._taking.due is not None:
            return self._taking.due
        retry_at = self._retry_at if self.node_changed or self.theirs_changed else None
        return min((each for each in (self.deadline, retry_at) if each is not None), default=None)

    def turn(self) -> bool:
        """Do what is due, and return whether there was anything."""
        now = self._context.now()
        if self._taking.due is not None:
            return self._go_on_taking()
        is_due = (self.node_changed or self.theirs_changed) and now >= self._retry_at
        if is_due and self._context.store.is_connected:
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
        if self._taking.due is None:
            self.handle(events.Called())

    def stop(self, *, leaves: bool) -> None:
        """Finish and close, or leave the worker to the next service: see `events.Stop`."""
        self._guarded(self._taking.give_back)
        self.handle(events.Stop(leaves))

    def doubt(self) -> None:
        """Look at everything again and show it anew: xenstore was away."""
        self.node_changed, self._retry_at = True, 0.0
        self._shown.doubt()

    def counters_page(self) -> memoryview | None:
        """Return the counters as they are now, `counters.SIZE` bytes, without asking the worker; None without one."""
        return memoryview(bytes(self.handover.page[: counters.SIZE])) if self.worker else None

    def command(self, layer: str, verb: str, arguments: list[str], reply: Reply) -> None:
        """Ask a layer; `reply` gets ``{"data": text}`` or ``{"error": sentence}``."""
        if self.worker is None:
            reply({"error": f"{self.path} has no worker: {self.device.error or 'its chain is not open'}"})
            return
        self._last_command += 1
        self._replies[self._last_command] = reply
        self.worker.send(messages.Command(self._last_command, layer, verb, arguments))

    def tell(self, message: messages.Message) -> bool:
        """Send a message to the worker; False where there is none."""
        if self.worker is not None:
            self.worker.send(message)
        return self.worker is not None

    def _guarded(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function; where xenstore lets it down a fresh look will put things right."""
        try:
            function(*arguments)
        except StoreError as error:
            self.node_changed = True
            self._retry_at = self._context.now() + _RETRY_S
            if self._context.store.is_connected:
                self._say("warning", str(error))

    def _answer_scripts(self, answer: dict[str, Any]) -> None:
        scripts, self.scripts = self.scripts, []
        for reply in scripts:
            reply(answer)

    def _begin_claim(self, noted: dict[str, Any] | None = None) -> Claim:
        context = self._context
        return Claim(
            context.store, context.bus, self.path, context.now, lambda kept: self.handover.note(claim=kept), noted
        )

    def _take_from_kernel(self) -> None:
        """Begin to take the vbd from the kernel's backend where that has it; looks wait until it is ours."""
        if self._context.bus.has(self.path):
            self._taking.begin()
            self._limits = MAXIMA  # a frontend that runs already goes by what blkback offered

    def _go_on_taking(self) -> bool:
        try:
            if not self._taking.step():
                return False
        except XenbackendError as error:
            self.node_changed = True
            self._say("error", str(error))
            self._answer_scripts({"error": str(error)})
            return True
        self._guarded(self._look_at_all)
        if self.scripts:
            self.handle(events.Called())
        return True

    def _look_at_all(self) -> None:
        self.node_changed = True
        self._look()

    def _look(self) -> None:
        if self.node_changed:
            self._name_chain()
        keys = self._lookout.keys() if self.node_changed else self.device.keys
        theirs = self._lookout.theirs(keys or {})
        self.node_changed = self.theirs_changed = False
        self.handle(events.Seen(keys, theirs))

    def _name_chain(self) -> None:
        """Let ``params`` name the chain that is in service, where another one was put in."""
        swap = self.handover.swapped()
        if swap is not None:
            self._lookout.rename_chain(*swap)
            self.handover.note(swap=None, chain=swap[1])

    def _perform(self, action: events.Action) -> None:
        match action:
            case events.Write():
                self._write(action)
            case events.Start():
                self._start(action)
            case events.Join():
                self._join(action)
            case events.Tell():
                self.tell(action.message)
            case events.Kill() if self.worker is not None:
                self.worker.kill(action.sentence)
            case events.Limit():
                self.deadline = None if action.seconds is None else self._context.now() + action.seconds
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

        if not self._context.store.transact(body):
            self.node_changed = True
            return
        state = action.keys.get("state")
        if state is not None and parse_state(state) is not action.state:
            self.since = self._context.time()
            self._say("info", name(parse_state(state)), frontend=name(self.device.theirs))

    def _start(self, action: events.Start) -> None:
        spec, settings = action.spec, self._context.settings
        self._worker_since = self._context.now()
        try:
            fd, memories = self.handover.descriptors(spec.chain)
            worker = self._context.fleet.start(self._take, self._end)
        except (ConfigError, KernelError) as error:
            self.handle(events.Ended(str(error)))
            return
        self.worker = worker
        if self.handover.agreed():
            worker.boost()
        self.handover.keep_worker(*worker.descriptors)
        message = messages.Open(
            vbd=str(self.path),
            host=settings.host,
            frontend_domid=self.path.frontend_domid,
            chain=spec.chain,
            read_only=spec.read_only,
            shareable=spec.shareable,
            resumes="hotplug-status" in (self.device.keys or {}),  # somebody had come as far as to open it
            memories=list(memories),
            may_wait=is_incoming(self._context.store, self.path.frontend_domid),
            settings={"poll_us": settings.poll_us},
            export=self._export_path(),
            policy=self.orders.policy,
            lost=action.lost,
            is_paused=self.orders.is_paused,
        )
        worker.send(message, [fd, *memories.values()])

    def _export_path(self) -> str:
        """Return where the worker is to export the disk for a guest that boots from it; empty for one that does not."""
        if not (self.device.may_boot and boots_by_device_model(self._context.store, self.path.frontend_domid)):
            return ""
        name = str(self.path).replace("/", "-")
        return str(Path(self._context.settings.socket).parent / "nbd" / f"{name}.sock")

    def _join(self, action: events.Join) -> None:
        self._take_from_kernel()
        if self._taking.due is not None:
            self.handle(events.Postponed())
            return
        agreed = self.handover.agreed() if action.goes_on else None
        try:
            # One that is connected already goes by what an earlier service offered.
            chosen = parse_frontend(self._lookout.read_frontend, MAXIMA if action.goes_on else self._limits)
        except GuestError as error:
            if agreed is not None:  # what it writes now cannot take back what it had agreed to
                self.tell(messages.Rejoin())
            else:
                self.handle(messages.Failed(str(error), errno.EINVAL))
            return
        except StoreError:
            self.handle(events.Postponed())
            raise
        connect = connect_of(chosen, action)
        are_the_same = agreed is not None and agreed[1].rings == connect.rings
        self.tell(messages.Rejoin() if are_the_same else connect)

    def _take(self, message: messages.Message, fds: list[int]) -> None:
        """Take a worker's message."""
        match message:
            case messages.Keep() if fds:
                self.handover.keep(message.name, fds.pop())
            case messages.Drop():
                self.handover.drop(message.name)
            case messages.Reply():
                reply = self._replies.pop(message.id, None)
                if reply is not None:
                    reply({"data": message.data} if message.ok else {"error": message.data})
            case messages.Log():
                level = message.level if message.level in _LEVELS else "warning"
                self._say(level, message.event, **message.fields)
            case messages.Held() | messages.Branched() | messages.Unswapped():
                self.orders.hear(message)
            case (
                messages.Opened() | messages.Failed() | messages.Connected() | messages.Halted() | messages.Paused()
                | messages.Trouble() | messages.Swapped() | messages.Standing() | messages.Disconnected()
                | messages.Closed()
            ):  # fmt: skip
                self.handle(message)
                self.orders.hear(message)
                self._take_note(message)
        for fd in fds:
            os.close(fd)

    def _take_note(self, message: messages.Message) -> None:
        if isinstance(message, messages.Swapped):
            self._guarded(self._name_chain)
        elif isinstance(message, messages.Connected | messages.Standing) and self.worker is not None:
            self.worker.unboost()

    def _end(self, sentence: str) -> None:
        self.worker = None
        for reply in self._replies.values():
            reply({"error": f"{self.path}: the worker ended before it answered"})
        self._replies.clear()
        self.handover.forget_worker()
        progress = journal.progress(self.handover.page)
        lived = self._context.now() - self._worker_since > LONG_S
        has_progressed, self._progress = lived or progress != self._progress, progress
        swap = self.handover.swapped()
        if swap is None:
            self.handover.note(swap=None)  # it never came to that
        self.handle(events.Ended(sentence, has_progressed, swap[1] if swap else ""))
        self.orders.worker_ended(sentence)

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
        if self.is_forgotten:
            return
        self.is_forgotten = True
        leaves = self.device.is_leaving
        sentence = f"{self.path}: the service {'is being replaced; ask again' if leaves else 'has let go of it'}"
        self.orders.give_up(sentence)
        for reply in self._replies.values():
            reply({"error": sentence})
        if not leaves:
            self.handover.close()
        else:
            self.handover.leave()
            if self.worker is not None:
                self.worker.leave()
        with suppress(StoreError):
            self._lookout.forget()
            self._shown.remove()
