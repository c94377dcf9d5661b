"""One vbd in service when xenstore or a guest gets in its way; its usual life is in `test_registry.py`."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from tests.descriptors import open_descriptors
from tests.supervisor.helpers import (
    FAKE_WORKER,
    NEVER_READY,
    PATH,
    Kept,
    Stepped,
    offer_ring,
    remove_like_libxl,
    write_like_libxl,
)
from xenbackend import journal
from xenbackend.blkif.features import Limits, publish_at_probe
from xenbackend.blkif.handshake import XenbusState
from xenbackend.errors import KernelError
from xenbackend.kernel import memfd
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service.brake import BURST
from xenbackend.supervisor.service.fleet import Fleet, Worker
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.service.status import describe_briefly
from xenbackend.supervisor.vbd import vbd as vbd_module
from xenbackend.supervisor.vbd.device import Phase
from xenbackend.supervisor.vbd.ending import Ending
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.vbd import Vbd, events
from xenbackend.supervisor.vbd.vbd_log import PER_HOUR
from xenbackend.supervisor.vbd.vbd_nodes import VbdNodes
from xenbackend.supervisor.xenstore.store import Store

pytestmark = pytest.mark.slow  # every one starts processes


def test_write_for_a_state_that_has_passed_is_dropped(stepped: Stepped, toolstack: Store) -> None:
    """A write is made only where the state is still the one it was decided on, and another look follows."""
    write_like_libxl(toolstack)
    vbd = stepped.vbd()
    stepped.until(lambda: toolstack.read(f"{PATH.backend}/state") == "2")
    vbd._must_look.clear()
    vbd._write(events.Write({"state": "4", "sectors": "8"}, XenbusState.CLOSING))

    assert "node" in vbd._must_look
    assert "2" == toolstack.read(f"{PATH.backend}/state")


def test_write_into_a_node_that_is_gone_does_not_make_it_again(stepped: Stepped, toolstack: Store) -> None:
    """A directory that the toolstack has removed stays removed, whatever we had still to say."""
    write_like_libxl(toolstack)
    vbd = stepped.vbd()
    toolstack.remove(PATH.backend)
    vbd._write(events.Write({"state": "2"}, XenbusState.INITIALISING))

    assert toolstack.read_optional(PATH.backend) is None


def test_what_xenstore_has_taken_is_known_without_another_look(stepped: Stepped, toolstack: Store) -> None:
    """A node that is made anew before we have seen our keys in the former one would be taken for that one."""
    write_like_libxl(toolstack)
    vbd = Vbd(PATH, stepped.context)
    mark = vbd.device.sight.mark
    vbd.stop(leaves=False)
    stepped.until(lambda: vbd.is_forgotten)

    assert mark in publish_at_probe(Limits())


def test_lines_that_a_guest_provokes_are_bounded(stepped: Stepped, toolstack: Store, lines: io.StringIO) -> None:
    """R13: a frontend that toggles its state for ever fills no log."""
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
    """R11, R13: what it writes without end is not looked at each time, and what it wrote last is seen a moment later.
    One line says of which disk it is, and nothing of what the guest wrote.
    """
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    looks = []
    look = stepped.vbd()._nodes.theirs
    stepped.vbd()._nodes.theirs = lambda keys: looks.append(1) or look(keys)  # type: ignore[method-assign, func-returns-value]
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
    """The limits of the settings, and a disk that cannot discard, reach the worker that has to enforce them."""
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
    """Only their firmware boots from a disk before their own driver does; and only until that has connected."""
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
    """The journal tells a successor what was in flight in the rings that were agreed; it says nothing of other ones."""
    vbd = _serve(stepped, toolstack, guest)
    if not is_the_same:
        guest.write(f"{PATH.frontend}/ring-ref", "9")
    _kill(vbd)
    stepped.until(lambda: lines.getvalue().count("opening") == 2 and vbd.device.phase is Phase.SERVING)

    assert (1, is_the_same) == (
        lines.getvalue().count("connecting") - (not is_the_same),
        "rejoining" in lines.getvalue(),
    )


def test_a_successor_comes_before_others_until_it_serves(
    stepped: Stepped, toolstack: Store, guest: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest waits for it, which on a busy host could be long; for a first worker nobody does."""
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
    """What it writes later takes back nothing of what it had agreed to."""
    vbd = _serve(stepped, toolstack, guest)
    guest.write(f"{PATH.frontend}/ring-ref", "nonsense")
    _kill(vbd)
    stepped.until(lambda: "rejoining" in lines.getvalue() and vbd.device.phase is Phase.SERVING)

    assert "4" == toolstack.read(f"{PATH.backend}/state")


def test_a_frontend_that_is_connected_may_have_more_queues_than_are_offered_today(
    xenstored: Xenstored, toolstack: Store, guest: Store
) -> None:
    """It goes by what an earlier service offered."""
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
    """A guest that had nothing to do for a while does not use up the lives of its disk."""
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
    """It writes into the journal whatever it likes, and is not started again for ever; one that dies may be right."""
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
    """Where no worker can be started the disk rests, says why, and goes on resting: no step waits for an answer that
    nobody gives.
    """
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
    """On a slow host the line may be long. A disk that waits in it has no limit and no worker that is kept or shown;
    all of that begins when its process is there.
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


def test_a_disk_that_waits_for_its_turn_is_detached_at_once(xenstored: Xenstored, toolstack: Store) -> None:
    """Its worker is never started."""
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
    """A service that cannot take a disk over now tries again: the same worker serves on, by the same journal."""

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
    """No step waits for an answer of a worker that was never started, or never told what to open."""
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
    """The keys that could not be written follow with the next look; meanwhile the worker is started all the same."""
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
    """Whatever is not let go of, the registry hears that it is over, and another one may come."""
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
    """Neither of a new disk nor of one that an earlier service has left: its worker ends, and the disk begins anew."""
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

    left = len([name for name in kept.fds if name.startswith("vbd")])  # here, and once more with the keeper
    following = Stepped(xenstored.address, Settings(), keeper=kept.keeper(), starts=False)
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, _fail)
        following.store.fileno()  # opens one, the first time
        before = len(open_descriptors()) - 2 * left
        following.registry.start()
        following.until(lambda: following.registry.has_taken_over)
        assert ([], before) == ([name for name in kept.fds if name.startswith("vbd")], len(open_descriptors()))
    vbd = following.vbd()
    following.until(lambda: vbd.device.phase is Phase.OPEN)
    assert {ZeroDivisionError} == {type(bug) for bug in following.bugs}
    following.bugs.clear()
    following.close()


def test_a_fault_over_the_beginning_leaves_nothing_open(
    stepped: Stepped, toolstack: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is tried again: no descriptor, no timer, no process."""
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
    """Let an opener tell of a file, and return why it is refused."""
    return vbd.handover.files.take("/img", identity, os.open("/dev/null", os.O_PATH))


def test_a_chain_that_could_not_be_opened_leaves_no_file_behind(stepped: Stepped, toolstack: Store) -> None:
    """Where the toolstack was told that there is no disk, another file may put that right."""
    write_like_libxl(toolstack, params="null:2G")
    vbd = stepped.vbd()
    stepped.until(lambda: vbd.worker is not None)
    keep_file(vbd)
    assert {"/img": IDENTITY} == vbd.handover.files.identities()
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "error" and vbd.worker is None)

    assert {} == vbd.handover.files.identities()


def test_the_next_service_knows_the_files_of_a_disk_that_goes_on(
    xenstored: Xenstored, toolstack: Store, guest: Store
) -> None:
    """A service that is stopped leaves in xenstore what a guest's disk was served from; the next one refuses another
    file until `resume`, and nothing stays of a disk that has gone.
    """
    first = Stepped(xenstored.address, Settings())
    write_like_libxl(toolstack)
    first.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    keep_file(first.vbd())
    offer_ring(guest)
    first.until(lambda: toolstack.read(f"{PATH.backend}/state") == "4")
    toolstack.write(f"{PATH.frontend}/state", "4")
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
