"""The ring server in C, against a frontend in this test that does what a bench's own never does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xenbackend import journal
from xenbackend.bench import native
from xenbackend.bench.plan import SMALLEST, BenchError
from xenbackend.bench.ring_server import RingServer
from xenbackend.bench.session import bench_file
from xenbackend.bench.worker import POLL_US
from xenbackend.blkif.abi import (
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_INDIRECT,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
    NATIVE,
    REQ_PROD,
)
from xenbackend.blkif.request import encode_direct, encode_indirect, encode_segments
from xenbackend.kernel.fence import find_fence
from xenbackend.protocol.messages import Connect, RingParameters
from xenbackend.rig.guest import Guest
from xenbackend.rig.guest_ring import GuestRing
from xenbackend.rig.hypervisor import BACKEND_DOMID
from xenbackend.rig.xen import Xen
from xenbackend.supervisor.service.settings import Settings
from xenbackend.units import PAGE, SECTOR
from xenbackend.worker import polling

pytestmark = pytest.mark.slow  # each starts a process
WHOLE = (0, 7)


class Bed:
    """A guest whose only ring the server serves, and helpers for the tests."""

    def __init__(self, rig: Path, program: Path, file: Path, *, persistent: bool = True, direct: bool = False) -> None:
        self.guest = Guest(rig, 1, 2048)
        self.front = GuestRing(self.guest, NATIVE, 0, find_fence()[0])
        agreed = Connect(NATIVE.protocol, [RingParameters(self.front.grefs, self.front.port.number)], persistent)
        try:
            self.backend = RingServer(program, rig, 1, agreed, file, direct=direct, cpu=None)
        except BaseException:
            self.guest.close()
            raise

    def page(self, *, read_only: bool = False, domid: int = BACKEND_DOMID) -> tuple[int, memoryview]:
        """A new page's grant and its bytes."""
        (frame,) = self.guest.allocate(1)
        return self.guest.grant(frame, read_only=read_only, domid=domid), self.guest.page(frame)

    def ask(self, *slots: bytes) -> list[tuple[int, int, int]]:
        """Put slots into the ring, and return (id, operation, status) of the responses."""
        for slot in slots:
            self.front.put_raw(slot)
        self.front.push()
        answers: list[tuple[int, int, int]] = []
        ring = self.front.ring
        while len(answers) < len(slots):
            if ring.waiting() or ring.final_check():
                answers.append(ring.take()[:3])
            else:
                assert self.front.port.wait(10), "no answer"
        return answers

    def status(self, slot: bytes) -> int:
        """The status of the response to one slot."""
        ((_, _, status),) = self.ask(slot)
        return status

    def close(self) -> None:
        """End both."""
        self.backend.close()
        self.guest.close()


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server, built."""
    built = native.build(tmp_path_factory.mktemp("native"))
    if built.ring_server is None:
        pytest.skip(built.missing)
    return built.ring_server


@pytest.fixture
def serve(tmp_path: Path, program: Path) -> Iterator[Callable[..., Bed]]:
    """Return a function that starts servers of a stamped file, tmp_path/file."""
    beds: list[Bed] = []

    def start(**how: bool) -> Bed:
        beds.append(Bed(tmp_path, program, tmp_path / "file", **how))
        return beds[-1]

    with bench_file(tmp_path / "file", SMALLEST), Xen(tmp_path):
        yield start
        for bed in beds:
            bed.close()


def read(first: int, segments: list[tuple[int, int, int]], number: int = 7) -> bytes:
    """Return a read's slot."""
    return encode_direct(NATIVE, BLKIF_OP_READ, number, first, segments)


def stamp(sector: int) -> bytes:
    """Return what a sector of the bench file begins with."""
    return sector.to_bytes(8, "little")


@pytest.mark.parametrize("persistent", [True, False], ids=["mapped", "copied"])
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_data_go_where_they_belong(serve: Callable[..., Bed], tmp_path: Path, persistent: bool, direct: bool) -> None:
    """Whatever the layout of segments and pages, direct or indirect, each sector's data come to their place."""
    bed = serve(persistent=persistent, direct=direct)
    pages = [bed.page() for _ in range(20)]
    parts = [(pages[3][0], 2, 3), (pages[1][0], *WHOLE), (pages[2][0], 0, 4), (pages[0][0], 7, 7)]

    assert [(7, BLKIF_OP_READ, BLKIF_RSP_OKAY)] == bed.ask(read(96, parts))
    expected = [(3, 2, 96), (3, 3, 97), (1, 0, 98), (1, 7, 105), (2, 0, 106), (2, 4, 110), (0, 7, 111)]
    for page, sector, number in expected:
        assert stamp(number) == pages[page][1][sector * SECTOR : sector * SECTOR + 8]

    for place, (_, view) in enumerate(pages):
        view[:] = bytes([place]) * PAGE
    gref, listed = bed.page(read_only=True)
    listed[: 8 * 20] = encode_segments([(page, *WHOLE) for page, _ in reversed(pages)])
    slot = encode_indirect(NATIVE, BLKIF_OP_WRITE, 2**63, 1600, 20, [gref])

    assert [(2**63, BLKIF_OP_WRITE, BLKIF_RSP_OKAY)] == bed.ask(slot)
    written = (tmp_path / "file").read_bytes()[1600 * SECTOR : 1600 * SECTOR + 21 * PAGE]
    assert b"".join(bytes([place]) * PAGE for place in reversed(range(20))) + stamp(1760) == written[: 20 * PAGE + 8]


@pytest.mark.parametrize("persistent", [True, False], ids=["mapped", "copied"])
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_what_breaks_a_rule_is_answered_with_an_error(
    serve: Callable[..., Bed], tmp_path: Path, persistent: bool, direct: bool
) -> None:
    """A request that breaks a rule gets one answer with an error, and the ring goes on."""
    bed = serve(persistent=persistent, direct=direct)
    good, readable, foreign = bed.page()[0], bed.page(read_only=True)[0], bed.page(domid=3)[0]
    faulty = bed.page()[0]
    long, listed = bed.page()
    listed[: 8 * 257] = encode_segments([(good, *WHOLE)] * 257)
    bed.guest.fail(faulty, -3)
    last = SMALLEST // SECTOR - 8
    (beyond,) = bed.guest.allocate(1)
    stray = bed.guest.grant(beyond)
    bed.guest.table.set(stray, BACKEND_DOMID, 1 << 31, read_only=False)
    slots = {
        "the last page": read(last, [(good, *WHOLE)]),
        "beyond the end": read(last + 1, [(good, *WHOLE)]),
        "far beyond it": read(2**64 - 1, [(good, *WHOLE)]),
        "a write beyond it": encode_direct(NATIVE, BLKIF_OP_WRITE, 7, last + 1, [(good, *WHOLE)]),
        "a write that begins where it ends": encode_direct(NATIVE, BLKIF_OP_WRITE, 7, last + 8, [(good, *WHOLE)]),
        "no segment": read(0, []),
        "twelve segments": bytes([BLKIF_OP_READ, 12]) + read(0, [(good, *WHOLE)] * 11)[2:],
        "a segment that ends before it begins": read(0, [(good, 3, 2)]),
        "a segment that leaves its page": read(0, [(good, 0, 8)]),
        "no such grant": read(0, [(9999, *WHOLE)]),
        "a grant out of range": read(0, [(2**32 - 1, *WHOLE)]),
        "a page that may only be read": read(0, [(readable, *WHOLE)]),
        "another domain's page": read(0, [(foreign, *WHOLE)]),
        "a page that cannot be mapped": read(0, [(faulty, *WHOLE)]),
        "a frame that is not there": read(0, [(stray, *WHOLE)]),
        "an indirect page that is not there": encode_indirect(NATIVE, BLKIF_OP_READ, 7, 0, 1, [9999]),
        "257 indirect segments": encode_indirect(NATIVE, BLKIF_OP_READ, 7, 0, 257, [long]),
        "no indirect segment": encode_indirect(NATIVE, BLKIF_OP_READ, 7, 0, 0, [long]),
    }
    statuses = {what: bed.status(slot) for what, slot in slots.items()}

    assert BLKIF_RSP_OKAY == statuses.pop("the last page")
    assert dict.fromkeys(statuses, BLKIF_RSP_ERROR) == statuses
    assert SMALLEST == (tmp_path / "file").stat().st_size
    for operation in (BLKIF_OP_FLUSH_DISKCACHE, 255):
        assert BLKIF_RSP_EOPNOTSUPP == bed.status(bytes([operation]) + read(0, [(good, *WHOLE)])[1:])
    inner = encode_indirect(NATIVE, BLKIF_OP_INDIRECT, 7, 0, 1, [long])
    assert BLKIF_RSP_EOPNOTSUPP == bed.status(inner)


@pytest.mark.parametrize("persistent", [True, False], ids=["mapped", "copied"])
def test_a_page_that_was_read_from_is_not_written_to(serve: Callable[..., Bed], persistent: bool) -> None:
    """A page granted for reading only can be the source of a write; a read into it is refused."""
    bed = serve(persistent=persistent)
    gref, view = bed.page(read_only=True)
    view[:] = b"w" * PAGE
    write = encode_direct(NATIVE, BLKIF_OP_WRITE, 1, 0, [(gref, *WHOLE)])

    assert [BLKIF_RSP_OKAY, BLKIF_RSP_ERROR] == [bed.status(write), bed.status(read(0, [(gref, *WHOLE)]))]
    assert b"w" * PAGE == view


def test_a_full_ring_is_answered_whole(serve: Callable[..., Bed]) -> None:
    """A full ring of 32 requests, some of which fail, gets 32 responses, each with its own id."""
    bed = serve()
    gref = bed.page()[0]
    for _ in range(3):
        answers = bed.ask(*(read(number, [(gref if number % 3 else 9999, *WHOLE)], number) for number in range(32)))

        assert [(number, BLKIF_OP_READ, 0 if number % 3 else -1) for number in range(32)] == sorted(answers)


def test_an_overflow_ends_the_server(serve: Callable[..., Bed]) -> None:
    """A frontend that announces more than fits into its ring is reported, and the server ends."""
    bed = serve()
    bed.front.ring.index[REQ_PROD] = 33
    bed.front.port.notify()

    assert 1 == bed.backend.server._process.wait(10)
    assert "announced 33 requests, for which the ring has no room" in bed.backend.server.last_words()
    with pytest.raises(BenchError, match="C limit ended during the measurement: the frontend announced 33"):
        bed.backend.server.cpu_time()


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_the_server_ends_with_its_guest(serve: Callable[..., Bed], direct: bool) -> None:
    """When the holder of the other end of its pipe has ended, even by a kill, the server ends by itself."""
    bed = serve(direct=direct)
    bed.status(read(0, [(bed.page()[0], *WHOLE)]))
    bed.backend._alive.close()

    assert 0 == bed.backend.server._process.wait(10)


def test_a_file_that_is_not_there_is_told(tmp_path: Path, program: Path) -> None:
    """A server that cannot start gives the reason, and nothing of it is left."""
    with Xen(tmp_path), pytest.raises(BenchError, match=r"C limit did not start: .*no-file: No such file"):
        Bed(tmp_path, program, tmp_path / "no-file")


def test_it_waits_as_a_worker_does() -> None:
    """Server and worker sleep and notify by the same rules, or the comparison would be of those."""
    source = (native.SOURCES / "ring_server.c").read_text()
    found = dict(re.findall(r"^    (BATCH|PATIENCE|PAUSE) = (\d+),", source, re.MULTILINE))
    of_a_worker = {"BATCH": journal.BATCH, "PATIENCE": polling._PATIENCE, "PAUSE": polling._PAUSE}

    assert {name: str(value) for name, value in of_a_worker.items()} == found
    assert Settings().poll_us == POLL_US
