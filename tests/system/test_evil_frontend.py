"""Hostile frontends against a real worker: each test is a published fault of a backend, named by its row.

The rows and advisories are those of Xen's and Linux' block backends. Afterwards the disk must be as if nothing had been
tried, the worker alive, and nothing of the guest left over.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

from tests.driven import Driven
from tests.evil import DATA, ERROR, OK, RAM, SECTORS, UNSUPPORTED, Evil, flipping, resident, until_answered
from tests.foreign_images import descriptor, vdi
from tests.qcow_images import qcow, qcow2
from tests.vhd_images import image as vhd
from tests.workload import make_model, read_all, work
from xenbackend.blkif.abi import (
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    REQ_EVENT,
    REQ_PROD,
    RSP_EVENT,
    RSP_PROD,
    X86_32,
    X86_64,
    Layout,
)
from xenbackend.blkif.request import encode_direct, encode_discard, encode_indirect, encode_segments
from xenbackend.protocol import messages
from xenbackend.rig.frontend import Wishes
from xenbackend.units import PAGE, SECTOR

pytestmark = pytest.mark.slow  # each starts a process


# The ring ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", ["size + 1", "2 ** 31", "2 ** 32 - 1"])
@pytest.mark.parametrize("start", [0, 2**32 - 5])
@pytest.mark.rows("A1", "B1", "R2")
def test_producer_far_ahead_halts_that_ring_only(victim: Driven, ahead: str, start: int) -> None:
    """A1, B1 (CVE-2010-4247, XSA-39): a producer index beyond the ring's size stops that ring once, and no other."""
    frontend = victim.connect(RAM, Wishes(queues=2, start_index=start))
    model = make_model(1, SECTORS)
    work(frontend, model, 200)
    broken = frontend.rings.pop()
    before = broken.ring.pushed
    broken.ring.index[REQ_PROD] = (before + eval(ahead, {"size": broken.ring.size})) & 0xFFFFFFFF  # noqa: S307 - ours
    broken.port.notify()
    halted = victim.worker.expect_standing().halted
    for _ in range(100):
        broken.port.notify()
    work(frontend, model, 200)
    read_all(frontend, model)

    assert halted.startswith("ring 1 was stopped: ")
    assert before & 0xFFFFFFFF == broken.ring.index[RSP_PROD]
    assert [] == victim.worker.said


@pytest.mark.rows("B8")
def test_halted_ring_is_closed_and_served_anew(victim: Driven) -> None:
    """B8 (XSA-374): a halted ring still takes events and a disconnect, and the next connection starts afresh."""
    for _ in range(3):
        frontend = victim.connect(RAM) if not hasattr(victim, "frontend") else victim.attach(Wishes())
        frontend.write(0, b"h" * PAGE)
        frontend.rings[0].ring.index[REQ_PROD] = 2**31
        frontend.rings[0].port.notify()
        assert victim.worker.expect_standing().halted
        frontend.rings[0].port.notify()
        victim.disconnect()
        frontend.rings[0].port.notify()
    victim.attach(Wishes())

    assert b"h" * PAGE == victim.frontend.read(0, 8)


@pytest.mark.rows("B2", "R3")
def test_other_indices_are_not_believed(victim: Driven) -> None:
    """B2 (XSA-86): whatever a guest writes to the three other indices, each request is done exactly once."""
    frontend = victim.connect(RAM, Wishes(queues=2))
    evil = Evil(victim, 1)
    gref, _ = evil.page()
    random = Random(1)
    index = evil.ring.ring.index
    for number in range(2000):
        for word in (REQ_EVENT, RSP_PROD, RSP_EVENT):
            index[word] = random.getrandbits(32)
        evil.ring.put_raw(encode_direct(X86_64, BLKIF_OP_READ, number, 0, [(gref, 0, 7)]))
        evil.ring.ring.push()
        evil.ring.port.notify()
        if number % 16 == 0:
            frontend.rings[0].submit(BLKIF_OP_READ, 0, 8)
            frontend.rings[0].push()
        until_answered(evil)
        frontend.rings[0].reap()
    frontend.rings.pop()
    frontend.drain()
    victim.reconnect(Wishes())

    assert 2000 + 125 == victim.worker.counters()["reads"]
    assert [] == victim.worker.lines


@pytest.mark.rows("B2")
def test_random_indices_stop_the_ring_at_worst(victim: Driven) -> None:
    """B2 (XSA-86): random numbers in all four indices stop the ring at worst; the other ring's data stay right."""
    frontend = victim.connect(RAM, Wishes(queues=2))
    random = Random(2)
    model = make_model(2, SECTORS)
    for _ in range(20):
        broken = frontend.rings.pop()
        for word in (REQ_EVENT, RSP_PROD, RSP_EVENT, REQ_PROD):
            broken.ring.index[word] = random.getrandbits(random.choice([3, 32]))
        broken.port.notify()
        work(frontend, model, 20)
        frontend.rings.append(broken)
        frontend = victim.reconnect()
    read_all(frontend, model)

    assert {messages.Standing, messages.Log} >= {type(message) for message in victim.worker.said}


@pytest.mark.rows("B9")
def test_guest_that_reads_no_answers_costs_no_memory(victim: Driven) -> None:
    """B9 (XSA-392): a guest that never takes its responses costs the worker no memory; they are overwritten."""
    victim.connect(RAM)
    evil = Evil(victim)
    gref, _ = evil.page()

    def send(rounds: int) -> None:
        for _ in range(rounds):
            for number in range(32):
                evil.ring.put_raw(encode_direct(X86_64, BLKIF_OP_READ, number, 0, [(gref, 0, 7)]))
            evil.ring.ring.push()
            evil.ring.port.notify()
            until_answered(evil)

    send(20)
    before = resident(victim)
    send(100)

    assert resident(victim) - before < 1 << 20


# Requests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [RAM, "aio"])
@pytest.mark.rows("A4", "A14", "R5")
def test_read_only_disk_is_not_altered(victim: Driven, tmp_path: Path, chain: str) -> None:
    """A4, A14 (CVE-2013-2140, XSA-142): no request alters a read-only disk, and its image is open for reading only."""
    image = tmp_path / "image"
    image.write_bytes(b"r" * SECTORS * SECTOR)
    victim.connect(f"aio:{image}" if chain == "aio" else f"ram:{image}", Wishes(indirect=32), read_only=True)
    evil = Evil(victim)
    gref, page = evil.page()
    page[:] = b"w" * PAGE
    segments, content = evil.page()
    content[:8] = encode_segments([(gref, 0, 7)])
    writes = [BLKIF_OP_WRITE, BLKIF_OP_WRITE_BARRIER, BLKIF_OP_FLUSH_DISKCACHE]
    slots = [encode_direct(X86_64, operation, place, 0, [(gref, 0, 7)]) for place, operation in enumerate(writes)]
    slots.append(encode_discard(X86_64, 3, 0, 8))
    slots.append(encode_indirect(X86_64, BLKIF_OP_WRITE, 4, 0, 1, [segments]))

    assert not {OK} & set(evil.statuses(*slots))
    assert b"r" * PAGE == victim.frontend.read(0, 8)
    assert b"r" * SECTORS * SECTOR == image.read_bytes()
    folder = Path(f"/proc/{victim.worker.process.pid}")
    opened = [fd.name for fd in (folder / "fd").iterdir() if fd.readlink() == image]
    flags = [(folder / "fdinfo" / fd).read_text().split("flags:")[1].split()[0] for fd in opened]
    assert {os.O_RDONLY} >= {int(flag, 8) & os.O_ACCMODE for flag in flags}


@pytest.mark.parametrize("layout", [X86_64, X86_32])
@pytest.mark.rows("A6", "R4")
def test_sectors_beyond_the_end_are_refused(victim: Driven, layout: Layout) -> None:
    """A6 (CVE-2008-0928): every operation at every edge succeeds exactly if all its sectors are on the disk."""
    victim.connect(RAM, Wishes(layout=layout, indirect=256))
    evil = Evil(victim)
    gref, _ = evil.page()
    indirect, content = evil.page()
    content[: 256 * 8] = encode_segments([(gref, 0, 7)] * 256)
    edges = [0, SECTORS - 1, SECTORS, SECTORS + 1, SECTORS - 8, SECTORS - 88, 2**32 - 1, 2**32, 2**32 + 1]
    edges += [2**55, 2**61, 2**63, 2**63 - 1, 2**64 - 1, 2**64 - 8]
    shapes = {1: [(gref, 3, 3)], 8: [(gref, 0, 7)], 88: [(gref, 0, 7)] * 11}
    slots, expected = [], []
    for sector in edges:
        for operation in (BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_WRITE_BARRIER):
            for count, segments in shapes.items():
                slots.append(encode_direct(layout, operation, len(slots), sector, segments))
                expected.append(OK if sector + count <= SECTORS else ERROR)
        for count in (1, 8, SECTORS, 2**55, 2**63, 2**64 - 1):
            slots.append(encode_discard(layout, len(slots), sector, count))
            expected.append(OK if sector + count <= SECTORS else ERROR)
        for operation in DATA:
            slots.append(encode_indirect(layout, operation, len(slots), sector, 256, [indirect]))
            expected.append(OK if sector + SECTORS <= SECTORS else ERROR)

    assert expected == evil.statuses(*slots)


@pytest.mark.rows("A6", "B10", "R4")
def test_what_no_frontend_sends_is_refused(victim: Driven) -> None:
    """A6, B10: a request with an unknown operation, a wrong count or a segment beyond its page fails, and no other."""
    victim.connect(RAM, Wishes(indirect=256))
    evil = Evil(victim)
    gref, _ = evil.page()
    indirect, content = evil.page()
    content[:16] = encode_segments([(gref, 0, 7), (gref, 5, 4)])
    good = [(gref, 0, 7)]

    def direct(operation: int, count: int, segments: list[tuple[int, int, int]]) -> bytes:
        slot = bytearray(encode_direct(X86_64, operation, 0, 0, segments))
        slot[1] = count
        return bytes(slot)

    cases = [(direct(operation, 1, good), UNSUPPORTED) for operation in (4, 7, 8, 77, 255)]
    cases += [(direct(operation, count, good), ERROR) for operation in DATA for count in (0, 12, 255)]
    cases += [(direct(0, 1, [(gref, *span)]), ERROR) for span in [(1, 0), (0, 8), (8, 8), (255, 255), (0, 255)]]
    cases += [(encode_indirect(X86_64, inner, 0, 0, 1, [indirect]), UNSUPPORTED) for inner in (2, 3, 5, 6, 200)]
    cases += [(encode_indirect(X86_64, 0, 0, 0, count, [indirect]), ERROR) for count in (0, 2, 257, 65535)]
    cases += [(encode_discard(X86_64, 0, 0, 8, secure=True), UNSUPPORTED)]
    cases += [(direct(0, 1, good), OK)]

    assert [status for _, status in cases] == [evil.send(slot)[0][2] for slot, _ in cases]
    assert len(cases) - 1 == victim.worker.expect_counter("guest_errors", len(cases) - 1)


@pytest.mark.rows("B10", "R7")
def test_random_slots_get_one_answer_each(victim: Driven) -> None:
    """B10: any bytes in a slot get exactly one response, with their own id, and do no harm."""
    victim.connect(RAM)
    evil = Evil(victim)
    random = Random(3)
    slots = []
    for number in range(2000):
        slot = bytearray(random.randbytes(112))
        slot[0] = random.choice([0, 1, 2, 3, 5, 6, slot[0]])
        slot[8:16] = number.to_bytes(8, "little")
        slots.append(bytes(slot))

    assert list(range(2000)) == [guest_id for guest_id, _, _ in evil.send(*slots)]


@pytest.mark.parametrize("field", ["operation", "count", "sector", "grant", "segment", "everything"])
@pytest.mark.rows("A8", "B3", "R1")
def test_slot_that_changes_while_it_is_read(victim: Driven, field: str) -> None:
    """A8, B3 (XSA-155, XSA-166): a slot is fetched once, so changing it while it is read gets past no check."""
    frontend = victim.connect(RAM, Wishes(queues=2))
    frontend.write(0, b"0" * PAGE)
    frontend.write(8, b"8" * PAGE)
    evil = Evil(victim, 1)
    gref, _ = evil.page()
    good = encode_direct(X86_64, BLKIF_OP_READ, 1, 0, [(gref, 0, 7)])
    bad = {
        "operation": encode_direct(X86_64, 77, 1, 0, [(gref, 0, 7)]),
        "count": bytes([good[0], 255]) + good[2:],
        "sector": encode_direct(X86_64, BLKIF_OP_READ, 1, 2**63, [(gref, 0, 7)]),
        "grant": encode_direct(X86_64, BLKIF_OP_READ, 1, 0, [(4000, 0, 7)]),
        "segment": encode_direct(X86_64, BLKIF_OP_READ, 1, 0, [(gref, 9, 255)]),
        "everything": b"\xff" * 112,
    }[field]
    with flipping(victim, evil.ring._frames[0] * PAGE + 64, good * 32, bad * 32):
        for _ in range(60):
            evil.ring.ring.produced += 32
            evil.ring.push()
            until_answered(evil)
    frontend.rings.pop()
    counted = victim.worker.expect_counter("guest_errors", 1, at_least=True)

    assert 0 < counted <= 60 * 32
    assert b"0" * PAGE + b"8" * PAGE == frontend.read(0, 16)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.rows("A10", "R1")
def test_segments_that_change_while_they_are_read(victim: Driven, persistent: bool) -> None:
    """A10 (XSA-197): the pages of an indirect request are fetched once, so changing them gets past no check."""
    victim.connect(RAM, Wishes(indirect=256, persistent=persistent))
    evil = Evil(victim)
    gref, page = evil.page()
    _, canary = evil.page()
    page[:] = b"p" * PAGE
    canary[:] = b"c" * PAGE
    frame = evil.guest.allocate(1)[0]
    indirect = evil.guest.grant(frame)
    good, bad = encode_segments([(gref, 0, 7)] * 64), encode_segments([(9999, 6, 200)] * 64)
    slots = [encode_indirect(X86_64, number % 2, number, 0, 64, [indirect]) for number in range(1000)]
    with flipping(victim, frame * PAGE, good, bad):
        statuses = evil.statuses(*slots)

    assert {OK, ERROR} >= set(statuses)
    assert b"c" * PAGE == canary


@pytest.mark.parametrize("layout", [X86_64, X86_32])
@pytest.mark.rows("A11", "R6")
def test_padding_of_responses_is_zero(victim: Driven, layout: Layout) -> None:
    """A11 (XSA-216): the padding of a response is zero, whatever its status, so that it leaks nothing."""
    victim.connect(RAM, Wishes(layout=layout))
    evil = Evil(victim)
    gref, _ = evil.page()
    slots = [b"\xaa" * layout.slot_size]
    for operation, sector in [(BLKIF_OP_READ, 0), (BLKIF_OP_READ, 2**40), (77, 0), (BLKIF_OP_WRITE, 8)]:
        slot = encode_direct(layout, operation, 1, sector, [(gref, 0, 7)])
        end = layout.segments_at + 8
        slots.append(slot[:end] + b"\xaa" * (layout.slot_size - end))

    answers = evil.send(*slots)  # `send` compares each with a response whose padding is zero
    assert sorted([UNSUPPORTED, OK, ERROR, UNSUPPORTED, OK]) == sorted(status for _, _, status in answers)


@pytest.mark.rows("A5", "R17")
@pytest.mark.parametrize("kind", ["qcow2", "qcow", "vhd", "vmdk", "vdi", "luks"])
def test_raw_stays_raw(victim: Driven, tmp_path: Path, kind: str) -> None:
    """A header that a guest writes into its raw disk is data: nothing that it names is ever opened (XSA-48)."""
    canary, path = tmp_path / "canary", tmp_path / "raw.img"
    canary.write_bytes(b"secret" * 4096)
    path.write_bytes(bytes(SECTORS * SECTOR))
    header = {
        "qcow2": lambda: qcow2(1 << 20, backing=str(canary).encode(), backing_format=b"raw"),
        "qcow": lambda: qcow(1 << 20, backing=str(canary).encode()),
        "vhd": lambda: vhd(1 << 20, parent_uuid=b"p" * 16, names=[(b"MacX", b"file://" + str(canary).encode())]),
        "vmdk": lambda: descriptor(f'RW 48 FLAT "{canary}" 0'),
        "vdi": lambda: vdi(1 << 20, {}),
        "luks": lambda: b"LUKS\xba\xbe\0\1" + bytes(504),
    }[kind]()
    data = header[:PAGE].ljust(PAGE, b"\0")
    victim.connect(f"aio:{path}").write(0, data)
    victim.disconnect()
    victim.kill()
    victim.start_successor()
    layers = victim.open(f"aio:{path}").layers
    opened = [each.readlink() for each in Path(f"/proc/{victim.worker.process.pid}/fd").iterdir()]

    assert [(f"aio:{path}", SECTORS * SECTOR, "")] == [(each.text, each.size, each.parent_of) for each in layers]
    assert path in opened
    assert canary not in opened
    victim.attach(Wishes())
    assert data == victim.frontend.read(0, 8)
