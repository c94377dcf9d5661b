"""Copying between two disks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.helpers_block import image
from xenbackend.block.extents import Extent, Kind
from xenbackend.block.request import Op, Request
from xenbackend.block.spec import parse_chain
from xenbackend.image.session import RequestFailed, Session
from xenbackend.image.transfer import Piece, Transfer, data_runs, pieces_of

MIB = 1 << 20


def ignore(_piece: Piece) -> None:
    """Ignore the piece."""


def test_extents_are_cut_at_pieces() -> None:
    """No request crosses a multiple of 1 MiB. A hole in the file is not data."""
    extents = [Extent(512, 2 * MIB, Kind.DATA), Extent(20 * MIB, MIB, Kind.DATA, is_hole=True)]

    assert [
        Piece(512, MIB - 512),
        Piece(MIB, MIB),
        Piece(2 * MIB, 512),
        Piece(20 * MIB, MIB, is_data=False),
    ] == list(pieces_of(extents))


def test_pieces_are_whole_sectors() -> None:
    """If an extent ends inside a sector, as at a file's end, it includes that sector, and the next extent does not."""
    extents = [Extent(0, 1000, Kind.DATA), Extent(1000, 24, Kind.ZERO), Extent(1024, 512, Kind.DATA)]

    assert [Piece(0, 1024), Piece(1024, 512)] == list(pieces_of(extents))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (bytes(8192), []),
        (b"x" * 8192, [(0, 8192)]),
        (bytes(4096) + b"x" + bytes(4095 + 4096), [(4096, 8192)]),
        (b"x" + bytes(8191) + b"x" * 512, [(0, 4096), (8192, 8704)]),
        (bytes(4096) + b"\0" * 511 + b"x", [(4096, 4608)]),
    ],
)
def test_runs_of_data(content: bytes, expected: list[tuple[int, int]]) -> None:
    """Zeros are left out in units of 4 KiB. A shorter rest is kept or left out by its content."""
    assert expected == data_runs(memoryview(content))


def test_a_copy_leaves_holes(tmp_path: Path) -> None:
    """On a blank target zeros are not written. After `flush`, everything that was written is durable."""
    source, target = tmp_path / "source", image(tmp_path / "target", 3 * MIB)
    data = Random(1).randbytes(MIB + 512).ljust(3 * MIB, b"\0")
    source.write_bytes(data)
    with Session() as session:
        disks = [session.open(parse_chain(f"aio:{path}"), read_only=path is source) for path in (source, target)]
        transfer = Transfer(session, *disks, is_blank=True)
        transfer.run(pieces_of([Extent(0, 3 * MIB, Kind.DATA)]), ignore)
        transfer.flush()

    assert data == target.read_bytes()
    assert transfer.written == MIB + 4096
    assert target.stat().st_blocks * 512 < 2 * MIB


def test_zeros_are_written_where_there_may_be_something(tmp_path: Path) -> None:
    """On a target with old data, zeros are written too and ranges can be cleared. The rest is kept."""
    source, target = image(tmp_path / "source", MIB), tmp_path / "target"
    target.write_bytes(b"t" * 2 * MIB)
    with Session() as session:
        disks = [session.open(parse_chain(f"aio:{path}"), read_only=path is source) for path in (source, target)]
        transfer = Transfer(session, *disks, is_blank=False)
        transfer.run([Piece(0, 4096), Piece(8192, 4096, is_data=False), Piece(MIB, 512, is_data=False)], ignore)

    expected = bytearray(b"t" * 2 * MIB)
    for start, length in ((0, 4096), (8192, 4096), (MIB, 512)):
        expected[start : start + length] = bytes(length)
    assert expected == target.read_bytes()


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_failure_names_layer_and_place(tmp_path: Path, op: str) -> None:
    """If requests fail, one of them is reported, with layer and place, after all others have ended."""
    source, target = tmp_path / "source", image(tmp_path / "target", 2 * MIB)
    source.write_bytes(b"x" * 2 * MIB)
    fault = f"fault:errno=EIO,op={op},every=1|"
    texts = [(fault if op == each else "") + f"aio:{path}" for each, path in (("read", source), ("write", target))]
    with Session() as session:
        source_disk = session.open(parse_chain(texts[0]), read_only=True)
        target_disk = session.open(parse_chain(texts[1]), read_only=False)
        transfer = Transfer(session, source_disk, target_disk, is_blank=True)
        with pytest.raises(RequestFailed, match=rf"fault:.*: {op} of 1048576 bytes at \d+: Input/output error"):
            transfer.run([Piece(0, MIB), Piece(MIB, MIB)], ignore)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_told_is_done_in_order(tmp_path: Path, seed: int) -> None:
    """However requests overtake each other, pieces are reported in order. Stopping leaves nothing in flight."""
    source, target = tmp_path / "source", image(tmp_path / "target", 40 * MIB)
    source.write_bytes(Random(seed).randbytes(40 * MIB))
    stop = Random(seed).randrange(40)
    told: list[Piece] = []

    def tell(piece: Piece) -> None:
        told.append(piece)
        if piece.offset == stop * MIB:
            raise KeyboardInterrupt

    with Session() as session:
        delay = f"delay:jitter=2ms,seed={seed}|"
        disks = [session.open(parse_chain(f"{delay}aio:{path}"), read_only=path is source) for path in (source, target)]
        transfer = Transfer(session, *disks, is_blank=True)
        with pytest.raises(KeyboardInterrupt):
            transfer.run(pieces_of([Extent(0, 40 * MIB, Kind.DATA)]), tell)
        assert [each * MIB for each in range(stop + 1)] == [each.offset for each in told]
        assert source.read_bytes()[: (stop + 1) * MIB] == target.read_bytes()[: (stop + 1) * MIB]
        transfer.run(pieces_of([Extent(0, 40 * MIB, Kind.DATA)]), ignore)

    assert source.read_bytes() == target.read_bytes()


class Stage:
    """A session in which requests end at once, except that a flush ends with the third write after it."""

    can_flush = True

    def __init__(self) -> None:
        self.waiting: list[tuple[int, Request]] = []
        self.writes = 0
        self.flushes = 0

    def submit(self, batch: list[Request]) -> None:
        """Take requests to either disk."""
        for request in batch:
            if request.op == Op.FLUSH:
                self.flushes += 1
                self.waiting.append((self.writes + 3, request))
                continue
            self.writes += request.op == Op.WRITE
            if request.op == Op.READ:
                request.iov[0][:] = b"x" * request.length
            self.end(request)

    def end(self, request: Request) -> None:
        """Give a request back."""
        request.status = 0
        request.tag(request)

    def glance(self) -> None:
        """End the flushes that are due."""
        due = [request for at, request in self.waiting if at <= self.writes]
        self.waiting = [each for each in self.waiting if each[0] > self.writes]
        for request in due:
            self.end(request)

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """End further flushes until `is_done`."""
        while not is_done():
            self.end(self.waiting.pop(0)[1])

    def wake(self) -> None:
        """Do nothing, since nobody sleeps."""


def test_what_is_durable_is_told_while_the_copy_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush starts once enough was reported as done, and covers it, however late it ends. One runs at a time."""
    monkeypatch.setattr("xenbackend.image.transfer.SYNC_EVERY", 4 * MIB)
    stage: Any = Stage()
    told: list[int] = []
    durable: list[tuple[int, int]] = []
    begun: list[int] = []
    submit = stage.submit

    def noted(batch: list[Request]) -> None:
        begun.extend(told[-1] for request in batch if request.op == Op.FLUSH)
        submit(batch)

    stage.submit = noted
    transfer = Transfer(stage, stage, stage, is_blank=True)
    pieces = pieces_of([Extent(0, 100 * MIB, Kind.DATA)])
    transfer.run(pieces, lambda piece: told.append(piece.end), lambda piece: durable.append((piece.end, told[-1])))

    assert [(each + 1) * MIB for each in range(100)] == told
    assert begun[: len(durable)] == [end for end, _ in durable]
    assert 3 <= len(durable) <= stage.flushes
    assert all(end < now for end, now in durable)
    assert not stage.waiting


def test_a_flush_that_failed_fails_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed flush ends the copy. A later flush fails too, although the kernel would let it succeed."""
    monkeypatch.setattr("xenbackend.image.transfer.SYNC_EVERY", 4 * MIB)
    source, target = tmp_path / "source", image(tmp_path / "target", 40 * MIB)
    source.write_bytes(b"x" * 40 * MIB)
    with Session() as session:
        failing = f"fault:errno=EIO,op=flush,limit=1|aio:{target}"
        disks = [session.open(parse_chain(text), read_only=text is not failing) for text in (f"aio:{source}", failing)]
        transfer = Transfer(session, *disks, is_blank=True)
        with pytest.raises(RequestFailed, match="flush"):
            transfer.run(pieces_of([Extent(0, 40 * MIB, Kind.DATA)]), ignore)
        with pytest.raises(RequestFailed, match="flush"):
            transfer.flush()
