"""What the rig's blkfront does not accept from a backend, and how it lays out its data."""

from __future__ import annotations

from random import Random

import pytest

from xenbackend.blkif.abi import BLKIF_OP_INDIRECT, BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_RSP_ERROR, RSP_EVENT, RSP_PROD
from xenbackend.rig.frontend import Wishes
from xenbackend.rig.guest_ring import BackendMisbehaved, random_spans, whole_spans
from xenbackend.units import SECTOR


def swap_id(ring, place, guest_id, operation, status):
    """Answer with the id of another request."""
    ring.put_response(place, guest_id ^ 1, operation, status)


def far_id(ring, place, guest_id, operation, status):
    """Answer with an id that no ring has."""
    ring.put_response(place, 1 << 40, operation, status)


def wrong_operation(ring, place, guest_id, operation, status):
    """Answer with another operation."""
    ring.put_response(place, guest_id, BLKIF_OP_INDIRECT, status)


def dirty_padding(ring, place, guest_id, operation, status):
    """Leave something of ours in the response's padding."""
    ring.put_response(place, guest_id, operation, status)
    ring.pages[64 + place % ring.size * ring.layout.slot_size + 9] = 1


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (swap_id, "not in flight"),
        (far_id, "out of range"),
        (wrong_operation, "operation 6"),
        (dirty_padding, "padding"),
    ],
)
def test_misbehaviour_is_seen(bench, answer, sentence: str) -> None:
    """Everything for which Linux' blkfront gives up is reported."""
    frontend = bench.frontend()
    frontend.connect()
    bench.backend.answer = answer
    with pytest.raises(BackendMisbehaved, match=sentence):
        frontend.read(0, 1)


def test_too_many_responses_are_seen(bench) -> None:
    """More responses than requests in flight are reported as misbehaviour, not processed."""
    frontend = bench.frontend()
    frontend.connect()
    request = frontend.submit(BLKIF_OP_READ, 0, 1)
    frontend.rings[0].ring.index[RSP_PROD] = 41
    with pytest.raises(BackendMisbehaved, match="41 responses to 1 requests"):
        frontend.wait([request])


def test_kept_grant_is_seen(bench) -> None:
    """R8: without persistent grants it is a fault if a page is still mapped when its request is answered."""
    frontend = bench.frontend()
    frontend.connect()
    request = frontend.submit(BLKIF_OP_READ, 0, 8)
    mapping = bench.backend.grants.map([request.pages[0].gref], writable=True)
    with pytest.raises(BackendMisbehaved, match="still mapped"):
        frontend.wait([request])
    mapping.release()


def test_fault_injection(bench) -> None:
    """A grant with an injected fault fails its request, and not the next one."""
    frontend = bench.frontend()
    frontend.connect()
    request = frontend.submit(BLKIF_OP_READ, 0, 8)
    gref = request.pages[0].gref
    bench.guest.fail(gref, -12)
    frontend.wait([request])
    bench.guest.fail(gref, 0)

    assert BLKIF_RSP_ERROR == request.status
    assert bytes(SECTOR) == frontend.read(0, 1)


def test_full_ring_refuses(bench) -> None:
    """A full ring refuses another request before it is put."""
    frontend = bench.frontend()
    frontend.connect()
    for _ in range(frontend.free()):
        frontend.submit(BLKIF_OP_READ, 0, 1)
    with pytest.raises(BlockingIOError):
        frontend.submit(BLKIF_OP_READ, 0, 1)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 88])
def test_spans_cover(count: int) -> None:
    """Segments, in whole pages or at random, hold exactly the sectors asked for and stay inside their pages."""
    for spans in (whole_spans(count), random_spans(Random(count), count)):
        assert count == sum(last - first + 1 for first, last in spans)
        assert all(0 <= first <= last <= 7 for first, last in spans)


def test_long_requests_go_indirect(bench) -> None:
    """11 segments fit into a slot; from 12 on a request goes indirect, and one longer than agreed is refused."""
    frontend = bench.frontend(Wishes(indirect=16))
    frontend.connect()
    frontend.write(0, bytes(11 * 8 * SECTOR))
    frontend.write(0, bytes(12 * 8 * SECTOR))

    assert [BLKIF_OP_WRITE, BLKIF_OP_INDIRECT] == bench.backend.operations
    with pytest.raises(ValueError, match="17 segments"):
        frontend.write(0, bytes(17 * 8 * SECTOR))


def test_grants_are_no_wider_than_needed(bench) -> None:
    """A write's page is granted for reading only, and taken back with its response unless grants are persistent."""
    frontend = bench.frontend()
    frontend.connect()
    request = frontend.submit(BLKIF_OP_WRITE, 0, data=bytes(SECTOR))
    gref = request.pages[0].gref

    assert bench.guest.table.frame(gref, 0, writable=True) < 0 <= bench.guest.table.frame(gref, 0, writable=False)
    frontend.wait([request])
    assert bench.guest.table.frame(gref, 0, writable=False) < 0


def test_reaped_ring_asks_for_the_next_response(bench) -> None:
    """After taking the last response the frontend sets the event index so that the next one notifies it (R7)."""
    frontend = bench.frontend()
    frontend.connect()
    for _ in range(3):
        frontend.read(0, 1)
    ring = frontend.rings[0].ring

    assert ring.consumed + 1 == ring.index[RSP_EVENT]


def test_raw_slots_reach_the_backend(bench) -> None:
    """Any bytes can be put into a slot, to see how a backend takes them."""
    frontend = bench.frontend()
    frontend.connect()
    frontend.rings[0].put_raw(b"\xff" * 112)
    frontend.rings[0].push()
    bench.backend.step()
    with pytest.raises(BackendMisbehaved, match="out of range"):
        frontend.poll()
