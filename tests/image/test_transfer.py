"""Copying between two disks."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.helpers_block import image
from xenbackend.block.extents import Extent, Kind
from xenbackend.block.spec import parse_chain
from xenbackend.image.session import RequestFailed, Session
from xenbackend.image.transfer import DEPTH, PIECE, Transfer, data_runs, turns

MIB = 1 << 20


def test_turns_are_cut_at_pieces() -> None:
    """No request crosses a multiple of a MiB, and no turn has more than the memory is for."""
    found = list(turns([Extent(512, 2 * MIB, Kind.DATA), Extent(20 * MIB, 20 * MIB, Kind.DATA)]))

    assert [(512, MIB - 512), (MIB, MIB), (2 * MIB, 512)] == found[0][:3]
    assert [DEPTH, 23 - DEPTH] == [len(turn) for turn in found]
    assert all(start // PIECE == (start + length - 1) // PIECE for turn in found for start, length in turn)


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
    """Zeros are left out by whole 4 KiB; a short rest counts as what it is."""
    assert expected == data_runs(memoryview(content))


def test_a_copy_leaves_holes(tmp_path: Path) -> None:
    """On a blank target what is zero is not written; what is written is durable when the flush has ended."""
    source, target = tmp_path / "source", image(tmp_path / "target", 3 * MIB)
    data = Random(1).randbytes(MIB + 512).ljust(3 * MIB, b"\0")
    source.write_bytes(data)
    with Session() as session:
        disks = [session.open(parse_chain(f"aio:{path}"), read_only=path is source) for path in (source, target)]
        transfer = Transfer(session, *disks, is_blank=True)
        for turn in turns([Extent(0, 3 * MIB, Kind.DATA)]):
            transfer.copy(turn)
        transfer.flush()

    assert data == target.read_bytes()
    assert transfer.written == MIB + 4096
    assert target.stat().st_blocks * 512 < 2 * MIB


def test_zeros_are_written_where_there_may_be_something(tmp_path: Path) -> None:
    """On a target that holds something zeros are copied too, and ranges can be cleared; the rest stays."""
    source, target = image(tmp_path / "source", MIB), tmp_path / "target"
    target.write_bytes(b"t" * 2 * MIB)
    with Session() as session:
        disks = [session.open(parse_chain(f"aio:{path}"), read_only=path is source) for path in (source, target)]
        transfer = Transfer(session, *disks, is_blank=False)
        transfer.copy([(0, 4096)])
        transfer.clear([(8192, 4096), (MIB, 512)])

    expected = bytearray(b"t" * 2 * MIB)
    for start, length in ((0, 4096), (8192, 4096), (MIB, 512)):
        expected[start : start + length] = bytes(length)
    assert expected == target.read_bytes()


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_failure_names_layer_and_place(tmp_path: Path, op: str) -> None:
    """One of the requests that fail is reported, when the whole turn has ended."""
    source, target = tmp_path / "source", image(tmp_path / "target", 2 * MIB)
    source.write_bytes(b"x" * 2 * MIB)
    fault = f"fault:errno=EIO,op={op},every=1|"
    texts = [(fault if op == each else "") + f"aio:{path}" for each, path in (("read", source), ("write", target))]
    with Session() as session:
        source_disk = session.open(parse_chain(texts[0]), read_only=True)
        target_disk = session.open(parse_chain(texts[1]), read_only=False)
        transfer = Transfer(session, source_disk, target_disk, is_blank=True)
        with pytest.raises(RequestFailed, match=rf"fault:.*: {op} of 1048576 bytes at \d+: Input/output error"):
            transfer.copy([(0, MIB), (MIB, MIB)])
