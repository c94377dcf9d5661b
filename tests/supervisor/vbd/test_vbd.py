"""One vbd in service when xenstore or a guest gets in its way; its ordinary life is in `test_served.py`."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.descriptors import open_descriptors
from tests.supervisor.helpers import (
    FAKE_WORKER,
    NEVER_READY,
    PATH,
    PATIENCE_S,
    Kept,
    Stepped,
    offer_ring,
    remove_like_libxl,
    settle,
    write_like_libxl,
)
from tests.until import until
from xenbackend import journal
from xenbackend.blkif.features import Limits, publish_at_probe
from xenbackend.blkif.handshake import XenbusState
from xenbackend.errors import KernelError, StoreError
from xenbackend.kernel import memfd
from xenbackend.kernel.process import state_of
from xenbackend.protocol.codes import Code
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service.brake import BURST
from xenbackend.supervisor.service.fleet import Fleet, Worker
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.service.status import describe_briefly
from xenbackend.supervisor.vbd import vbd as vbd_module
from xenbackend.supervisor.vbd.device import Phase
from xenbackend.supervisor.vbd.ending import Ending
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.phase import LIMIT_S
from xenbackend.supervisor.vbd.vbd import Vbd, events
from xenbackend.supervisor.vbd.vbd_log import PER_HOUR
from xenbackend.supervisor.vbd.vbd_nodes import VbdNodes
from xenbackend.supervisor.xenstore.store import Store

pytestmark = pytest.mark.slow  # every one starts processes


def test_write_for_a_state_that_has_passed_is_dropped(stepped: Stepped, toolstack: Store) -> None:
    """A write is made only if the state is still the one that it was decided for; else another look follows."""
    write_like_libxl(toolstack)
    vbd = stepped.vbd()
    stepped.until(lambda: toolstack.read(f"{PATH.backend}/state") == "2")
    vbd._must_look.clear()
    vbd._write(events.Write({"state": "4", "sectors": "8"}, XenbusState.CLOSING))

    assert "node" in vbd._must_look
    assert "2" == toolstack.read(f"{PATH.backend}/state")


def test_write_into_a_node_that_is_gone_does_not_make_it_again(stepped: Stepped, toolstack: Store) -> None:
    """A directory that the toolstack has removed is not made again by a late write."""
    write_like_libxl(toolstack)
    vbd = stepped.vbd()
    toolstack.remove(PATH.backend)
    vbd._write(events.Write({"state": "2"}, XenbusState.INITIALISING))

    assert toolstack.read_optional(PATH.backend) is None


def test_what_xenstore_has_taken_is_known_without_another_look(stepped: Stepped, toolstack: Store) -> None:
    """Keys count as written once xenstore has taken them: else a node made anew before they were seen would be taken
    for the former one.
    """
    write_like_libxl(toolstack)
    vbd = Vbd(PATH, stepped.context)
    mark = vbd.device.sight.mark
    vbd.stop(leaves=False)
    stepped.until(lambda: vbd.is_forgotten)

    assert mark in publish_at_probe(Limits())


def test_lines_that_a_guest_provokes_are_bounded(stepped: Stepped, toolstack: Store, lines: io.StringIO) -> None:
    """R13: a frontend that toggles its state without end causes a bounded number of log lines."""
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    for number in range(300):
        toolstack.write(f"{PATH.frontend}/state", "5" if number % 2 else "1")
        if number < 100:  # later ones are seen only now and then
            stepped.until(lambda: toolstack.read(f"{PATH.backend}/state") == ("5" if number % 2 else "2"))  # noqa: B023 - at once

    assert 10 < len(lines.getvalue().splitlines())
    assert len(lines.getvalue()) < PER_HOUR // 4


def test_a_guest_that_floods_its_own_nodes_is_served_once_it_stops(
    stepped: Stepped, toolstack: Store, guest: Store, lines: io.StringIO
) -> None:
    """R11, R13: if a guest writes to its nodes without end, not every write is looked at, but the last one is, a moment
    later. One log line names the disk, and has nothing of what the guest wrote.
    """
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    looks = []
    look = stepped.vbd()._nodes.theirs
    stepped.vbd()._nodes.theirs = lambda keys: looks.append(1) or look(keys)
    for number in range(1000):
        guest.write(f"{PATH.frontend}/state", f"garbage {number}")
        stepped.turn()
    during = len(looks)
    offer_ring(guest)
    stepped.until(lambda: toolstack.read(f"{PATH.backend}/state") == "4")

    [line] = [each for each in lines.getvalue().splitlines() if "writes to xenstore all the time" in each]

    assert 0 < during <= 2 * BURST
    assert ("5/xvda" in line, "garbage" in line) == (True, False), line
    assert stepped.registry.braked_s(stepped.vbd()) > 0


def test_the_worker_hears_what_was_offered(
    xenstored: Xenstored, toolstack: Store, guest: Store, lines: io.StringIO
) -> None:
    """The worker, which has to enforce them, is told the limits of the settings, and that the disk cannot discard."""
    stepped = Stepped(xenstored.address, Settings(limits=Limits(max_segments=32)))
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    offer_ring(guest)
    stepped.until(lambda: toolstack.read(f"{PATH.backend}/state") == "4")
    stepped.close()

    assert "discard=False segments=32" in lines.getvalue()


@pytest.mark.parametrize(("type_", "exports"), [("hvm", True), ("pv", False), ("", False)])
def test_disks_of_hvm_guests_are_exported(
    xenstored: Xenstored, toolstack: Store, guest: Store, tmp_path: Path, type_: str, *, exports: bool
) -> None:
    """Disks of HVM guests are exported until the guest's own driver connects, since only their firmware boots from a
    disk before.
    """
    if type_:
        toolstack.write("/libxl/5/type", type_)
    stepped = Stepped(xenstored.address, Settings(socket=str(tmp_path / "control.sock")))
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    where = toolstack.read_optional(f"{PATH.backend}/physical-device-path")
    offer_ring(guest)
    stepped.until(lambda: toolstack.read(f"{PATH.backend}/state") == "4")

    assert (f"nbd+unix:///?socket={tmp_path}/nbd/vbd-5-51712.sock" if exports else None) == where
    assert toolstack.read_optional(f"{PATH.backend}/physical-device-path") is None
    assert not stepped.vbd().device.may_boot or not exports
    stepped.close()


@pytest.mark.parametrize("is_the_same", [True, False])
def test_rings_are_gone_on_with_where_they_are_the_same(
    stepped: Stepped, toolstack: Store, guest: Store, lines: io.StringIO, *, is_the_same: bool
) -> None:
    """A successor goes on with the rings that the journal belongs to; if the guest's rings are others, it connects to
    those anew.
    """
    vbd = _serve(stepped, toolstack, guest)
    if not is_the_same:
        guest.write(f"{PATH.frontend}/ring-ref", "9")
    _kill(vbd)
    stepped.until(lambda: lines.getvalue().count("opening") == 2 and vbd.device.phase is Phase.SERVING)

    assert (1, is_the_same) == (
        lines.getvalue().count("connecting") - (not is_the_same),
        "rejoining" in lines.getvalue(),
    )


@pytest.mark.parametrize(
    ("key", "value", "is_replaced"), [("ring-ref", "9", True), ("ring-ref", "8", False), ("ring-ref", "x", False)]
)
def test_a_worker_is_taken_over_with_the_rings_that_the_frontend_uses(
    xenstored: Xenstored, toolstack: Store, guest: Store, kept: Kept, lines: io.StringIO, *,
    key: str, value: str, is_replaced: bool,
) -> None:  # fmt: skip
    """If a frontend has begun anew while no service ran, and both ends are Connected, the next service has a successor
    serve the new rings. A worker whose rings are the same, or whose frontend has written nonsense, serves on.
    """
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    vbd = _serve(stepped, toolstack, guest)
    assert vbd.worker is not None
    former = vbd.worker.pid
    stepped.leave()
    guest.write(f"{PATH.frontend}/{key}", value)
    with closing(Stepped(xenstored.address, Settings(), keeper=kept.keeper())) as following:
        vbd = following.vbd()
        following.until(lambda: vbd.device.phase is Phase.SERVING and not vbd.device.sight.must_compare)
        assert vbd.worker is not None
        found = vbd.worker.pid

    assert "4" == toolstack.read(f"{PATH.backend}/state")
    assert is_replaced == (found != former) == ("grefs=[9]" in lines.getvalue())


def test_a_successor_comes_before_others_until_it_serves(
    stepped: Stepped, toolstack: Store, guest: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A successor has a higher priority until it serves, because a guest waits for it; a first worker does not."""
    seen: list[str] = []
    boost, unboost = Worker.boost, Worker.unboost
    monkeypatch.setattr(Worker, "boost", lambda worker: (seen.append("boost"), boost(worker)))
    monkeypatch.setattr(Worker, "unboost", lambda worker: (seen.append("unboost"), unboost(worker)))
    vbd = _serve(stepped, toolstack, guest)
    assert ["unboost"] == seen
    _kill(vbd)
    stepped.until(lambda: len(seen) == 3)

    assert ["unboost", "boost", "unboost"] == seen
    assert vbd.worker is not None
    assert os.getpriority(os.PRIO_PROCESS, 0) == os.getpriority(os.PRIO_PROCESS, vbd.worker.pid)


def test_a_frontend_that_writes_nonsense_while_it_is_served_is_served_on(
    stepped: Stepped, toolstack: Store, guest: Store, lines: io.StringIO
) -> None:
    """If a frontend overwrites its keys with nonsense while it is served, a successor goes on by what was agreed."""
    vbd = _serve(stepped, toolstack, guest)
    guest.write(f"{PATH.frontend}/ring-ref", "nonsense")
    _kill(vbd)
    stepped.until(lambda: "rejoining" in lines.getvalue() and vbd.device.phase is Phase.SERVING)

    assert "4" == toolstack.read(f"{PATH.backend}/state")


def test_a_frontend_that_is_connected_may_have_more_queues_than_are_offered_today(
    xenstored: Xenstored, toolstack: Store, guest: Store
) -> None:
    """A connected frontend may have more queues than the settings now allow, as an earlier service offered."""
    stepped = Stepped(xenstored.address, Settings(limits=Limits(max_queues=1)))
    write_like_libxl(toolstack, state="4", hotplug_status="connected")
    guest.write(f"{PATH.frontend}/multi-queue-num-queues", "2")
    for queue in "01":
        guest.write(f"{PATH.frontend}/queue-{queue}/ring-ref", f"8{queue}")
        guest.write(f"{PATH.frontend}/queue-{queue}/event-channel", f"3{queue}")
    guest.write(f"{PATH.frontend}/state", "4")
    stepped.until(lambda: stepped.vbd().device.phase is Phase.SERVING)
    stepped.close()

    assert "4" == toolstack.read(f"{PATH.backend}/state")


def test_a_worker_that_lived_long_has_not_died_in_vain(
    stepped: Stepped, toolstack: Store, guest: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that lived long has not died in vain, even if its guest had nothing to do."""
    monkeypatch.setattr("xenbackend.supervisor.vbd.lives.LONG_S", 0.0)
    vbd = _serve(stepped, toolstack, guest)
    for _ in range(8):
        pid = _kill(vbd)
        stepped.until(lambda: vbd.worker is not None and vbd.worker.pid != pid and vbd.device.phase is Phase.SERVING)  # noqa: B023 - at once

    assert "" == vbd.device.error


@pytest.mark.parametrize("breaks", [True, False], ids=["breaks the protocol", "dies"])
def test_a_worker_that_breaks_the_protocol_is_not_believed_that_its_guest_got_on(
    stepped: Stepped, toolstack: Store, guest: Store, monkeypatch: pytest.MonkeyPatch, *, breaks: bool
) -> None:
    """The journal of a worker that broke the protocol is no proof of progress, so that such workers are given up in the
    end; the journal of one that died is.
    """
    monkeypatch.setattr("xenbackend.supervisor.vbd.backoff.REST_S", (0.0,) * 6)
    vbd = _serve(stepped, toolstack, guest)
    ring = journal.RingJournal(vbd.handover.page, 0, journal.SLOT)
    ring.words[journal.RING_ENTRIES] = 32
    for _ in range(8):
        if vbd.worker is None:
            break
        ring.words[journal.REQ_CONS] += 1
        pid = vbd.worker.pid
        vbd.link.kill("it said what cannot be", is_breach=breaks)
        stepped.until(lambda: vbd.worker is None or (vbd.worker.pid != pid and vbd.device.phase is Phase.SERVING))  # noqa: B023 - at once
        stepped.until(lambda: vbd.device.phase in (Phase.SERVING, Phase.NONE))
    ring.release()

    assert (breaks, breaks) == (vbd.worker is None, "7 in a row" in vbd.device.error)


def test_a_host_without_processes_is_tried_again(xenstored: Xenstored, toolstack: Store) -> None:
    """If no worker can be started, the disk rests, shows why, and tries again."""
    stepped = Stepped(xenstored.address, Settings())
    stepped.fleet._command = ("/nonexistent/worker",)
    write_like_libxl(toolstack)
    stepped.until(lambda: stepped.vbd().device.phase is Phase.RESTING)
    assert "start a worker process" in stepped.vbd().device.error
    stepped.fleet._command = FAKE_WORKER
    stepped.expire()
    stepped.until(lambda: stepped.vbd().device.phase is Phase.OPEN)
    stepped.close()


def test_a_worker_that_waits_for_its_turn_is_not_too_slow(xenstored: Xenstored, toolstack: Store, kept: Kept) -> None:
    """While a worker is queued to be started, which may take long on a slow host, its disk has no limit and shows no
    worker, and nothing of it is kept. All of that begins when the process exists.
    """
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    stepped.fleet._births._command = NEVER_READY
    stepped.fleet.prepare()
    write_like_libxl(toolstack)
    vbd = stepped.until(lambda: stepped.registry.vbds.get(PATH))
    stepped.until(lambda: vbd.device.phase is Phase.OPENING)
    before = (vbd._limit._timer.due, any("worker" in each for each in kept.fds), describe_briefly(vbd)["worker"])
    stepped.fleet._births._has_no_answer()
    stepped.until(lambda: vbd.worker is not None and vbd.worker.is_there)
    after = (vbd._limit._timer.due is not None, any("worker" in each for each in kept.fds))
    stepped.until(lambda: vbd.device.phase is Phase.OPEN)
    stepped.close()

    assert ((None, False, ""), (True, True)) == (before, after)


class Late(Stepped):
    """A registry whose service can be held up."""

    def hold_up(self, worker: Worker, fd: int | None) -> None:
        """Hold it up until a descriptor is readable, and the worker has no more to say, and by the loop's clock for
        longer than any limit.
        """
        if fd is not None:
            assert select.select([fd], [], [], PATIENCE_S)[0]
            until(lambda: state_of(worker.pid) in ("S", "Z", ""))
        self.loop.now = lambda: time.monotonic() + 2 * max(LIMIT_S.values())


def _socket(worker: Worker) -> int:
    return worker.descriptors[0]


def _end(worker: Worker) -> int:
    return worker.descriptors[1]


@pytest.mark.parametrize(("chain", "survives"), [("null:1G", True), ("null:4G", False)])
def test_a_service_that_takes_long_to_begin_kills_no_worker_that_has_answered(
    xenstored: Xenstored, toolstack: Store, kept: Kept, chain: str, *, survives: bool
) -> None:
    """A worker that was taken over and has answered in time is heard before its time is over, however long the service
    takes until it listens. A worker that has not answered is killed.
    """
    write_like_libxl(toolstack, params=chain)
    former = Late(xenstored.address, Settings(), keeper=kept.keeper())
    former.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    assert former.vbd().worker
    pid = former.vbd().worker.pid
    former.leave()
    service = Late(xenstored.address, Settings(), keeper=kept.keeper(), starts=False)
    service.registry.start()
    adopted = service.vbd().worker
    assert adopted
    service.hold_up(adopted, _socket(adopted) if survives else None)
    service.until(lambda: service.vbd().device.phase not in (Phase.ADOPTING, Phase.NONE, Phase.OPENING))
    found = service.vbd().worker
    assert found
    after = found.pid
    service.close()

    assert survives == (pid == after)


@pytest.mark.parametrize(
    ("chain", "heard", "phase", "error"),
    [
        ("null:1G", _socket, Phase.SERVING, ""),
        ("null:3G", _end, Phase.OPENING, "the worker ended unexpectedly with exit status 3"),
    ],
)
def test_a_service_that_was_held_up_hears_its_workers_first(
    xenstored: Xenstored,
    toolstack: Store,
    guest: Store,
    chain: str,
    heard: Callable[[Worker], int],
    phase: Phase,
    error: str,
) -> None:
    """If a service was stopped for longer than a limit, as by SIGSTOP, a worker that has answered meanwhile is not
    killed, and the end of one that has died is told as it was.
    """
    write_like_libxl(toolstack, params=chain)
    service = Late(xenstored.address, Settings())
    service.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    worker = service.vbd().worker
    assert worker is not None
    os.kill(worker.pid, signal.SIGSTOP)  # so that it answers when the service does not listen any more
    offer_ring(guest)
    service.until(lambda: service.vbd().device.phase is Phase.CONNECTING)
    os.kill(worker.pid, signal.SIGCONT)
    service.hold_up(worker, heard(worker))
    settle(service.loop, 1)
    seen = (service.vbd().device.phase, service.vbd().worker is worker, service.vbd().device.error)
    lives = service.give("pause").code is Code.OK and service.vbd().worker is worker
    service.close()

    assert ((phase, not error, error), not error) == (seen, lives)


def test_a_disk_that_waits_for_its_turn_is_detached_at_once(xenstored: Xenstored, toolstack: Store) -> None:
    """If a disk is detached while its worker is queued, the worker is never started."""
    stepped = Stepped(xenstored.address, Settings())
    stepped.fleet._births._command = NEVER_READY
    stepped.fleet.prepare()
    write_like_libxl(toolstack)
    vbd = stepped.until(lambda: stepped.registry.vbds.get(PATH))
    stepped.until(lambda: vbd.device.phase is Phase.OPENING)
    worker = vbd.worker
    remove_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read(f"{PATH.backend}/state") == "6")
    stepped.close()

    assert worker is not None
    assert not worker.is_there


@pytest.mark.parametrize(("owner", "method", "problem"), [
    (memfd, "map_sealed", KernelError("map a memory of 8192 bytes", errno.ENOMEM)),
    (Fleet, "adopt", OSError(errno.ENOSPC, "watch a descriptor")),
], ids=["memory", "watches"])  # fmt: skip
def test_a_host_that_is_short_of_something_costs_no_guest_its_worker(
    xenstored: Xenstored, toolstack: Store, guest: Store, kept: Kept, monkeypatch: pytest.MonkeyPatch,
    owner: Any, method: str, problem: Exception,
) -> None:  # fmt: skip
    """If a takeover fails because the host is short of something, it is tried again, and the same worker goes on with
    the same journal.
    """

    def fail(*_: object, **__: object) -> None:
        raise problem

    former = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    pid = _serve(former, toolstack, guest).worker.pid
    former.leave()
    inodes = {name: os.fstat(fd).st_ino for name, fd in kept.fds.items() if name.startswith("vbd")}
    keeper = kept.keeper()
    with monkeypatch.context() as patch:
        following = Stepped(xenstored.address, Settings(), keeper=keeper, starts=False)
        patch.setattr(owner, method, fail)
        following.registry.start()
        is_served = bool(following.registry.vbds)
    vbd = following.vbd()
    following.until(lambda: vbd.device.phase is Phase.SERVING)
    found = following.vbd().worker.pid
    after = {name: os.fstat(fd).st_ino for name, fd in kept.fds.items() if name.startswith("vbd")}
    following.close()

    assert (False, pid, inodes) == (is_served, found, after)


@pytest.mark.parametrize("where", ["descriptors", "keep_worker"])
def test_a_fault_over_the_start_of_a_worker_is_that_workers_end(
    stepped: Stepped, toolstack: Store, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """An exception during the start of a worker counts as the worker's end, so that another one follows."""
    with monkeypatch.context() as patch:
        patch.setattr(Handover, where, _fail)
        write_like_libxl(toolstack)
        stepped.until(lambda: stepped.bugs)
    stepped.until(lambda: stepped.vbd().device.phase is Phase.OPEN)
    assert {ZeroDivisionError} == {type(bug) for bug in stepped.bugs}
    stepped.bugs.clear()


def test_a_fault_over_one_action_leaves_out_no_other(
    stepped: Stepped, toolstack: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one action raises an exception, the others are carried out, and keys that were not written follow with the
    next look.
    """
    with monkeypatch.context() as patch:
        patch.setattr(VbdNodes, "write", _fail)
        write_like_libxl(toolstack)
        stepped.until(lambda: stepped.vbd().device.phase is Phase.OPEN)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/state") == "2")
    assert {ZeroDivisionError} == {type(bug) for bug in stepped.bugs}
    stepped.bugs.clear()


def test_a_fault_over_the_end_of_a_vbd_leaves_its_place_free(
    stepped: Stepped, toolstack: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the end of a vbd raises an exception, the registry still forgets it, and another one may take its place."""
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    with monkeypatch.context() as patch:
        patch.setattr(VbdNodes, "forget", _fail)
        toolstack.remove(PATH.backend)
        stepped.until(lambda: not stepped.registry.vbds)
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    assert [ZeroDivisionError] == [type(bug) for bug in stepped.bugs]
    stepped.bugs.clear()


@pytest.mark.parametrize("step", ["find", "Device", "Arrival"])
def test_a_fault_before_the_beginning_leaves_nothing_open(
    xenstored: Xenstored, kept: Kept, toolstack: Store, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """If making a vbd raises an exception, everything is closed, whether the disk is new or an earlier service has left
    it. Its worker ends, and the disk begins anew.
    """
    owner: Any = Ending if step == "find" else vbd_module
    serving = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, _fail)
        before = len(open_descriptors())
        write_like_libxl(toolstack)
        serving.until(lambda: serving.bugs)
        assert ([], before) == ([name for name in kept.fds if name.startswith("vbd")], len(open_descriptors()))
    vbd = serving.vbd()
    serving.until(lambda: vbd.device.phase is Phase.OPEN)
    serving.bugs.clear()
    serving.leave()

    left = len([name for name in kept.fds if name.startswith("vbd")])  # as many here, and as many with the keeper
    following = Stepped(xenstored.address, Settings(), keeper=kept.keeper(), starts=False)
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, _fail)
        following.store.fileno()  # opens a descriptor the first time
        before = len(open_descriptors()) - 2 * left
        following.registry.start()
        following.until(lambda: following.registry.has_taken_over)
        assert ([], before) == ([name for name in kept.fds if name.startswith("vbd")], len(open_descriptors()))
    vbd = following.vbd()
    following.until(lambda: vbd.device.phase is Phase.OPEN)
    assert {ZeroDivisionError} == {type(bug) for bug in following.bugs}
    following.bugs.clear()
    following.close()


def test_a_shortage_before_the_beginning_leaves_the_worker_to_a_later_try(
    xenstored: Xenstored, kept: Kept, toolstack: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a vbd that an earlier service left cannot be made because the host is short of something, its worker goes on,
    the keeper keeps everything, and a later try takes that worker over.
    """
    serving = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    write_like_libxl(toolstack)
    serving.until(lambda: serving.registry.vbds and serving.vbd().device.phase is Phase.OPEN)
    worker = serving.vbd().worker
    assert worker is not None
    serving.leave()
    names = sorted(kept.fds)
    following = Stepped(xenstored.address, Settings(), keeper=kept.keeper(), starts=False)
    tries: list[object] = []

    def lack(*_: object, **__: object) -> None:
        tries.append(None)
        raise KernelError("make a memory", errno.ENOMEM)

    with monkeypatch.context() as patch:
        patch.setattr(Ending, "find", lack)
        following.registry.start()
        following.until(lambda: len(tries) > 1)
        assert names == sorted(kept.fds)
    following.until(lambda: following.registry.vbds)
    found = following.vbd().worker
    assert found is not None
    assert worker.pid == found.pid
    following.close()


def test_a_fault_over_the_beginning_leaves_nothing_open(
    stepped: Stepped, toolstack: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the first look raises an exception, no descriptor, timer or process is left, however often that happens."""
    toolstack.read_optional("/local")  # so that xenstored, which is in this process, has accepted the connection
    before = len(open_descriptors())
    with monkeypatch.context() as patch:
        patch.setattr(Vbd, "_look_if_due", _fail)
        write_like_libxl(toolstack)
        stepped.until(lambda: stepped.bugs)
    assert ({}, before) == (dict(stepped.registry.vbds), len(open_descriptors()))
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    assert [ZeroDivisionError] == [type(bug) for bug in stepped.bugs]
    stepped.bugs.clear()


def _fail(*_: object, **__: object) -> None:
    raise ZeroDivisionError


def _serve(stepped: Stepped, toolstack: Store, guest: Store) -> Vbd:
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    offer_ring(guest)
    stepped.until(lambda: toolstack.read(f"{PATH.backend}/state") == "4")
    guest.write(f"{PATH.frontend}/state", "4")
    stepped.until(lambda: stepped.vbd().device.sight.theirs == 4)
    return stepped.vbd()


def _kill(vbd: Vbd) -> int:
    assert vbd.worker is not None
    pid = vbd.worker.pid
    vbd.worker.kill("the test wants it")
    return pid


IDENTITY = "file device=1 inode=2"


def keep_file(vbd: Vbd, identity: str = IDENTITY) -> str:
    """Let an opener report a file, and return why it is refused."""
    return vbd.handover.files.take("/img", identity, os.open("/dev/null", os.O_PATH))


def test_a_chain_that_could_not_be_opened_leaves_no_file_behind(stepped: Stepped, toolstack: Store) -> None:
    """If a chain could not be opened, none of its files are kept: another file may be the remedy."""
    write_like_libxl(toolstack, params="null:2G")
    vbd = stepped.vbd()
    stepped.until(lambda: vbd.worker is not None)
    keep_file(vbd)
    assert {"/img": IDENTITY} == vbd.handover.files.identities()
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "error" and vbd.worker is None)

    assert {} == vbd.handover.files.identities()


def look_fails(patch: pytest.MonkeyPatch) -> None:
    """Let every look at a vbd fail, as if xenstore were slow."""

    def fail(*_: object) -> None:
        raise StoreError("xenstore has not answered", errno.EAGAIN)

    patch.setattr(VbdNodes, "keys", fail)


def serve_file(stepped: Stepped, toolstack: Store, guest: Store) -> None:
    """Serve a guest from a file."""
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    keep_file(stepped.vbd())
    offer_ring(guest)
    stepped.until(lambda: toolstack.read(f"{PATH.backend}/state") == "4")
    toolstack.write(f"{PATH.frontend}/state", "4")


def test_a_worker_that_dies_before_the_first_look_loses_no_file(
    xenstored: Xenstored, kept: Kept, toolstack: Store, guest: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an inherited worker dies before the service has seen whether a guest needs the disk, its files stay kept and
    noted, and its successor is served from them.
    """
    first = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    serve_file(first, toolstack, guest)
    first.until(lambda: first.vbd().device.phase is Phase.SERVING)
    first.leave()
    with monkeypatch.context() as patch:
        look_fails(patch)
        second = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
        vbd = second.vbd()
        assert vbd.worker is not None
        vbd.worker.kill("the test wants it")
        second.until(lambda: vbd.worker is None)
        found = [file.name for file, _ in vbd.handover.files.kept()]
        assert not vbd.device.sight.has_looked
    second.until(lambda: vbd.device.phase is Phase.SERVING)

    assert ["/img"] == found == [file.name for file, _ in vbd.handover.files.kept()]
    assert f"{IDENTITY}|/img" == toolstack.read(f"/local/domain/0/xenbackend-files/{PATH}/1")
    second.close()


def test_what_was_refused_before_the_disk_is_served_is_not_given_up_later(
    stepped: Stepped, toolstack: Store, guest: Store
) -> None:
    """Once the disk is served from its former file again, a later `resume` does not give that file up for another one
    that was refused before.
    """
    serve_file(stepped, toolstack, guest)
    vbd = stepped.vbd()
    stepped.until(lambda: vbd.device.phase is Phase.SERVING)
    assert "is another file" in keep_file(vbd, "file device=1 inode=3")
    former = vbd.worker
    assert former is not None
    former.kill("the test wants it")
    stepped.until(lambda: vbd.device.phase is Phase.SERVING and vbd.worker not in (None, former))
    vbd.handover.files.accept_others()

    assert ["/img"] == [file.name for file, _ in vbd.handover.files.kept()]
    assert {"/img": IDENTITY} == vbd.handover.files.identities()


def test_a_service_that_never_looked_leaves_the_notes_about_the_files(
    xenstored: Xenstored, toolstack: Store, guest: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that ends before its first look at a disk leaves in xenstore what an earlier one noted of its files."""
    first = Stepped(xenstored.address, Settings())
    serve_file(first, toolstack, guest)
    first.close()
    with monkeypatch.context() as patch:
        look_fails(patch)
        second = Stepped(xenstored.address, Settings())
        vbd = second.vbd()
        second.close()
        assert not vbd.device.sight.has_looked
    third = Stepped(xenstored.address, Settings())
    third.until(lambda: third.vbd().worker is not None)

    assert {"/img": IDENTITY} == third.vbd().handover.files.identities()
    third.close()


def test_the_next_service_knows_the_files_of_a_disk_that_goes_on(
    xenstored: Xenstored, toolstack: Store, guest: Store
) -> None:
    """A service that stops leaves in xenstore which files a guest's disk was served from. The next one refuses another
    file until `resume`. Nothing is left of a disk that is gone.
    """
    first = Stepped(xenstored.address, Settings())
    serve_file(first, toolstack, guest)
    first.close()
    assert [] == toolstack.directory("/local/domain/0/xenbackend")
    second = Stepped(xenstored.address, Settings())
    second.until(lambda: second.vbd().worker is not None)

    assert {"/img": IDENTITY} == second.vbd().handover.files.identities()
    assert "is another file, inode 3, not 2" in keep_file(second.vbd(), "file device=1 inode=3")
    toolstack.remove(PATH.frontend)
    toolstack.remove(PATH.backend)
    second.until(lambda: not second.registry.vbds)
    second.close()
    assert "xenbackend-files" not in toolstack.directory("/local/domain/0")
