"""Frontends that are hostile with their grants, their memory, their events and their life, against a real worker.

The rows and advisories are those of Xen's and Linux' block backends, as in `test_evil_frontend.py`.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests import figures
from tests.driven import Driven
from tests.evil import DATA, ERROR, GNTST, OK, RAM, SECTORS, Evil, descriptors, resident
from tests.workload import make_model, work
from xenbackend.blkif.abi import BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_WRITE_BARRIER, X86_64
from xenbackend.blkif.request import encode_direct, encode_indirect, encode_segments
from xenbackend.protocol import codec
from xenbackend.protocol.messages import Stage
from xenbackend.rig.frontend import Wishes
from xenbackend.units import PAGE, SECTOR
from xenbackend.worker.grants import ARENA_CHUNKS, CHUNK, MAX_PERSISTENT

pytestmark = pytest.mark.slow  # each starts a process


# Grants --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.rows("A7", "A18")
def test_bad_grants_leave_nothing_behind(victim: Driven, persistent: bool) -> None:
    """A7, A18 (XSA-71, XSA-365): a request with a bad k-th segment fails, alters nothing, and leaves nothing mapped."""
    victim.connect(RAM, Wishes(indirect=256, persistent=persistent))
    evil = Evil(victim)
    gref, page = evil.page()
    page[:] = b"w" * PAGE
    indirect, content = evil.page()
    mapped = victim.xen.held()["pins"]
    slots = []
    for _ in range(20):
        for bad in range(11):
            segments = [(9999 if place == bad else gref, 0, 7) for place in range(11)]
            slots += [encode_direct(X86_64, operation, 0, 0, segments) for operation in (*DATA, BLKIF_OP_WRITE_BARRIER)]
        slots += [encode_direct(X86_64, operation, 0, 0, [(9999, 0, 7)]) for operation in DATA]
    statuses = [status for _, _, status in evil.send(*slots)]
    for bad in (0, 16, 39):
        content[: 40 * 8] = encode_segments([(9999 if place == bad else gref, 0, 7) for place in range(40)])
        statuses += [evil.send(encode_indirect(X86_64, each, 0, 0, 40, [indirect]))[0][2] for each in DATA]

    assert {ERROR} == set(statuses)
    assert bytes(SECTORS * SECTOR) == b"".join(victim.frontend.read(at, 88) for at in range(0, 2024, 88)) + bytes(
        24 * SECTOR
    )
    assert victim.xen.held()["pins"] <= mapped + 2 + 11  # valid pages may stay mapped, once each
    assert [OK] * 32 == evil.statuses(
        *[encode_direct(X86_64, BLKIF_OP_READ, number, 0, [(gref, 0, 7)] * 11) for number in range(32)]
    )


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.rows("A17", "A19", "A20", "R8")
def test_every_status_of_a_grant_is_an_error(victim: Driven, persistent: bool) -> None:
    """A17, A19, A20 (XSA-361, 362, 367): every error status of a map or copy is an error of the request, and no bug."""
    victim.connect(RAM, Wishes(indirect=256, persistent=persistent))
    evil = Evil(victim)
    good, _ = evil.page()
    found = []
    for status in GNTST:
        data, _ = evil.page()
        indirect, content = evil.page()
        content[: 12 * 8] = encode_segments([(good, 0, 7)] * 12)
        for gref in (data, indirect):
            evil.guest.fail(gref, status)
        found += evil.statuses(
            encode_direct(X86_64, BLKIF_OP_READ, 0, 0, [(data, 0, 7)]),
            encode_direct(X86_64, BLKIF_OP_WRITE, 1, 0, [(good, 0, 7), (data, 0, 7)]),
            encode_indirect(X86_64, BLKIF_OP_READ, 2, 0, 12, [indirect]),
            encode_direct(X86_64, BLKIF_OP_READ, 3, 0, [(good, 0, 7)]),
        )

    assert [ERROR, ERROR, ERROR, OK] * len(GNTST) == found


@pytest.mark.rows("A17")
def test_ring_that_cannot_be_mapped_fails_the_connection(victim: Driven) -> None:
    """A17 (XSA-362): if a ring cannot be mapped, whatever the status, Serve fails, and a later connection works."""
    frontend = victim.connect(RAM)
    victim.disconnect()
    for status in GNTST:
        victim.guest.fail(frontend.rings[0].grefs[0], status)
        answer = victim.connect_rings()

        assert (Stage.OPEN, True) == (answer.stage, bool(answer.failure))
        assert {"mappings": 0, "pins": 0, "ports": 0} == victim.xen.held()
    victim.guest.fail(frontend.rings[0].grefs[0], 0)
    assert Stage.SERVING == victim.connect_rings().stage
    frontend.write(0, b"m" * PAGE)


@pytest.mark.rows("A21")
def test_persistent_grants_have_a_limit_and_an_end(victim: Driven) -> None:
    """A21 (XSA-371): a guest that uses ever new pages has a limited number of them mapped, and none after its end."""
    victim.connect(RAM, Wishes(persistent=True))
    evil = Evil(victim)
    frames = evil.guest.allocate(MAX_PERSISTENT + 600)
    grefs = [evil.guest.grant(frame) for frame in frames]
    evil.guest.fail(grefs[5000], -1)
    slots = [
        encode_direct(X86_64, BLKIF_OP_READ, start, 0, [(gref, 0, 7) for gref in grefs[start : start + 11]])
        for start in range(0, len(grefs) - 10, 11)
    ]
    statuses = [status for _, _, status in evil.send(*slots)]

    assert 1 == statuses.count(ERROR)
    assert len(slots) - 1 == statuses.count(OK)
    assert MAX_PERSISTENT - 11 <= victim.xen.held()["pins"] <= MAX_PERSISTENT + 1


@pytest.mark.rows("A22", "B11")
def test_nothing_is_mapped_when_a_request_is_answered(victim: Driven) -> None:
    """A22 (XSA-396): a guest without persistent grants can revoke a request's pages as soon as it has the response."""
    frontend = victim.connect(RAM, Wishes(indirect=64))
    model = make_model(4, SECTORS, max_count=512)
    work(frontend, model, 300)  # the frontend takes each page back at once, and fails if it cannot

    assert {"mappings": 1, "pins": 1, "ports": 1} == victim.xen.held()


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.rows("A23", "B11")
def test_bytes_beside_a_segment_are_not_touched(victim: Driven, persistent: bool) -> None:
    """A23 (XSA-403): a read changes only the sectors that its segment names; a write changes nothing in the page."""
    frontend = victim.connect(RAM, Wishes(persistent=persistent))
    frontend.write(0, bytes(range(256)) * 16)
    evil = Evil(victim)
    gref, page = evil.page()
    writable, _ = evil.page(read_only=True)
    for first in range(8):
        for last in range(first, 8):
            page[:] = b"c" * PAGE
            assert [OK] == evil.statuses(encode_direct(X86_64, BLKIF_OP_READ, 0, 0, [(gref, first, last)]))
            begin, end = first * SECTOR, (last + 1) * SECTOR
            assert b"c" * begin + (bytes(range(256)) * 16)[: end - begin] + b"c" * (PAGE - end) == bytes(page)
    assert [OK, ERROR] == evil.statuses(
        encode_direct(X86_64, BLKIF_OP_WRITE, 0, 8, [(writable, 0, 7)]),
        encode_direct(X86_64, BLKIF_OP_READ, 1, 8, [(writable, 0, 7)]),
    )


# Lifecycle, memory, log, events -------------------------------------------------------------------------------------


@pytest.mark.rows("A16")
def test_toggling_leaves_nothing_behind(victim: Driven) -> None:
    """A16 (XSA-350): thousands of connects and disconnects with I/O in flight do not make the worker grow."""
    victim.connect(RAM)
    wishes = [Wishes(), Wishes(persistent=True, queues=2)]

    def toggle(times: int) -> None:
        for turn in range(times):
            for _ in range(3):
                victim.frontend.submit(turn % 2, 0, data=bytes(PAGE))
            victim.disconnect()
            victim.frontend.crash()
            victim.attach(wishes[turn % 2])

    toggle(100)
    before = resident(victim), descriptors(victim)
    toggle(1000)
    after = resident(victim), descriptors(victim)

    assert after[1] - before[1] < 32  # from the last few milliseconds
    assert after[0] - before[0] < 2 << 20


@pytest.mark.parametrize("operation", DATA)
@pytest.mark.rows("A29")
def test_memory_has_a_bound_that_is_known_before(victim: Driven, operation: int) -> None:
    """A29 (XSA-184): the longest requests in all slots of all rings, on a disk that stalls, need at most one arena."""
    victim.connect(f"delay:read=400ms,write=400ms|{RAM}", Wishes(queues=8, ring_order=4, indirect=256))
    gref, _ = Evil(victim).page()
    indirect, content = Evil(victim).page()
    content[: 256 * 8] = encode_segments([(gref, 0, 7)] * 256)
    before = resident(victim)
    largest = 0
    for ring in range(8):
        evil = Evil(victim, ring)
        for number in range(evil.ring.ring.size):
            evil.ring.put_raw(encode_indirect(X86_64, operation, number, 0, 256, [indirect]))
        evil.ring.push()
        largest = max(largest, resident(victim))
    while not victim.frontend.rings[0].ring.waiting():
        largest = max(largest, resident(victim))
    victim.disconnect()
    victim.attach(Wishes())

    assert max(largest, resident(victim)) - before < ARENA_CHUNKS * CHUNK + (8 << 20)


@pytest.mark.rows("A30", "R13")
def test_bad_requests_do_not_fill_the_log(victim: Driven) -> None:
    """A30 (XSA-180): twenty thousand bad requests make only a handful of short lines in the log."""
    victim.connect(RAM)
    evil = Evil(victim)
    slots = [encode_direct(X86_64, BLKIF_OP_READ, number, 2**40, [(9, 0, 7)]) for number in range(20_000)]

    assert {ERROR} == set(evil.statuses(*slots))
    victim.disconnect()
    lines = victim.worker.lines
    assert 0 < len(lines) <= 11
    assert sum(len(codec.encode(line)) for line in lines) < 8192
    victim.attach(Wishes())


@pytest.mark.rows("B4", "R11")
def test_event_storm_is_throttled(victim: Driven) -> None:
    """B4 (XSA-332): a port that fires without work is polled less and less often; the other ring is served as usual."""
    frontend = victim.connect(RAM, Wishes(queues=2))
    model = make_model(5, SECTORS)
    storm = frontend.rings.pop()
    turns = victim.worker.counters()["turns"]
    for _ in range(20):
        for _ in range(2500):
            storm.port.notify()
        work(frontend, model, 10)
    frontend.rings.append(storm)
    victim.reconnect()

    assert victim.worker.counters()["turns"] - turns < 5000
    assert 0 == model.failures


@pytest.mark.rows("B4", "R11")
def test_a_port_that_fires_in_vain_takes_no_processor(victim: Driven) -> None:
    """B4: a guest that only notifies, as fast as it can, costs the host at most 5 % of a core."""
    victim.connect(RAM)
    [storm] = victim.frontend.rings
    stat = Path(f"/proc/{victim.worker.process.pid}/stat")
    turns = victim.worker.counters()["turns"]
    before, begun, fired = _ticks(stat), time.monotonic(), 0
    while time.monotonic() < begun + 2:
        for _ in range(1000):
            storm.port.notify()
        fired += 1000
    passed_s = time.monotonic() - begun
    percent = 100 * (_ticks(stat) - before) / os.sysconf("SC_CLK_TCK") / passed_s
    victim.reconnect()

    assert fired > 10_000
    assert victim.worker.counters()["turns"] - turns < 300 * passed_s + 500  # it waits 10 ms between two, in the end
    assert percent <= 5
    figures.add("storm of events", percent)


def _ticks(stat: Path) -> int:
    """Return the CPU time that a process has used, in ticks."""
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


@pytest.mark.rows("A24", "B11")
def test_no_more_kicks_than_answers(victim: Driven) -> None:
    """A24 (XSA-391): a frontend is notified at most once per response."""
    frontend = victim.connect(RAM, Wishes(queues=2))
    work(frontend, make_model(6, SECTORS), 500)
    victim.reconnect()
    counted = victim.worker.counters()

    assert counted["notifications"] <= sum(counted[name] for name in ("reads", "writes", "flushes", "discards"))
    assert counted["notifications"] > 0


@pytest.mark.rows("B5", "B7")
def test_ports_that_fire_while_they_are_bound_and_unbound(victim: Driven) -> None:
    """An event at any moment of a connect or disconnect reaches a port in service, or nobody (XSA-331)."""
    stop = threading.Event()
    victim.connect(RAM, Wishes(queues=2))

    def storm() -> None:
        while not stop.is_set():
            for ring in list(victim.frontend.rings):
                with suppress(OSError, ValueError):
                    ring.port.notify()

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        for _ in range(50):
            victim.disconnect()
            assert {"mappings": 0, "pins": 0, "ports": 0} == victim.xen.held()
            victim.frontend.crash()
            victim.attach(Wishes(queues=2))
        victim.frontend.write(0, b"s" * PAGE)
        assert b"s" * PAGE == victim.frontend.read(0, 8)
    finally:
        stop.set()
        thread.join()


@pytest.mark.rows("A25", "A26")
def test_counters_are_read_while_frontends_come_and_go(victim: Driven) -> None:
    """Counters read at any time are whole numbers that never decrease, even if connects fail (XSA-526, 528)."""
    stop, seen = threading.Event(), []
    frontend = victim.connect(RAM)

    def read() -> None:
        last = victim.worker.counters()
        while not stop.is_set():
            now = victim.worker.counters()
            seen.append(all(now[name] >= last[name] for name in ("reads", "writes", "turns", "notifications")))
            last = now

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(15):
            frontend.write(0, bytes([turn]) * PAGE)
            victim.disconnect()
            gref = frontend.rings[0].grefs[0]
            victim.guest.fail(gref, -1)
            assert victim.connect_rings().failure
            victim.guest.fail(gref, 0)
            frontend.crash()
            frontend = victim.attach(Wishes())
    finally:
        stop.set()
        reader.join()

    assert len(seen) > 100
    assert all(seen)
