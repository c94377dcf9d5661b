"""The registry against a simulated xenstored and worker processes without a chain."""

from __future__ import annotations

import io
import os
import select
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.descriptors import open_descriptors
from tests.supervisor.helpers import PATH, Kept, Stepped, offer_ring, remove_like_libxl, write_like_libxl
from xenbackend.errors import ConfigError
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.service.status import describe, rates
from xenbackend.supervisor.service.xentop import Xentop
from xenbackend.supervisor.vbd.backoff import REST_S
from xenbackend.supervisor.vbd.device import Phase
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.store import Store

pytestmark = pytest.mark.slow  # every one starts processes


def _has(store: Store, key: str, value: str) -> Callable[[], bool]:
    return lambda: store.read_optional(f"{PATH.backend}/{key}") == value


def _serve(stepped: Stepped, toolstack: Store, guest: Store, **changes: str) -> None:
    """Bring the vbd up to Connected."""
    write_like_libxl(toolstack, **changes)
    stepped.until(_has(toolstack, "hotplug-status", "connected"))
    offer_ring(guest)
    stepped.until(_has(toolstack, "state", "4"))


def test_birth_service_and_removal(stepped: Stepped, toolstack: Store, guest: Store) -> None:
    """A vbd made by libxl comes up, is served, and after libxl's request and the guest's Closed ends in Closed."""
    write_like_libxl(toolstack)
    stepped.until(_has(toolstack, "state", "2"))
    stepped.until(_has(toolstack, "hotplug-status", "connected"))
    offer_ring(guest)
    stepped.until(_has(toolstack, "state", "4"))
    worker = stepped.vbd().worker.pid
    keys = toolstack.dictionary(PATH.backend)
    shown = toolstack.dictionary("/local/domain/0/xenbackend/vbd/5/51712")
    guest.write(f"{PATH.frontend}/state", "4")
    remove_like_libxl(toolstack)
    stepped.until(lambda: stepped.vbd().device.ours == 5)
    guest.write(f"{PATH.frontend}/state", "6")
    stepped.until(_has(toolstack, "state", "6"))
    toolstack.remove(PATH.backend)
    stepped.until(lambda: not stepped.registry.vbds)

    assert ("2097152", "512", "1") == (keys["sectors"], keys["sector-size"], keys["feature-persistent"])
    assert ("null:1G", str(worker), "") == (shown["chain"], shown["worker"], shown["error"])
    assert [] == toolstack.directory("/local/domain/0/xenbackend/vbd")
    assert toolstack.read_optional(PATH.backend) is None


def test_the_end_of_a_domain_concerns_no_other(
    stepped: Stepped, toolstack: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A domain's directory that goes is a reason to look at that domain's vbds, and one that comes to serve them."""
    other = VbdPath("vbd", 0, 6, 51712)
    write_like_libxl(toolstack)
    write_like_libxl(toolstack, other)
    stepped.until(lambda: {PATH, other} <= set(stepped.registry.vbds))
    stepped.until(_has(toolstack, "hotplug-status", "connected"))
    stepped.until(lambda: toolstack.read_optional(f"{other.backend}/hotplug-status") == "connected")
    stepped.until(lambda: not any(vbd.node_changed for vbd in stepped.registry.vbds.values()))

    def never() -> None:
        pytest.fail("it looked at everybody's vbds")

    monkeypatch.setattr(stepped.registry, "_scan", never)
    toolstack.remove("/local/domain/0/backend/vbd/5")
    stepped.until(lambda: set(stepped.registry.vbds) == {other})
    write_like_libxl(toolstack)
    stepped.until(lambda: PATH in stepped.registry.vbds)


def test_a_domains_directory_stands_for_its_vbds_of_that_kind(
    stepped: Stepped, toolstack: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event for the directory alone makes us look at the domain's vbds, gone and new ones too, and at no others."""
    gone, new = VbdPath("vbd", 0, 5, 51728), VbdPath("vbd", 0, 5, 51744)
    served = [PATH, gone, VbdPath("vbd3", 0, 5, 51712), VbdPath("vbd", 0, 6, 51712)]
    for path in served:
        write_like_libxl(toolstack, path)
    stepped.until(lambda: set(served) == set(stepped.registry.vbds))
    stepped.until(lambda: not any(vbd.node_changed for vbd in stepped.registry.vbds.values()))
    monkeypatch.setattr(stepped.store, "events", lambda: [("/local/domain/0/backend/vbd/5", "vbds")])
    toolstack.remove(gone.backend)
    write_like_libxl(toolstack, new)
    stepped.registry._follow_store()
    changed = {path for path, vbd in stepped.registry.vbds.items() if vbd.node_changed}
    monkeypatch.undo()

    assert {PATH, gone, new} == changed
    assert not stepped.registry._changed_domains


def test_only_vbds_with_our_script_are_served(stepped: Stepped, toolstack: Store) -> None:
    """A vbd with another script belongs to somebody else: nothing is written into it."""
    other = VbdPath("vbd", 0, 5, 51728)
    write_like_libxl(toolstack, other, script="/etc/xen/scripts/block")
    write_like_libxl(toolstack)
    stepped.until(_has(toolstack, "state", "2"))

    assert [PATH] == list(stepped.registry.vbds)
    assert "1" == toolstack.read(f"{other.backend}/state")


def test_serve_all_takes_every_vbd_that_was_there_before(xenstored: Xenstored, toolstack: Store) -> None:
    """With serve = "all" a vbd needs no script, and one that is older than the service is found by the first scan."""
    write_like_libxl(toolstack, script="")
    stepped = Stepped(xenstored.address, Settings(serve="all"))
    try:
        stepped.until(_has(toolstack, "state", "2"))
    finally:
        stepped.close()


def test_failed_open_is_reported_everywhere(stepped: Stepped, toolstack: Store) -> None:
    """A chain that does not open leaves its sentence with hotplug-error, the error node and our own status."""
    write_like_libxl(toolstack, params="null:2G")
    stepped.until(_has(toolstack, "hotplug-status", "error"))
    stepped.until(lambda: stepped.vbd().worker is None)
    sentence = "null: it is broken"

    assert sentence == toolstack.read(f"{PATH.backend}/hotplug-error")
    assert f"22 {sentence}" == toolstack.read("/local/domain/0/error/backend/vbd/5/51712/error")
    assert sentence == toolstack.read("/local/domain/0/xenbackend/vbd/5/51712/error")
    assert "2" == toolstack.read(f"{PATH.backend}/state")


def test_workers_that_always_die_are_reported_and_the_vbd_closed(
    stepped: Stepped, toolstack: Store, guest: Store
) -> None:
    """Rings that no worker survives take their vbd to Closed before they were ever served, with the exit status in the
    sentence; re-attaching starts another worker.
    """
    write_like_libxl(toolstack, params="null:3G")
    stepped.until(_has(toolstack, "hotplug-status", "connected"))
    offer_ring(guest)
    for _ in REST_S[1:]:
        stepped.until(lambda: stepped.vbd().device.phase is Phase.RESTING)
        stepped.expire()
    stepped.until(_has(toolstack, "state", "6"))
    assert "the worker ended unexpectedly with exit status 3" == stepped.vbd().device.error
    toolstack.remove(PATH.backend)
    stepped.until(lambda: not stepped.registry.vbds)
    write_like_libxl(toolstack)
    stepped.until(_has(toolstack, "hotplug-status", "connected"))


def test_vanished_node_is_never_brought_back(stepped: Stepped, toolstack: Store, guest: Store) -> None:
    """When the backend directory is deleted under a connected vbd, its worker ends and the directory stays away."""
    _serve(stepped, toolstack, guest)
    toolstack.remove(PATH.backend)
    toolstack.remove(PATH.frontend)
    stepped.until(lambda: not stepped.registry.vbds)

    assert [] == toolstack.directory(PATH.backend)


def test_write_that_comes_too_late_does_not_undo_the_toolstack(stepped: Stepped, toolstack: Store) -> None:
    """A state that the toolstack has changed since our last look is not overwritten: its 5 is seen and obeyed."""
    write_like_libxl(toolstack)
    # Without waiting in a pass: on a busy host the worker might have opened its chain at the end of it.
    stepped.until(lambda: PATH in stepped.registry.vbds, timeout_s=0)
    vbd = stepped.vbd()
    stepped.until(lambda: vbd.device.phase is Phase.OPENING, timeout_s=0)
    remove_like_libxl(toolstack)
    stepped.until(_has(toolstack, "state", "6"))

    assert vbd.worker is None


def test_worker_that_never_disconnects_is_killed(stepped: Stepped, toolstack: Store, guest: Store) -> None:
    """R23: when the limit for letting go is over the worker is killed and the vbd is Closed."""
    _serve(stepped, toolstack, guest, params="null:4G")
    guest.write(f"{PATH.frontend}/state", "6")
    stepped.until(lambda: stepped.vbd().device.phase is Phase.DISCONNECTING)
    stepped.expire()
    stepped.until(_has(toolstack, "state", "6"))

    assert "the worker was killed: it was disconnecting for too long" == stepped.vbd().device.error


def test_lost_store_leaves_the_worker_alone_and_all_is_made_true_again(
    stepped: Stepped, xenstored: Xenstored, toolstack: Store, guest: Store
) -> None:
    """While xenstore is away disks are served on; what a frontend did meanwhile is seen when it is back."""
    _serve(stepped, toolstack, guest)
    worker = stepped.vbd().worker
    xenstored.stop()
    stepped.until(lambda: not stepped.store.is_connected)
    assert (Phase.SERVING, worker) == (stepped.vbd().device.phase, stepped.vbd().worker)
    xenstored.start()
    toolstack.reconnect()
    toolstack.remove("/local/domain/0/xenbackend")
    toolstack.write(f"{PATH.frontend}/state", "5")
    stepped.until(_has(toolstack, "state", "5"))

    assert "null:1G" == toolstack.read("/local/domain/0/xenbackend/vbd/5/51712/chain")
    assert worker is stepped.vbd().worker


def test_log_says_why_the_store_was_lost(
    stepped: Stepped, xenstored: Xenstored, toolstack: Store, guest: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason for a lost connection is logged also when a vbd was the first to find out."""
    _serve(stepped, toolstack, guest)
    xenstored.stop()
    stepped.vbd().doubt()
    stepped.vbd().turn()
    assert not stepped.store.is_connected
    capsys.readouterr()
    stepped.registry.turn()

    assert "connection lost: " in capsys.readouterr().out


def test_flood_of_events_costs_one_look(stepped: Stepped, toolstack: Store, guest: Store) -> None:
    """R12: a frontend that writes its state a thousand times leaves one flag, not a queue."""
    write_like_libxl(toolstack)
    stepped.until(_has(toolstack, "hotplug-status", "connected"))
    for number in range(1000):
        guest.write(f"{PATH.frontend}/state", str(number % 9))
    guest.write(f"{PATH.frontend}/state", "1")
    looks = 0
    while stepped.registry.turn():
        looks += 1

    assert looks < 10
    assert 1 == stepped.vbd().device.theirs


def test_stop_leaves_states_and_the_next_service_goes_on(
    stepped: Stepped, xenstored: Xenstored, toolstack: Store, guest: Store
) -> None:
    """A stopped service ends its workers and writes no state; the next one serves the same frontend again."""
    _serve(stepped, toolstack, guest)
    guest.write(f"{PATH.frontend}/state", "4")
    stepped.registry.stop()
    stepped.until(lambda: not stepped.registry.vbds)
    assert "4" == toolstack.read(f"{PATH.backend}/state")
    successor = Stepped(xenstored.address, Settings())
    try:
        successor.until(lambda: successor.vbd().device.phase is Phase.SERVING)
        assert "4" == toolstack.read(f"{PATH.backend}/state")
    finally:
        successor.close()


def test_status_and_commands(stepped: Stepped, toolstack: Store) -> None:
    """A vbd is described with its counters, read without the worker's help, and a layer's answer comes back."""
    write_like_libxl(toolstack)
    stepped.until(_has(toolstack, "hotplug-status", "connected"))
    vbd = stepped.registry.find("5/xvda")
    answers: list[dict[str, Any]] = []
    vbd.command("log", "get", ["a"], answers.append)
    vbd.command("log", "nonsense", [], answers.append)
    stepped.until(lambda: len(answers) == 2)
    known = describe(vbd)
    later = {**known, "counters": {**known["counters"], "reads": 27}}

    assert [{"data": "log ['a']"}, {"error": "log []"}] == answers
    assert ("InitWait", "xvda", 7, "null:1G") == (
        known["state"],
        known["device"],
        known["counters"]["reads"],
        known["layers"][0]["text"],
    )
    assert 10.0 == rates(known, later, 2.0)["reads"]
    with pytest.raises(ConfigError, match="vbd/5/51712"):
        stepped.registry.find("6/xvda")


def test_counters_outlive_a_worker(stepped: Stepped, toolstack: Store, guest: Store) -> None:
    """The next worker of a vbd goes on with the journal, and so with the counters, of the one that died."""
    _serve(stepped, toolstack, guest)
    vbd = stepped.vbd()
    first = vbd.worker.pid
    vbd.worker.kill("the test wants it")
    stepped.until(lambda: vbd.worker is not None and vbd.worker.pid != first)
    stepped.until(lambda: vbd.device.phase is Phase.SERVING)

    assert 14 == describe(vbd)["counters"]["reads"]
    assert "4" == toolstack.read(f"{PATH.backend}/state")


def test_a_service_takes_over_from_another_one(
    xenstored: Xenstored, toolstack: Store, guest: Store, kept: Kept, lines: io.StringIO
) -> None:
    """A service that leaves lets its worker go on; the next one has it from the keeper, with journal and counters, and
    the guest sees nothing. However often that happens, no descriptor is left over.
    """
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    _serve(stepped, toolstack, guest)
    guest.write(f"{PATH.frontend}/state", "4")
    before = toolstack.dictionary(PATH.backend)
    worker = stepped.vbd().worker.pid
    counts = []
    for _ in range(3):
        stepped.leave()
        stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
        stepped.until(lambda: stepped.vbd().device.phase is Phase.SERVING)  # noqa: B023 - at once
        counts.append((len(open_descriptors()), sorted(kept.fds)))
        assert worker == stepped.vbd().worker.pid
    known = describe(stepped.vbd())
    answer = stepped.ask(stepped.vbd().command, "log", "get", [])
    with closing(stepped):
        assert before == toolstack.dictionary(PATH.backend)

    assert 1 == len({str(each) for each in counts})
    assert [f"vbd-0-5-51712.{what}" for what in ("journal", "pidfd", "worker")] == counts[0][1]
    assert (7, "null:1G", {"data": "log []"}) == (known["counters"]["reads"], known["layers"][0]["text"], answer)
    assert {} == kept.fds
    assert "rejoining" not in lines.getvalue()


def test_a_vbd_that_went_while_there_was_no_service_is_closed_and_forgotten(
    xenstored: Xenstored, toolstack: Store, guest: Store, kept: Kept
) -> None:
    """An inherited worker whose node is gone is closed in order, and nothing of it stays with the keeper."""
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    _serve(stepped, toolstack, guest)
    stepped.leave()
    end = os.dup(kept.fds["vbd-0-5-51712.pidfd"])
    toolstack.remove(PATH.backend)
    toolstack.remove(PATH.frontend)
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    with closing(stepped):
        assert [PATH] == list(stepped.registry.vbds)
        stepped.until(lambda: not stepped.registry.vbds)
    ended = select.select([end], [], [], 0)[0]
    os.close(end)

    assert ended
    assert {} == kept.fds
    assert toolstack.read_optional(PATH.backend) is None


def test_a_disk_of_a_kind_that_is_served_no_more_is_served_to_its_end(
    xenstored: Xenstored, toolstack: Store, guest: Store, kept: Kept
) -> None:
    """Settings that leave a kind out do so for new disks: one in service goes on, and is let go of when it goes."""
    path = VbdPath("vbd3", 0, 5, 51712)
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    write_like_libxl(toolstack, path, params="aio:null:1G")
    stepped.until(lambda: toolstack.read_optional(f"{path.backend}/hotplug-status") == "connected")
    stepped.leave()
    stepped = Stepped(xenstored.address, Settings(kinds=["vbd"]), keeper=kept.keeper())
    with closing(stepped):
        stepped.until(lambda: stepped.registry.vbds[path].device.phase is Phase.OPEN)
        toolstack.remove(path.backend)
        stepped.until(lambda: not stepped.registry.vbds)
        write_like_libxl(toolstack, path, params="aio:null:1G")
        stepped.turn(0)
        stepped.turn(0)

        assert {} == stepped.registry.vbds
    assert {} == kept.fds


def test_what_was_kept_and_is_nobodys_is_let_go(xenstored: Xenstored, kept: Kept) -> None:
    """Names that no service of this domain gives are closed and forgotten; nothing is started for them."""
    keeper = kept.keeper()
    for name in ("stored", "vbd-1-5-51712.journal", "vbd-0-5.journal"):
        keeper.keep(name, 0)
    assert 3 == len(kept.fds)
    keeper = kept.keeper()
    inherited = list(keeper.inherited.values())
    with closing(Stepped(xenstored.address, Settings(), keeper=keeper)) as stepped:
        assert {} == stepped.registry.vbds
        assert 3 == len(inherited)
        for fd in inherited:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
    assert {} == kept.fds


def test_who_waits_hears_that_the_service_is_replaced(
    xenstored: Xenstored, toolstack: Store, guest: Store, kept: Kept
) -> None:
    """An order or a command that a worker has not answered yet is not left without an answer."""
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    _serve(stepped, toolstack, guest, params="null:4G")
    answers: list[dict[str, Any]] = []
    stepped.vbd().orders.pause(answers.append)
    stepped.vbd().command("log", "get", [], answers.append)
    stepped.leave()

    assert [{"error": "vbd/5/51712: the service is being replaced; ask again"}] * 2 == answers
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    stepped.close()  # kills the worker, which does not report


def test_frontend_outside_its_domain_is_not_even_watched(stepped: Stepped, toolstack: Store) -> None:
    """R15: a frontend path that lies in another domain is refused, and nothing there is read or watched."""
    write_like_libxl(toolstack, frontend="/local/domain/6/device/vbd/51712")
    stepped.until(_has(toolstack, "hotplug-status", "error"))

    assert "domain 5's path" in toolstack.read(f"{PATH.backend}/hotplug-error")
    assert stepped.vbd().worker is None


def test_node_that_is_made_again_while_the_old_one_closes(stepped: Stepped, toolstack: Store, guest: Store) -> None:
    """A vbd that is attached again before the old worker has ended is found, though its event came for the old one."""
    _serve(stepped, toolstack, guest)
    vbd = stepped.vbd()
    toolstack.remove(PATH.backend)
    while vbd.device.phase is not Phase.CLOSING:  # the worker's end is not heard of yet, however fast it comes
        stepped.registry.turn()
    write_like_libxl(toolstack)
    vbd._context.store.events()  # the loop took the events, and the worker's end comes before the look
    while not vbd.is_forgotten:
        for key, _ in stepped.selector.select(1):
            key.data()
    stepped.until(_has(toolstack, "hotplug-status", "connected"))

    assert vbd is not stepped.vbd()


def test_xentop_is_shown_the_counters(xenstored: Xenstored, toolstack: Store, tmp_path: Path) -> None:
    """A vbd of kind vbd3 has its record for as long as it is served; in the end nothing is left of them."""
    path = VbdPath("vbd3", 0, 5, 51712)
    (tmp_path / "shm").mkdir()
    stepped = Stepped(xenstored.address, Settings(), xentop=Xentop(tmp_path / "xentop", tmp_path / "shm"))
    write_like_libxl(toolstack, path, params="aio:null:1G")
    record = tmp_path / "shm" / f"td3-{os.getpid()}" / "vbd-5-51712"
    stepped.until(record.exists)
    size, pid = record.stat().st_size, toolstack.read(f"{path.backend}/kthread-pid")
    toolstack.remove(path.backend)
    stepped.until(lambda: not record.exists())
    stepped.close()
    stepped.registry.tidy()

    assert (96, str(os.getpid())) == (size, pid)
    assert [] == list((tmp_path / "shm").iterdir())
