"""QCOW disks with kills, power loss and a failing file: no flushed sector is lost, and no table is broken."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from tests import figures, qemu
from tests.qcow_images import qcow, qcow2
from tests.recorded import Change, Disk, RecordedFile, RecordedFiles, Session, after_power_loss, at, state, tears
from xenbackend.block.formats.qcow2_check import Report, check
from xenbackend.units import round_up

SIZE = 512 << 10


@dataclass(frozen=True)
class Shape:
    """What sort of image to make."""

    cluster_bits: int = 12
    order: int = 4
    version: int = 3
    snapshot: bool = False
    parent: bool = False
    table_clusters: int = 4
    size: int = SIZE
    filled: int = 0  # clusters at the beginning that the image already has


SHAPES = {
    "plain": Shape(),
    "512 bytes": Shape(cluster_bits=9, order=5),
    "64 KiB, parent": Shape(cluster_bits=16, parent=True, version=2),
    "snapshot, parent": Shape(snapshot=True, parent=True, order=3),
    "table grows": Shape(cluster_bits=9, order=6, table_clusters=1, size=3 << 20, filled=3950),
    "one bit": Shape(cluster_bits=10, order=0, parent=True),
    "version 1": Shape(version=1),
    "version 1, parent": Shape(version=1, parent=True, cluster_bits=9),
}


class Bed:
    """An image in memory, with or without a parent, and disks on it."""

    def __init__(self, shape: Shape, directory: Path, seed: int) -> None:
        self.shape = shape
        self.chance = Random(seed)
        self.base = self.chance.randbytes(shape.size // 2) if shape.parent else b""
        self.first = bytearray(self.base.ljust(shape.size, b"\0"))
        self.image = self._make()
        self.path, self.parent = at(directory / "image"), at(directory / "base")

    def _make(self) -> bytes:
        shape, chance, cluster = self.shape, self.chance, 1 << self.shape.cluster_bits
        numbers = chance.sample(range(shape.filled, shape.size // cluster), 7)
        clusters = {number: chance.randbytes(cluster) for number in (*range(shape.filled), *numbers[:3])}
        compressed = {number: chance.randbytes(64) + bytes(cluster - 64) for number in numbers[3:5]}
        for number, data in (clusters | compressed).items():
            self.first[number * cluster : (number + 1) * cluster] = data
        backing = b"base" if shape.parent else b""
        if shape.version == 1:
            image = qcow(shape.size, clusters, cluster_bits=shape.cluster_bits, compressed=compressed, backing=backing)
        else:
            zeros = numbers[5:] if shape.version == 3 else []
            for number in zeros:
                self.first[number * cluster : (number + 1) * cluster] = bytes(cluster)
            image = qcow2(
                shape.size, clusters, cluster_bits=shape.cluster_bits, order=shape.order, version=shape.version,
                backing=backing, backing_format=b"raw" if backing else b"", compressed=compressed, zeros=zeros,
                snapshot=shape.snapshot, table_clusters=shape.table_clusters,
            )  # fmt: skip
        return image.ljust(round_up(len(image), 64 << 10), b"\0")

    def open(self, data: bytes | bytearray, *, read_only: bool = False) -> tuple[Disk, RecordedFile]:
        """Return a disk on a file with these bytes."""
        file = RecordedFile(bytearray(data), Random(self.chance.random()))
        files = RecordedFiles(**{self.path: file, self.parent: RecordedFile(bytearray(self.base))})
        driver, option = ("qcow", ",parent_format=raw") if self.shape.version == 1 else ("qcow2", "")
        return Disk(f"{driver}:{self.path}{option}", files, read_only=read_only), file

    def session(self, count: int) -> Session:
        """Send a guest's random requests to a new disk, and close it."""
        disk, file = self.open(self.image)
        session = Session(disk, file, bytes(self.first), self.chance)
        session.run(count, 40)
        disk.chain.close()
        return session

    def content(self, data: bytearray) -> bytes:
        """Return what a disk on a file holds."""
        return self.open(data, read_only=self.chance.random() < 0.5)[0].everything()

    def look(self, data: bytearray) -> Report:
        """Return the faults of a file. There are none to be found in version 1."""
        if self.shape.version == 1:
            return Report()
        return check(lambda offset, length: bytes(data[offset : offset + length]), len(data))


def kill_everywhere(bed: Bed, requests: int, most: int, *, by_qemu: int = 1) -> None:
    """Kill a disk at up to `most` of its writes and check what is left, `by_qemu` times with qemu-img too."""
    session = bed.session(requests)
    log = session.file.log
    places = list(tears(log))
    for number, (count, torn) in enumerate([*bed.chance.sample(places, min(most, len(places))), (len(log), 0)]):
        data = state(bed.image, log, count, torn)
        report = bed.look(data)

        assert [] == session.faults_of_a_kill(bed.content(data), count), (count, torn)
        assert 0 == report.errors, (count, torn, report)
        if number < by_qemu and bed.shape.version > 1:
            Path(bed.path).write_bytes(data)
            assert (0, report.leaks) == qemu.check(Path(bed.path)), (count, torn)
            figures.add("checked by others", 1)
        figures.add("crash points", 1)
    assert 0 == report.leaks  # for a disk that was closed


def lost_writes(log: list[Change]) -> Iterator[tuple[int, int, int]]:
    """Yield each write that may be the only one lost: its place in the log, the last flush's, and the log's length."""
    flushed = 0
    for count in range(1, len(log) + 1):
        if log[count - 1].kind == "flush":
            flushed = count - 1
        yield from ((place, flushed, count) for place in range(flushed, count) if log[place].kind == "write")


def lose_power(bed: Bed, requests: int, times: int) -> None:
    """Let the host of a disk lose power, and check what is left if several unflushed writes are lost, or just one."""
    session = bed.session(requests)
    log = session.file.log
    losses = [after_power_loss(bed.image, log, bed.chance) for _ in range(times // 2)]
    single = list(lost_writes(log))
    for place, flushed, count in bed.chance.sample(single, min(len(single), times)):
        losses.append((state(bed.image, log[:place] + log[place + 1 :], count - 1), flushed))
    for data, flushed in losses:
        report = bed.look(data)

        assert [] == session.faults_of_power_loss(bed.content(data), flushed), flushed
        assert 0 == report.errors, report
    figures.add("crash points", len(losses))


@pytest.mark.parametrize("name", SHAPES)
def test_killed_anywhere(tmp_path: Path, name: str) -> None:
    """Wherever a writer is killed, answered writes are there, and no cluster has two users or too low a refcount."""
    kill_everywhere(Bed(SHAPES[name], tmp_path, 1), requests=12, most=12)


@pytest.mark.parametrize("name", SHAPES)
def test_power_lost_anywhere(tmp_path: Path, name: str) -> None:
    """Whatever unflushed writes the medium keeps, flushed data are there and the tables are sound."""
    lose_power(Bed(SHAPES[name], tmp_path, 2), requests=8, times=16)


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_that_fails(tmp_path: Path, name: str) -> None:
    """If reads, writes and flushes of the file fail, only the requests that needed them fail. Tables stay sound."""
    bed = Bed(SHAPES[name], tmp_path, 3)
    disk, file = bed.open(bed.image)
    file.fails = lambda _: errno.EIO if bed.chance.random() < 0.1 else 0
    session = Session(disk, file, bytes(bed.first), bed.chance)
    session.run(20, 40)
    file.fails = lambda _: 0

    assert [] == session.faults_of_a_kill(disk.everything(), len(file.log))
    disk.chain.close()
    assert [] == session.faults_of_a_kill(bed.content(file.bytes), len(file.log))
    assert 0 == bed.look(file.bytes).errors


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_for_long(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    """The same with other guests, for as long as asked for."""
    seed, turns = request.config.getoption("--seed"), request.config.getoption("--requests") // 20_000
    if not turns:
        pytest.skip("as the tests above, at greater length; --requests 20000, or make test-images")
    for turn in range(turns):
        kill_everywhere(Bed(SHAPES[name], tmp_path, seed + turn), requests=20, most=36, by_qemu=36)
        lose_power(Bed(SHAPES[name], tmp_path, seed + turn), requests=10, times=40)
