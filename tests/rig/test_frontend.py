"""The rig's blkfront against a small backend on the rig's ports."""

from __future__ import annotations

import errno
import select
import threading
from random import Random

import pytest

from xenbackend.blkif.abi import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_INDIRECT,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_ERROR,
    NATIVE,
    X86_32,
)
from xenbackend.errors import StoreError
from xenbackend.rig.frontend import CLOSED, CONNECTED, DiskError, Wishes
from xenbackend.rig.guest_ring import random_spans, whole_spans
from xenbackend.rig.pattern import DiskModel
from xenbackend.units import SECTOR

WRAP = 2**32 - 5


def run_model(bench, wishes: Wishes, steps: int, *, max_count: int) -> None:
    """Drive random verified requests, with as many in flight as the rings hold."""
    frontend = bench.frontend(wishes)
    frontend.connect()
    random = Random(7)
    operations = (BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_WRITE, BLKIF_OP_DISCARD, BLKIF_OP_FLUSH_DISKCACHE)
    model = DiskModel(9, frontend.facts.sectors, random, operations, max_count=max_count)
    in_flight = {}
    for _ in range(steps):
        while frontend.free() and (step := model.next_step()) is not None:
            spans = random_spans(random, step.count) if step.operation in (BLKIF_OP_READ, BLKIF_OP_WRITE) else []
            if len(spans) > max(11, wishes.indirect):
                spans = whole_spans(step.count)
            request = frontend.submit(step.operation, step.sector, step.count, step.data, spans=spans, push=False)
            in_flight[request] = step
        for request in frontend.wait(list(in_flight)[:1]):
            model.finish(in_flight.pop(request), request.status, request.data)
    frontend.drain()
    assert 0 == model.failures

    frontend.close()


@pytest.mark.parametrize("layout", [NATIVE, X86_32], ids=lambda layout: layout.protocol)
@pytest.mark.parametrize("persistent", [False, True], ids=["granted anew", "persistent"])
def test_random_requests(bench, layout, *, persistent: bool) -> None:
    """Any mix of requests in flight reads back what was written, in both layouts and across the wrap of the indices."""
    run_model(bench, Wishes(layout=layout, persistent=persistent, start_index=WRAP), 20, max_count=60)


def test_everything_at_once(bench) -> None:
    """Several queues of several pages with indirect requests work together."""
    run_model(bench, Wishes(queues=3, ring_order=1, indirect=64, persistent=True), 10, max_count=300)

    assert BLKIF_OP_INDIRECT in bench.backend.operations


@pytest.mark.parametrize("order", range(5))
def test_ring_keys(bench, order: int) -> None:
    """A ring of one page is announced by `ring-ref`, a larger one by its order and one numbered key per page."""
    bench.frontend(Wishes(ring_order=order)).connect()
    keys = {key.removeprefix(f"{bench.front}/") for key in bench.store.nodes if key.startswith(f"{bench.front}/ring")}

    expected = {"ring-page-order", *(f"ring-ref{page}" for page in range(1 << order))} if order else {"ring-ref"}
    assert expected == keys


def test_queue_keys(bench) -> None:
    """Several queues are announced by their number and one directory each, and nothing lies outside of them."""
    bench.frontend(Wishes(queues=2)).connect()
    keys = {key.removeprefix(f"{bench.front}/") for key in bench.store.nodes if key.startswith(bench.front)}

    assert {
        "backend", "state", "protocol", "feature-persistent", "multi-queue-num-queues",
        "queue-0/ring-ref", "queue-0/event-channel", "queue-1/ring-ref", "queue-1/event-channel",
    } == keys  # fmt: skip


def test_keys_of_a_former_life_stay(bench) -> None:
    """A frontend that begins anew writes its own keys and removes none, as Linux' blkfront does.

    So the keys of a former kernel with more queues and larger rings stay beside them.
    """
    bench.frontend(Wishes(queues=2, ring_order=1)).announce()
    former = {key: value for key, value in bench.store.nodes.items() if key.startswith(bench.front)}
    bench.frontend().announce()
    keys = {key: value for key, value in bench.store.nodes.items() if key.startswith(bench.front)}

    assert {f"{bench.front}/{key}" for key in ("ring-ref", "event-channel")} == keys.keys() - former.keys()
    assert former.items() <= keys.items()
    assert ("2", "1") == tuple(keys[f"{bench.front}/{key}"] for key in ("multi-queue-num-queues", "ring-page-order"))


def test_offers_bound_wishes(bench) -> None:
    """A frontend uses nothing that the backend did not offer."""
    for key in list(bench.store.nodes):
        if key.startswith((f"{bench.back}/feature", f"{bench.back}/max", f"{bench.back}/multi")):
            del bench.store.nodes[key]
    frontend = bench.frontend(Wishes(ring_order=4, queues=8, persistent=True, indirect=256))
    frontend.connect()

    assert 1 == len(frontend.rings)
    assert 32 == frontend.rings[0].ring.size
    facts = frontend.facts
    assert (False, False, False, False, 0) == (
        facts.can_flush, facts.can_barrier, facts.can_discard, facts.persistent, facts.max_indirect
    )  # fmt: skip


def test_flush_wins_over_barrier(bench) -> None:
    """If both are offered a flush is used; without flush, an empty barrier."""
    frontend = bench.frontend()
    frontend.connect()
    frontend.flush()
    frontend.close()
    bench.backend.set_state(2)
    frontend = bench.frontend(Wishes(flush=False))
    frontend.connect()
    frontend.flush()

    assert [BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE_BARRIER] == bench.backend.operations


def test_synchronous_helpers(bench) -> None:
    """Write, read and discard act on the sectors that they name."""
    frontend = bench.frontend()
    frontend.connect()
    frontend.write(8, b"x" * 8 * SECTOR)
    frontend.discard(9, 1)

    assert b"x" * SECTOR + bytes(SECTOR) + b"x" * SECTOR == frontend.read(8, 3)


def test_error_is_raised(bench) -> None:
    """A request beyond the end of the disk raises an error with the response's status."""
    frontend = bench.frontend()
    frontend.connect()
    with pytest.raises(DiskError) as caught:
        frontend.read(bench.backend.sectors, 1)

    assert BLKIF_RSP_ERROR == caught.value.status


def test_closing_leaves_nothing(bench) -> None:
    """After the close handshake nothing is mapped or bound, and all pages of the guest are free."""
    before = bench.guest.free_pages()
    frontend = bench.frontend(Wishes(ring_order=2, persistent=True))
    frontend.connect()
    frontend.write(0, b"y" * SECTOR)
    frontend.close()

    assert CLOSED == frontend.backend_state()
    assert {"mappings": 0, "pins": 0, "ports": 0} == bench.xen.held()
    assert before == bench.guest.free_pages()


@pytest.mark.parametrize("why", [errno.EACCES, errno.EIO])
def test_closing_while_the_directory_goes(bench, monkeypatch: pytest.MonkeyPatch, why: int) -> None:
    """If the backend's directory is removed once it is Closed, the guest counts the backend as closed.

    Xenstored shows the guest nothing there any more. Any other error of xenstore is raised.
    """
    frontend = bench.frontend()
    frontend.connect()
    read = bench.store.read_optional

    def refuse(path: str) -> str | None:
        if not bench.backend.rings and path.startswith(bench.back):
            raise StoreError(f"read {path}", why)
        return read(path)

    monkeypatch.setattr(bench.store, "read_optional", refuse)
    if why == errno.EACCES:
        frontend.close()
        assert {"mappings": 0, "pins": 0, "ports": 0} == bench.xen.held()
    else:
        with pytest.raises(StoreError, match="read"):
            frontend.close()


def test_crash_and_return(bench) -> None:
    """After a crash the same domain may connect with new rings once the backend has released the old ones."""
    frontend = bench.frontend()
    frontend.connect()
    frontend.crash()
    bench.backend.disconnect()
    bench.backend.set_state(2)
    frontend = bench.frontend()
    frontend.connect()

    assert CONNECTED == frontend.backend_state()
    assert bytes(SECTOR) == frontend.read(0, 1)


def test_waiting_sleeps_until_notified(bench) -> None:
    """A frontend that waits for an answer sleeps, and the backend's notification wakes it."""
    frontend = bench.frontend()
    frontend.connect()
    frontend.read(0, 1)
    frontend._idle = frontend._sleep
    thread = threading.Thread(target=serve_once, args=(bench.backend,))
    thread.start()

    assert bytes(SECTOR) == frontend.read(0, 1)
    thread.join()


def serve_once(backend) -> None:
    """Sleep until the backend is notified, and let it do everything that is due."""
    select.select([backend.events], [], [], 5)
    backend.step()


def test_drain_finishes_everything(bench) -> None:
    """Draining pushes requests that were only submitted, and waits until all are answered."""
    frontend = bench.frontend()
    frontend.connect()
    requests = [frontend.submit(BLKIF_OP_READ, 0, 1, push=False) for _ in range(5)]
    frontend.drain()

    assert [0] * 5 == [request.status for request in requests]


def test_missing_answer_times_out(bench) -> None:
    """A request without an answer ends in a TimeoutError that says how many are missing."""
    frontend = bench.frontend()
    frontend.connect()
    request = frontend.submit(BLKIF_OP_READ, 0, 8)
    with pytest.raises(TimeoutError, match="1 requests"):
        frontend.wait([request], timeout_s=0)
