"""The record file: records are read back as packed, damage is tolerated, and summaries are right."""

from __future__ import annotations

import errno
from io import BytesIO

import pytest

from xenbackend.block import record
from xenbackend.block.record import SIZE, Choice, Entry, Lost, Session, Summary
from xenbackend.block.request import Op

SESSION = Session(1 << 30, 1_700_000_000_000_000_000, 4096, 77)
BEGAN = SESSION.began_ns


def entry(
    op: Op = Op.WRITE, sector: int = 8, count: int = 8, took_ns: int = 1000, status: int = 0, at_ns: int = 0
) -> Entry:
    """Return a request; times are ns, `at_ns` after the session began."""
    return Entry(BEGAN + at_ns, sector * 512, count * 512, took_ns, status, op)


def read(data: bytes) -> list[Session | Entry | Lost]:
    """Return what a file with these bytes holds."""
    return list(record.read(BytesIO(data)))


def test_every_record_is_32_bytes() -> None:
    """The file is a sequence of 32-byte records, whatever their kind."""
    packed = [record.pack_session(SESSION), record.pack_request(entry()), record.pack_lost(Lost(1, 2))]

    assert [SIZE, SIZE, SIZE] == [len(each) for each in packed]


def test_layout_is_as_documented() -> None:
    """A request's fields are where the module's docstring says, so that other programs can read the file."""
    packed = record.pack_request(Entry(0x0102030405060708, 512 * 0x11, 512 * 0x22, 0x33, 5, Op.DISCARD))

    assert bytes.fromhex("0807060504030201 1100000000000000 3300000000000000 22000000 0500 03 00") == packed


def test_what_is_packed_is_read() -> None:
    """Sessions, requests and losses are read back as they were packed, in the order of the file."""
    entries = [entry(op, status=errno.EIO) for op in Op]
    data = record.pack_session(SESSION) + b"".join(map(record.pack_request, entries)) + record.pack_lost(Lost(BEGAN, 9))

    assert [SESSION, *entries, Lost(BEGAN, 9)] == read(data)


def test_huge_discard_saturates() -> None:
    """A discard of more sectors than the field can hold is recorded with the largest number that fits."""
    packed = record.pack_request(entry(Op.DISCARD, 0, 1 << 33))

    assert record.MAX_COUNT * 512 == read(record.pack_session(SESSION) + packed)[1].length


@pytest.mark.parametrize("cut", range(SIZE))
def test_last_record_may_be_cut_short(cut: int) -> None:
    """A last record that was cut short by a death is skipped, and those before it are read."""
    data = record.pack_session(SESSION) + record.pack_request(entry()) + record.pack_request(entry())[:cut]

    assert [SESSION, entry()] == read(data)


def test_damaged_record_counts_as_lost() -> None:
    """Records after a hole that a crash of the host left in the file are still read."""
    data = record.pack_session(SESSION) + bytes(SIZE) + record.pack_request(entry())

    assert [SESSION, Lost(0, 1), entry()] == read(data)


@pytest.mark.parametrize("data", [b"x" * 64, b"xbelog\x02\xff" + bytes(24), b"\0"])
def test_other_file_is_refused(data: bytes) -> None:
    """A file of another kind, or of a later version, is refused."""
    with pytest.raises(ValueError, match="not a record"):
        read(data)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(), "abcd"),
        (Choice(ops=frozenset({Op.READ, Op.FLUSH})), "ac"),
        (Choice(since_ns=BEGAN + 10), "bcd"),
        (Choice(errors_only=True), "d"),
        (Choice(slower_than_ns=5000), "b"),
        (Choice(first=8 * 512, stop=9 * 512), "b"),
        (Choice(first=15 * 512, stop=16 * 512), "b"),
        (Choice(first=16 * 512, stop=100 * 512), "d"),
    ],
)
def test_choice(choice: Choice, expected: str) -> None:
    """Each filter narrows the selection. A range selects the requests that overlap it; its end is exclusive."""
    entries = {
        "a": entry(Op.READ, 0, 8),
        "b": entry(Op.WRITE, 8, 8, took_ns=5000, at_ns=10),
        "c": Entry(BEGAN + 20, 0, 0, 4000, 0, Op.FLUSH),
        "d": entry(Op.WRITE, 16, 8, status=errno.EIO, at_ns=30),
    }

    assert expected == "".join(name for name, each in entries.items() if choice.wants(each))


def test_summary() -> None:
    """A summary counts requests by operation, gives percentiles by nearest rank, and names the busiest ranges."""
    summary = Summary()
    summary.add(entry(Op.READ, 8 * n, 8, took_ns=n + 1, at_ns=n) for n in range(100))
    summary.add([entry(Op.WRITE, 4096, 8, status=errno.EIO), Lost(0, 3)])
    result = summary.result(hottest=1)

    assert {"requests": 100, "bytes": 100 * 4096, "errors": 0, "sequential_share": 0.99} | {
        "latency_p50_ns": 50, "latency_p99_ns": 99, "latency_max_ns": 100,
    } == result["operations"]["read"]  # fmt: skip
    assert (1, 1) == (result["operations"]["write"]["requests"], result["operations"]["write"]["errors"])
    assert [{"offset": 0, "length": 1 << 20, "requests": 100}] == result["hottest"]
    assert 3 == result["lost"]


def test_sequential_share_survives_a_batch_that_completes_backwards() -> None:
    """Sequential runs are found even if the requests of a batch complete in another order than the guest sent them."""
    summary = Summary()
    order = [batch + place for batch in range(0, 96, 3) for place in (1, 0, 2)]
    summary.add(entry(Op.WRITE, 8 * n, 8) for n in order)

    assert summary.result()["operations"]["write"]["sequential_share"] >= 0.6


def test_empty_summary() -> None:
    """A file without requests has an empty summary, which is no error."""
    assert {"duration_s": 0, "lost": 0, "operations": {}, "hottest": []} == Summary().result()
