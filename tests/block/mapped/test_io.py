"""Tests of `xenbackend.block.mapped.io`: a disk whose tables and clusters are in different files."""

from __future__ import annotations

import errno

import pytest

from tests.helpers_block import content, flush, read, write
from tests.mapped_disk import CLUSTER, Plain, at
from tests.recorded import RecordedFile
from xenbackend.block.driver import File
from xenbackend.block.mapped.tables import OWNED, READABLE
from xenbackend.block.request import Op, Request


@pytest.fixture
def clusters() -> RecordedFile:
    """Return the file that has the clusters."""
    return RecordedFile(bytearray(b"c" * (64 * CLUSTER)))


def test_clusters_and_tables_are_apart(clusters: RecordedFile) -> None:
    """A guest's requests go to the file with the clusters, and those of the format go to the image."""
    disk = Plain([at(0) | OWNED, at(1) | READABLE], data=clusters)
    image = bytes(disk.image.bytes)
    got: list[bytes] = []
    for _ in range(2):  # the second time, the table is loaded
        request = read(0, 2 * CLUSTER)
        assert [0, 0] == disk.do(write(512, b"w" * 512), request)
        disk.io.read_meta(0, 512, lambda _status, view: got.append(bytes(view)))
        disk.do(request := read(0, 2 * CLUSTER))

        assert b"c" * 512 + b"w" * 512 + b"c" * (2 * CLUSTER - 1024) == content(request)
        assert image == disk.image.bytes
    assert [image[:512]] * 2 == got

    disk.io.write_meta(512, b"m" * 512, lambda status: got.append(bytes([status])))
    disk.do(read(0, 512))
    assert (b"m" * 512, b"w" * 512) == (bytes(disk.image.bytes[512:1024]), bytes(clusters.bytes[at(0) + 512 :][:512]))


def test_clusters_are_durable_before_tables(clusters: RecordedFile) -> None:
    """Every flush first flushes the clusters and, when that has ended, the tables."""
    disk = Plain([0], data=clusters)
    order: list[str] = []
    for name, file in (("clusters", clusters), ("tables", disk.image)):
        file.fails = lambda request, name=name: order.append(name) or 0 if request.op == Op.FLUSH else 0
    assert [0] == disk.do(flush())
    disk.io.sync(lambda _status: order.append("done"))
    disk.do(read(0, 512))
    disk.io.sync_data(lambda _status: order.append("done"))
    disk.do(read(0, 512))

    assert ["clusters", "tables", "clusters", "tables", "done", "clusters", "done"] == order


@pytest.mark.parametrize("which", ["clusters", "tables"])
def test_a_flush_that_fails(clusters: RecordedFile, which: str) -> None:
    """A failed flush of either file is the answer. If clusters are not durable, tables are not flushed."""
    disk = Plain([0], data=clusters)
    seen: list[str] = []

    def fails(name: str, request: Request) -> int:
        if request.op == Op.FLUSH:
            seen.append(name)
        return errno.EIO if request.op == Op.FLUSH and name == which else 0

    clusters.fails = lambda request: fails("clusters", request)
    disk.image.fails = lambda request: fails("tables", request)

    assert [errno.EIO] == disk.do(flush())
    assert ["clusters", "tables"][: 1 + (which == "tables")] == seen


def test_both_are_closed() -> None:
    """Closing closes both files, even if the first of them fails."""
    closed: list[str] = []

    class Closing(RecordedFile):
        def close(self) -> None:
            closed.append("clusters")
            raise OSError(errno.EIO, "close")

    data: File = Closing(bytearray(CLUSTER))
    disk = Plain([0], data=data)
    disk.image.close = lambda: closed.append("image")
    with pytest.raises(OSError, match="close"):
        disk.close()

    assert ["clusters", "image"] == closed
