"""Replaces and observes calls of the product while a run lasts, and has the points at which a process may be killed.

Must not change what the product does: a replaced call does the same within this process, and hooks only observe. Each
kill point lies between two effects that another process can see.
"""

from __future__ import annotations

import functools
import gc
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import structlog

from tests.model import openers
from tests.model.fleet import WorkerProcess
from tests.model.machine import Door, collect, freeze, tracking_map_pages
from xenbackend import journal
from xenbackend.errors import XenbackendError
from xenbackend.note import Note
from xenbackend.protocol import datagrams, messages
from xenbackend.rig import guest as rig_guest
from xenbackend.rig import host as rig_host
from xenbackend.supervisor.service import fleet, main
from xenbackend.supervisor.service.ledger import Ledger
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.orders import Orders
from xenbackend.worker import main as worker_main
from xenbackend.worker import stages
from xenbackend.worker.channel import Channel
from xenbackend.worker.connection import Connection
from xenbackend.worker.disk import Disk
from xenbackend.worker.files import HostFiles
from xenbackend.worker.opener import RemoteOpener

if TYPE_CHECKING:
    from tests.model.world import World


@contextmanager
def applied(world: World) -> Iterator[None]:
    """Have all replacements and hooks in place within this context."""
    with ExitStack() as undo:
        for owner, name, value in [*_machine(world), *_hooks(world)]:
            undo.enter_context(patch.object(owner, name, value))
        undo.enter_context(patch.dict(HostFiles.__init__.__kwdefaults__, {"use_queues": False, "direct": False}))
        undo.callback(structlog.configure, **structlog.get_config())
        _listen_to_log(world)
        collect()
        freeze()
        gc.disable()  # the objects of a process are collected when it dies
        undo.callback(gc.enable)
        undo.callback(gc.unfreeze)
        yield


def _machine(world: World) -> list[tuple[Any, str, Any]]:
    def send_signal(pidfd: int, number: int) -> None:
        assert number == signal.SIGKILL
        world.send_kill(world.process_of(pidfd))

    def leave(status: int) -> None:
        raise SystemExit(status)

    init = HostFiles.__init__

    @functools.wraps(init)
    def open_files(self: HostFiles, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **{**named, "lock_timeout_s": 0.0})  # nobody else would run during a wait

    open_files.__kwdefaults__ = init.__kwdefaults__
    opened, receive = world.machine.opened, datagrams.receive
    asked = type("Asked", (openers.Asked,), {"world": world})

    def making(function: Callable[..., int]) -> Callable[..., int]:
        return lambda *arguments, **named: opened(function(*arguments, **named))

    def received(*arguments: Any) -> Any:
        data, fds, is_whole = receive(*arguments)
        return data, [opened(fd) for fd in fds], is_whole

    return [
        (rig_host, "Connection", Door),
        (rig_guest, "Connection", Door),
        (rig_host, "map_pages", tracking_map_pages(rig_host.map_pages)),
        (HostFiles, "__init__", open_files),
        (os, "close", world.machine.closed),
        *[(os, name, making(getattr(os, name))) for name in ("open", "dup", "eventfd", "memfd_create")],
        (datagrams, "receive", received),
        (worker_main, "RemoteOpener", asked),
        (time, "sleep", lambda _: None),
        (os, "_exit", leave),
        (signal, "pidfd_send_signal", send_signal),
        (fleet.Worker._receive, "__defaults__", (world.random.choice([1, 1, 64]), math.inf)),
        (main, "taking_signals", lambda *_: nullcontext()),
        (gc, "collect", lambda *_: 0),
        (gc, "freeze", lambda *_: None),
    ] + [(main, name, getattr(main, name)) for name in ("Reactor", "Store", "Fleet")] + [
        (worker_main, "Reactor", worker_main.Reactor)
    ]  # fmt: skip


class _Agreed:
    """Observes `journal.AGREED`."""

    def __init__(self, world: World, agreed: Note) -> None:
        self._world = world
        self._agreed = agreed
        self.read = agreed.read

    def write(self, memory: memoryview, value: dict[str, Any] | None) -> None:
        world, running = self._world, self._world.machine.running
        serves = value is not None and value["connect"] is not None
        world.point(f"worker: before AGREED is {'written' if serves else 'taken back'}")
        if value is not None and serves and isinstance(running, WorkerProcess):
            world.serves(running, value["chain"], "a worker begins to serve")
        self._agreed.write(memory, value)
        world.point(f"worker: after AGREED was {'written' if serves else 'taken back'}")


def _around(
    world: World, owner: Any, name: str, before: str = "", after: str = "", then: Callable[..., None] | None = None
) -> tuple[Any, str, Any]:
    """Put kill points before and after a function, and call `then` with its result and arguments."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def looked_at(*arguments: Any, **named: Any) -> Any:
        if before:
            world.point(before)
        found = function(*arguments, **named)
        if then is not None:
            then(found, *arguments, **named)
        if after:
            world.point(after)
        return found

    return owner, name, looked_at


def _hooks(world: World) -> list[tuple[Any, str, Any]]:
    around = functools.partial(_around, world)
    begin, send = stages.Stages.__init__, fleet.Worker.send

    def begins(self: stages.Stages, order: Any, fds: list[int], *more: Any) -> None:
        world.is_to_open(fds[0])
        begin(self, order, fds, *more)

    def has_opened(_: object, disk: Disk, text: str = "") -> None:
        running = world.machine.running
        if isinstance(running, WorkerProcess):
            world.has_opened(running, text or disk.text)

    def has_branched(chain: str, self: stages.Stages, file: str, *_: object) -> None:
        running = world.machine.running
        if isinstance(running, WorkerProcess):
            world.has_branched(running, self.chain, file, chain)

    def sends(self: fleet.Worker, message: Any, fds: Any = ()) -> None:
        if isinstance(message, messages.Open):
            world.orders_open(message, fds[0])
        world.point("service: before it says a thing")
        send(self, message, fds)
        world.point("service: said a thing")

    return [
        (journal, "AGREED", _Agreed(world, journal.AGREED)),
        (stages.Stages, "__init__", begins),
        around(stages.Stages, "branch", after="worker: an image was made, nobody told", then=has_branched),
        around(Disk, "_open", before="worker: before a chain is opened", then=has_opened),
        around(Disk, "exchange", after="worker: a chain was exchanged, nothing noted"),
        around(Connection, "__init__", after="worker: rings were mapped, nothing noted"),
        around(Connection, "close", before="worker: before rings are unmapped", after="worker: rings were unmapped"),
        around(Channel, "stand", before="worker: before it says where it stands", after="worker: said where it stands"),
        around(Channel, "reply", before="worker: before a reply", after="worker: after a reply"),
        around(RemoteOpener, "make_memory", after="worker: has a new memory"),
        around(Handover, "_write", before="service: before a note", after="service: after a note"),
        around(Ledger, "open", after="service: after an order was entered"),
        around(
            Ledger, "close", before="service: before an order is closed", after="service: after an order was closed"
        ),
        (fleet.Worker, "send", sends),
        (Orders, "give", _judged(world, Orders.give)),
    ]


def _judged(world: World, give: Any) -> Any:
    def judged(self: Orders, verb: str, request: Any, number: int, reply: Any) -> None:
        place = world.place_of_vbd(self._vbd)
        truth = place.truth if place is not None else None
        whole = {**request, "verb": verb}
        if place is not None:
            world.judge.asked(whole, place, number)

        def compared(answer: Any) -> None:
            is_same = place is not None and place.truth is truth
            world.judge.answers(whole, place if is_same else None, number, answer)
            reply(answer)

        try:
            give(self, verb, request, number, compared)
        except XenbackendError:
            if truth is not None:
                truth.targets.pop(number, None)
            raise

    return judged


def _listen_to_log(world: World) -> None:
    def take(_: Any, level: str, fields: Any) -> Any:
        world.log.append({"step": world.steps, **fields, "level": level})
        raise structlog.DropEvent

    structlog.configure(
        processors=[structlog.processors.format_exc_info, take],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        logger_factory=structlog.PrintLoggerFactory(),
        cache_logger_on_first_use=False,
    )
