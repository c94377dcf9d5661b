"""Real vbds in a registry, with a simulated xenstored and fake workers."""

from __future__ import annotations

import io
import os
import select
from collections.abc import Callable
from contextlib import closing, suppress

import pytest

from tests.descriptors import open_descriptors
from tests.supervisor.helpers import PATH, Kept, Stepped, offer_ring, remove_like_libxl, write_like_libxl
from xenbackend.errors import StoreError
from xenbackend.protocol.codes import Code
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.service.status import describe
from xenbackend.supervisor.vbd.backoff import REST_S
from xenbackend.supervisor.vbd.device import Phase
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
    """A vbd made by libxl is served, and is Closed after libxl has asked for its removal and the guest has closed."""
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
    stepped.until(lambda: stepped.vbd().device.sight.ours == 5)
    guest.write(f"{PATH.frontend}/state", "6")
    stepped.until(_has(toolstack, "state", "6"))
    toolstack.remove(PATH.backend)
    stepped.until(lambda: not stepped.registry.vbds)

    assert ("2097152", "512", "1") == (keys["sectors"], keys["sector-size"], keys["feature-persistent"])
    assert ("null:1G", str(worker), "") == (shown["chain"], shown["worker"], shown["error"])
    assert [] == toolstack.directory("/local/domain/0/xenbackend/vbd")
    assert toolstack.read_optional(PATH.backend) is None


def test_serve_all_takes_every_vbd_that_was_there_before(xenstored: Xenstored, toolstack: Store) -> None:
    """With serve = "all" a vbd needs no script, and one that is older than the service is found by the first scan."""
    write_like_libxl(toolstack, script="")
    stepped = Stepped(xenstored.address, Settings(serve="all"))
    try:
        stepped.until(_has(toolstack, "state", "2"))
    finally:
        stepped.close()


def test_failed_open_is_reported_everywhere(stepped: Stepped, toolstack: Store) -> None:
    """If a chain cannot be opened, the reason stands in hotplug-error, in the error node and in the service's own
    status.
    """
    write_like_libxl(toolstack, params="null:2G")
    stepped.until(_has(toolstack, "hotplug-status", "error"))
    stepped.until(lambda: stepped.vbd().worker is None)
    sentence = "null: it is broken"

    assert sentence == toolstack.read(f"{PATH.backend}/hotplug-error")
    assert f"22 {sentence}" == toolstack.read("/local/domain/0/error/backend/vbd/5/51712/error")
    assert sentence == toolstack.read("/local/domain/0/xenbackend/vbd/5/51712/error")
    assert "2" == toolstack.read(f"{PATH.backend}/state")


def test_no_guest_reads_what_names_our_files(stepped: Stepped, toolstack: Store, guest: Store) -> None:
    """A3: a guest cannot read what may name a file of the host, or tell whether it exists: error sentences, the status
    and error nodes, the socket of an export. That holds even if the guest may read the nodes around them.
    """
    for open_to_all in ("/local/domain/0", "/local/domain/0/error"):
        toolstack.mkdir(open_to_all)
        toolstack.set_permissions(open_to_all, ["n0", "r5"])
    write_like_libxl(toolstack, params="null:2G")
    toolstack.write(f"{PATH.backend}/hotplug-error", "of somebody else")
    stepped.until(_has(toolstack, "hotplug-status", "error"))
    stepped.until(lambda: stepped.vbd().worker is None)
    places = [
        f"{PATH.backend}/hotplug-error",
        f"/local/domain/0/error/backend/{PATH}/error",
        *(f"/local/domain/0/xenbackend/{PATH}/{key}" for key in ("error", "chain")),
    ]
    seen = []
    for place in places:
        assert "" != toolstack.read(place)
        with suppress(StoreError):
            seen.append((place, guest.read(place)))

    assert [] == seen
    assert "error" == guest.read(f"{PATH.backend}/hotplug-status")


def test_workers_that_always_die_are_reported_and_the_vbd_closed(
    stepped: Stepped, toolstack: Store, guest: Store
) -> None:
    """If every worker dies over the rings before they are first served, the vbd is Closed, and its error has the exit
    status. Attaching it again starts another worker.
    """
    write_like_libxl(toolstack, params="null:3G")
    stepped.until(_has(toolstack, "hotplug-status", "connected"))
    offer_ring(guest)
    for _ in REST_S[1:]:
        stepped.until(lambda: stepped.vbd().device.phase is Phase.RESTING)
        stepped.expire()
    stepped.until(_has(toolstack, "state", "6"))
    assert "the worker ended unexpectedly with exit status 3" in stepped.vbd().device.error
    toolstack.remove(PATH.backend)
    stepped.until(lambda: not stepped.registry.vbds)
    write_like_libxl(toolstack)
    stepped.until(_has(toolstack, "hotplug-status", "connected"))


def test_vanished_node_is_never_brought_back(stepped: Stepped, toolstack: Store, guest: Store) -> None:
    """If the backend directory of a connected vbd is deleted, its worker ends, and the directory is not made again."""
    _serve(stepped, toolstack, guest)
    toolstack.remove(PATH.backend)
    toolstack.remove(PATH.frontend)
    stepped.until(lambda: not stepped.registry.vbds)

    assert [] == toolstack.directory(PATH.backend)


@pytest.mark.rows("A2", "B6", "R23")
def test_worker_that_never_disconnects_is_killed(stepped: Stepped, toolstack: Store, guest: Store) -> None:
    """R23: a worker that does not leave the rings within the limit is killed, and the vbd is Closed."""
    _serve(stepped, toolstack, guest, params="null:4G")
    guest.write(f"{PATH.frontend}/state", "6")
    stepped.until(lambda: stepped.vbd().device.phase in (Phase.DISCONNECTING, Phase.CLOSING))
    stepped.expire()
    stepped.until(_has(toolstack, "state", "6"))

    assert stepped.vbd().worker is None


@pytest.mark.rows("C8")
def test_lost_store_leaves_the_worker_alone_and_all_is_made_true_again(
    stepped: Stepped, xenstored: Xenstored, toolstack: Store, guest: Store
) -> None:
    """Disks are served while xenstore is away. When it is back, changes by the frontend are seen, and our own nodes are
    written again.
    """
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


def test_stop_leaves_states_and_the_next_service_goes_on(
    stepped: Stepped, xenstored: Xenstored, toolstack: Store, guest: Store
) -> None:
    """A service that stops ends its workers and leaves all states as they are; the next service serves the same
    frontend.
    """
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
    """`status` has a vbd's counters, read without its worker; a layer's answer to a command is returned."""
    write_like_libxl(toolstack)
    stepped.until(_has(toolstack, "hotplug-status", "connected"))
    vbd = stepped.registry.find("5/xvda")
    answers = [stepped.give("command", layer="log", command=each, arguments=["a"]) for each in ("get", "nonsense")]
    known = describe(vbd, now=stepped.loop.now())

    assert [(Code.OK, "log ['a']"), Code.INVALID] == [(answers[0].code, answers[0].data), answers[1].code]
    assert ("InitWait", "xvda", 7, "null:1G") == (
        known["state"],
        known["device"],
        known["counters"]["reads"],
        known["layers"][0]["layer"],
    )


def test_counters_outlive_a_worker(stepped: Stepped, toolstack: Store, guest: Store) -> None:
    """The next worker continues the journal, and so the counters, of the worker that died."""
    _serve(stepped, toolstack, guest)
    vbd = stepped.vbd()
    first = vbd.worker.pid
    vbd.worker.kill("the test wants it")
    stepped.until(lambda: vbd.worker is not None and vbd.worker.pid != first)
    stepped.until(lambda: vbd.device.phase is Phase.SERVING)

    assert 14 == describe(vbd, now=stepped.loop.now())["counters"]["reads"]
    assert "4" == toolstack.read(f"{PATH.backend}/state")


def test_a_service_takes_over_from_another_one(
    xenstored: Xenstored, toolstack: Store, guest: Store, kept: Kept, lines: io.StringIO
) -> None:
    """A service that leaves lets its worker go on, and the next service gets it from the keeper, with journal and
    counters; the guest notices nothing. However often that happens, no descriptor is left over.
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
    known = describe(stepped.vbd(), now=stepped.loop.now())
    answer = stepped.give("command", layer="log", command="get")
    said = lines.getvalue()  # so far: a worker that the test kills at the end has a successor too
    with closing(stepped):
        assert before == toolstack.dictionary(PATH.backend)

    assert 1 == len({str(each) for each in counts})
    assert ["journal", "notes", "pidfd", "worker"] == [name.split(".")[1] for name in counts[0][1] if "vbd-" in name]
    assert (7, "null:1G", "log []") == (known["counters"]["reads"], known["layers"][0]["layer"], answer.data)
    assert not [name for name in kept.fds if "vbd-" in name]
    assert "rejoining" not in said


def test_a_vbd_that_went_while_there_was_no_service_is_closed_and_forgotten(
    xenstored: Xenstored, toolstack: Store, guest: Store, kept: Kept
) -> None:
    """If a vbd's node has gone while no service ran, its inherited worker is closed in order, and the keeper keeps
    nothing of the vbd.
    """
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    _serve(stepped, toolstack, guest)
    stepped.leave()
    [end] = [os.dup(fd) for name, fd in kept.fds.items() if name.startswith("vbd-0-5-51712.pidfd")]
    toolstack.remove(PATH.backend)
    toolstack.remove(PATH.frontend)
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    with closing(stepped):
        assert [PATH] == list(stepped.registry.vbds)
        stepped.until(lambda: not stepped.registry.vbds)
    ended = select.select([end], [], [], 0)[0]
    os.close(end)

    assert ended
    assert not [name for name in kept.fds if "vbd-" in name]
    assert toolstack.read_optional(PATH.backend) is None


@pytest.mark.rows("C4", "R15")
def test_frontend_outside_its_domain_is_not_even_watched(stepped: Stepped, toolstack: Store) -> None:
    """R15: a frontend path that lies in another domain is refused, and nothing there is read or watched."""
    write_like_libxl(toolstack, frontend="/local/domain/6/device/vbd/51712")
    stepped.until(_has(toolstack, "hotplug-status", "error"))

    assert "domain 5's path" in toolstack.read(f"{PATH.backend}/hotplug-error")
    assert stepped.vbd().worker is None
