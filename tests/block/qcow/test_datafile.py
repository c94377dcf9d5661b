"""External data files of QCOW2: which are opened and which refused, reads and writes, kills and power loss."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests import figures, qemu
from tests.helpers_block import Machine, content, discard, flush, read, write
from tests.qcow_images import COPIED, qcow2, with_word
from tests.recorded import Change, Disk, RecordedFile, RecordedFiles, Session, at, state, tears
from xenbackend.block.chain import Chain
from xenbackend.block.formats.qcow2_check import check
from xenbackend.errors import DriverError

SIZE = 1 << 20
CLUSTER = 4096
RAW = 1 << 1  # an auto-clear feature


def make(path: Path, name: bytes = b"data", **options: Any) -> str:
    """Write an image with a data file, and return the text of a layer that can read it."""
    path.write_bytes(qcow2(SIZE, data_name=name, **options))
    return f"qcow2:{path}"


def writable(text: str, data: Path) -> str:
    """Return the layer with which the disk may be written."""
    return f"{text},data_file={data}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a data file that is full of old data."""
    path = tmp_path / "data"
    path.write_bytes(b"d" * SIZE)
    return path


def test_what_is_read(machine: Machine, tmp_path: Path, data: Path) -> None:
    """Clusters are at their disk's offsets in the data file, even the first. Absent clusters are not read from it."""
    (tmp_path / "base").write_bytes(b"p" * SIZE)
    words = {0: b"", 2: b""}
    text = make(tmp_path / "a", clusters=words, zeros=[1], backing=b"base", backing_format=b"raw")

    assert b"d\0dp" == machine.contents(text)[: 4 * CLUSTER : CLUSTER]


def test_what_is_written(machine: Machine, tmp_path: Path, data: Path) -> None:
    """A write to part of an absent cluster fills the rest of that cluster with what the disk showed there."""
    text = make(tmp_path / "a", os.fsencode(data), clusters={3: b""}, zeros=[1])  # QEMU knows a whole path only
    before = data.read_bytes()
    chain = machine.open(writable(text, data))
    requests = [write(512, b"w" * 512), write(CLUSTER + 512, b"x" * CLUSTER), write(3 * CLUSTER, b"y" * 512)]
    assert [0] * 4 == machine.do(chain, *requests, flush())
    chain.close()
    expected = bytes(512) + b"w" * 512 + bytes(CLUSTER - 512) + b"x" * CLUSTER + bytes(CLUSTER - 512)

    assert expected + b"y" * 512 + b"d" * (CLUSTER - 512) == machine.contents(text)[: 4 * CLUSTER]
    assert expected == data.read_bytes()[: 3 * CLUSTER]
    assert before[4 * CLUSTER :] == data.read_bytes()[4 * CLUSTER :]
    assert (0, 0) == qemu.check(tmp_path / "a")


def test_the_last_cluster_ends_with_the_disk(machine: Machine, tmp_path: Path) -> None:
    """If a disk ends inside a cluster, its data file is not extended and nothing is written beyond the disk's end."""
    size = SIZE - 1024
    (tmp_path / "data").write_bytes(b"d" * size)
    (tmp_path / "a").write_bytes(qcow2(size, data_name=b"data"))
    chain = machine.open(writable(f"qcow2:{tmp_path / 'a'}", tmp_path / "data"))
    assert [0, 0] == machine.do(chain, write(size - 512, b"w" * 512), flush())
    chain.close()

    assert bytes(CLUSTER - 1536) + b"w" * 512 == (tmp_path / "data").read_bytes()[-(CLUSTER - 1024) :]
    assert size == (tmp_path / "data").stat().st_size


def test_holes_are_made_in_it(machine: Machine, tmp_path: Path, data: Path) -> None:
    """A discard frees the data file's space and does not change the tables."""
    image = tmp_path / "a"
    text = make(image, clusters=dict.fromkeys(range(SIZE // CLUSTER), b""), autoclear=RAW)
    before = image.read_bytes()
    chain = machine.open(writable(text, data))
    if not chain.geometry.can_discard:
        pytest.skip("this file system makes no holes")
    assert [0, 0] == machine.do(chain, discard(SIZE // 2, SIZE // 2), flush())
    chain.close()

    assert b"d" * (SIZE // 2) + bytes(SIZE // 2) == data.read_bytes() == machine.contents(text)
    assert data.stat().st_blocks * 512 <= SIZE // 2
    assert before == image.read_bytes()[: len(before)]


@pytest.mark.parametrize(("autoclear", "kept"), [(0, 0), (1 | RAW, RAW), (RAW | 1 << 5, RAW)])
def test_raw_stays_raw(machine: Machine, tmp_path: Path, data: Path, autoclear: int, kept: int) -> None:
    """Writing keeps the flag that says that the data file is a raw disk, and drops other auto-clear features."""
    text = make(tmp_path / "a", autoclear=autoclear)
    machine.open(writable(text, data)).close()

    assert kept == (tmp_path / "a").read_bytes()[95]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (b"", "which it does not name; add data_file=FILE"),
        (b"gone", "data file is not there: the image names 'gone'; put the data file there, or add data_file=FILE"),
        (
            b"../outside",
            r"outside is named only by the image; .* image trust LAYER, or with parents=.* or data_file=FILE",
        ),
        (b"link", "link is /.*/outside, and is named only by the image"),
        (b"/etc/passwd", "/etc/passwd is named only by the image"),
        (b"pipe", "pipe is not a file; if that is right, add data_file=FILE"),
        (b"/dev/null", "/dev/null is not a file"),
        (b".", "is a directory"),
        (b"nbd://host/x", "'nbd://host/x' is not a file; add data_file=FILE"),
        (b"json:{}", "is not a file"),
        (b"sound", "sound is named only by the image"),
    ],
)
def test_names_that_are_refused(tmp_path: Path, name: bytes, sentence: str) -> None:
    """R18: a data file that only the image names is not opened, wherever it is, not even for reading."""
    machine = Machine(parents=())
    refuse(machine, tmp_path, name, sentence, is_chosen=False, read_only=True)
    machine.close()


@pytest.mark.parametrize("name", [b"a", b"same"])
def test_an_image_has_not_its_data_in_itself(machine: Machine, tmp_path: Path, name: bytes) -> None:
    """An image that names itself as its data file, by any name, is refused, even if its names may be followed."""
    refuse(machine, tmp_path, name, "is the image itself", is_chosen=False, read_only=True)


def test_a_name_does_not_suffice_for_writing(machine: Machine, tmp_path: Path) -> None:
    """A data file that only the image names is not opened for writing, even if it may be opened for reading."""
    sentence = "sound is named only by the image, which is not enough for writing; .* add data_file=/.*/sound$"
    refuse(machine, tmp_path, b"sound", sentence, is_chosen=False, read_only=False)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (b"gone", "there is no file or device"),
        (b"a", "is the image itself"),
        (b"same", "is the image itself"),
        (b".", "is a directory"),
        (b"pipe", "is a pipe"),
        (b"empty", "is empty"),
        (b"short", r"short has 512 KiB, and its disk 1 MiB; find out why; or extend it"),
    ],
)
def test_data_files_that_are_refused(machine: Machine, tmp_path: Path, name: bytes, sentence: str) -> None:
    """If the data file that the operator has named cannot hold the disk, it is refused and nothing is written."""
    refuse(machine, tmp_path, name, sentence, is_chosen=True, read_only=False)


def refuse(machine: Machine, tmp_path: Path, name: bytes, sentence: str, *, is_chosen: bool, read_only: bool) -> None:
    """Check that a data file is refused by a message, and that nothing is changed."""
    directory = tmp_path / "images"
    directory.mkdir()
    (tmp_path / "outside").write_bytes(bytes(SIZE))
    (directory / "link").symlink_to("../outside")
    (directory / "empty").touch()
    (directory / "sound").write_bytes(b"s" * SIZE)
    (directory / "short").write_bytes(bytes(SIZE // 2))
    os.mkfifo(directory / "pipe")
    text = make(directory / "a", name, autoclear=1)
    if is_chosen:
        text = writable(text, directory / os.fsdecode(name))
    os.link(directory / "a", directory / "same")
    before = (directory / "a").read_bytes()
    with pytest.raises(DriverError, match=sentence) as caught:
        machine.open(text, read_only=read_only)

    assert text == caught.value.layer
    assert before == (directory / "a").read_bytes()[: len(before)]
    assert b"s" * SIZE == (directory / "sound").read_bytes()


def test_what_an_operator_may_name(machine: Machine, tmp_path: Path) -> None:
    """`data_file=` names any file, in place of the one that the image names. `parents=` allows the latter."""
    (tmp_path / "images").mkdir()
    (tmp_path / "data").write_bytes(b"1" * SIZE)
    (tmp_path / "images" / "data").write_bytes(b"2" * SIZE)
    for name in (b"data", b"", b"nbd://host/x"):
        text = make(tmp_path / "images" / "a", name, clusters={0: b""})
        assert b"1" == machine.contents(writable(text, tmp_path / "data"))[:1]
    text = make(tmp_path / "images" / "a", b"../data", clusters={0: b""})

    assert b"1" == machine.contents(f"{text},parents={tmp_path}")[:1]


def test_an_image_without(machine: Machine, tmp_path: Path, data: Path) -> None:
    """`data_file=` is refused if the image has no data file, because the operator must have meant another image."""
    (tmp_path / "a").write_bytes(qcow2(SIZE))
    with pytest.raises(DriverError, match="its data are in the image itself"):
        machine.open(writable(f"qcow2:{tmp_path / 'a'}", data))


def test_a_short_data_file_is_read(machine: Machine, tmp_path: Path) -> None:
    """A reader sees zeros beyond the end of a short data file, as with QEMU."""
    (tmp_path / "data").write_bytes(b"d" * CLUSTER)
    text = make(tmp_path / "a", clusters={0: b"", 1: b""})

    assert b"d" * CLUSTER + bytes(CLUSTER) == machine.contents(text)[: 2 * CLUSTER]


def test_it_is_locked(machine: Machine, tmp_path: Path, data: Path) -> None:
    """A data file has one writer or any number of readers, whatever images or layers use it."""
    one, other = (writable(make(tmp_path / name), data) for name in ("a", "b"))
    chain = machine.open(one)
    for text in (other, f"aio:{data}"):
        with pytest.raises(DriverError, match="data is locked by another process"):
            machine.open(text, read_only=True)
    chain.close()
    chain = machine.open(one, read_only=True)
    machine.open(other, read_only=True).close()
    with pytest.raises(DriverError, match="is locked"):
        machine.open(other)
    chain.close()
    machine.open(f"aio:{data}").close()  # nothing is left locked


@pytest.mark.parametrize("read_only", [False, True])
def test_no_file_is_used_twice_in_a_chain(machine: Machine, tmp_path: Path, data: Path, *, read_only: bool) -> None:
    """A parent that is its child's data file, or uses a data file of one of its children, is refused by name."""
    text = writable(make(tmp_path / "a", backing=b"data", backing_format=b"raw"), data)
    with pytest.raises(DriverError, match=rf"parent aio:{data} is the same file as the image .*, or has their data"):
        machine.open(text, read_only=read_only)
    for name in (b"a", b"data"):
        make(tmp_path / "b", name)
        text = writable(make(tmp_path / "a", backing=b"b", backing_format=b"qcow2"), data)
        with pytest.raises(DriverError, match=rf"{name.decode()} has the data of one of its children"):
            machine.open(text, read_only=read_only)
    machine.open(f"aio:{data}").close()  # nothing is left open


@pytest.mark.parametrize(
    ("index", "word", "sentence"),
    [
        (1, 2 * CLUSTER | COPIED, "cluster of its data file is at byte 8192, not at 4096"),
        (1, COPIED, "at byte 0, not at 4096"),
        (1, 1 << 62 | 512, "is compressed"),
    ],
)
def test_clusters_at_other_places(
    machine: Machine, tmp_path: Path, data: Path, index: int, word: int, sentence: str
) -> None:
    """A cluster that is not at its disk's offset, or is compressed, gives EIO."""
    path = tmp_path / "a"
    text = make(path, clusters={0: b""})
    path.write_bytes(with_word(path.read_bytes(), 2, lambda _word: word, index))
    chain = machine.open(writable(text, data))
    assert [errno.EIO, errno.EIO] == machine.do(chain, read(CLUSTER, 512), write(CLUSTER, b"w" * 512))
    chain.close()
    assert b"d" * SIZE == data.read_bytes()


def test_snapshots_are_not_written_over(machine: Machine, tmp_path: Path, data: Path) -> None:
    """An image with snapshots can only be read, since all of them share the data file."""
    text = make(tmp_path / "a", clusters={1: b""}, snapshot=True)
    with pytest.raises(DriverError, match="it has snapshots"):
        machine.open(writable(text, data))

    assert b"\0d" == machine.contents(text)[: 2 * CLUSTER : CLUSTER]


def random_guest(machine: Machine, chain: Chain, model: bytearray, chance: Random, requests: int) -> None:
    """Send random requests to a disk and to its model."""
    for _ in range(requests // 4):
        batch, end = [], 0
        while len(batch) < 4 and end < len(model) - 200_000:
            length = chance.choice([1, 8, chance.randint(1, 200)]) << 9
            offset = chance.randrange(end, len(model) - length + 1) >> 9 << 9
            if offset < end:
                break
            batch.append(write(offset, chance.randbytes(length)) if chance.random() < 0.6 else read(offset, length))
            end = offset + length
        expected = [bytes(model[each.offset : each.offset + each.length]) for each in batch]
        assert [0] * (len(batch) + 1) == machine.do(chain, *batch, flush())
        for each, data in zip(batch, expected, strict=True):
            if each.op:
                model[each.offset : each.offset + each.length] = content(each)
            else:
                assert data == content(each)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cluster_bits", "kind"), [(9, "thin"), (9, "backed"), (12, "raw"), (16, "backed"), (20, "thin")]
)
def test_both_ways(
    machine: Machine, tmp_path: Path, request: pytest.FixtureRequest, cluster_bits: int, kind: str
) -> None:
    """Whatever QEMU and we write in turn, both read it and qemu-img finds no fault. A raw data file is the disk."""
    chance = Random(request.config.getoption("--seed") + cluster_bits)
    base, path, raw, size = tmp_path / "base", tmp_path / "a", tmp_path / "raw", 2 * SIZE - 1024
    base.write_bytes(chance.randbytes(SIZE))
    model = bytearray(base.read_bytes() if kind == "backed" else b"").ljust(size, b"\0")
    options = f"cluster_size={1 << cluster_bits},data_file={tmp_path}/data,data_file_raw={kind == 'raw'}".lower()
    parent = ("-b", base, "-F", "raw") if kind == "backed" else ()
    qemu.qemu_img("create", "-f", "qcow2", "-o", options, *parent, path, str(size))
    for turn in range(2):
        offset = chance.randrange(size - 100_000 >> 9) << 9
        qemu.qemu_io(path, "qcow2", f"write -P {turn + 1} {offset} 99840", "write -z 512k 4k", "write -z 1k 200k")
        model[offset : offset + 99840] = bytes([turn + 1]) * 99840
        model[512 << 10 : 516 << 10], model[1024 : 201 << 10] = bytes(4096), bytes(200 << 10)
        chain = machine.open(writable(f"qcow2:{path}", tmp_path / "data"))
        random_guest(machine, chain, model, chance, request.config.getoption("--requests") // 100)
        chain.close()
        raw.write_bytes(model)

        assert bytes(model) == machine.contents(f"qcow2:{path}")
        qemu.qemu_img("compare", "-f", "qcow2", "-F", "raw", path, raw)
        assert (0, 0) == qemu.check(path)
        assert kind != "raw" or bytes(model) == (tmp_path / "data").read_bytes()[:size]


class Log(list[Change]):
    """The changes of one file, each of which is also added to the common log of both files."""

    def __init__(self, name: str, both: list[tuple[str, Change]]) -> None:
        super().__init__()
        self._name, self._both = name, both

    def append(self, change: Change) -> None:
        """Add a change to both logs."""
        super().append(change)
        self._both.append((self._name, change))


class Bed:
    """A disk in two recorded files. The data file is full of old data that must not show where the disk has none."""

    SIZE = 64 << 10
    STALE = b"\xa5" * 512

    def __init__(self, directory: Path, seed: int, cluster_bits: int, *, backed: bool) -> None:
        self.chance, cluster = Random(seed), 1 << cluster_bits
        base = self.chance.randbytes(self.SIZE) if backed else b""
        self.first = bytearray(base.ljust(self.SIZE, b"\0"))
        own = {number: self.chance.randbytes(cluster) for number in (0, 5, 6)}
        data = bytearray(self.STALE * (self.SIZE // 512))
        for number, found in own.items():
            for disk in (data, self.first):
                disk[number * cluster : (number + 1) * cluster] = found
        self.first[9 * cluster : 10 * cluster] = bytes(cluster)
        backing: Any = {"backing": b"base", "backing_format": b"raw"} if backed else {}
        image = qcow2(self.SIZE, own, zeros=[9], data_name=b"data", cluster_bits=cluster_bits, **backing)
        self.start = {"image": image.ljust(256 << 10, b"\0"), "data": bytes(data), "base": base or bytes(512)}
        self.paths = {name: at(directory / name) for name in self.start}

    def open(self, **content: bytes | bytearray) -> tuple[Disk, list[tuple[str, Change]]]:
        """Return a disk on files with this content, and the common log of the changes of both."""
        both: list[tuple[str, Change]] = []
        files = {}
        for name, path in self.paths.items():
            file = RecordedFile(bytearray(content.get(name, self.start[name])), Random(self.chance.random()))
            file.log = Log(name, both)
            files[path] = file
        text = writable(f"qcow2:{self.paths['image']}", Path(self.paths["data"]))
        return Disk(text, RecordedFiles(**files)), both

    def session(self, count: int) -> tuple[Session, list[tuple[str, Change]]]:
        """Send a guest's random requests to a new disk."""
        disk, both = self.open()
        clock = RecordedFile(bytearray())
        clock.log = both
        session = Session(disk, clock, bytes(self.first), self.chance)
        session.run(count, 40)
        return session, both

    def lost(self, name: str, both: list[tuple[str, Change]]) -> bytearray:
        """Return a file after a power loss: of these changes, those since its own last flush may be missing."""
        changes = [change for each, change in both if each == name]
        flushed = max((place for place, change in enumerate(changes) if change.kind == "flush"), default=0)
        kept = [change for change in changes[flushed:] if self.chance.random() < 0.5]
        changes[flushed:] = kept
        return state(
            self.start[name].ljust(2 << 20, b"\0") if name == "image" else self.start[name], changes, len(changes)
        )

    def look(self, image: bytearray) -> None:
        """Check that the tables are sound."""
        report = check(lambda offset, length: bytes(image[offset : offset + length]), len(image))
        assert 0 == report.errors, report


@pytest.mark.parametrize(("cluster_bits", "backed"), [(9, False), (12, True)])
def test_killed_anywhere(tmp_path: Path, request: pytest.FixtureRequest, cluster_bits: int, *, backed: bool) -> None:
    """Wherever a writer is killed, answered writes are there, and nothing that the disk never held."""
    bed = Bed(tmp_path, request.config.getoption("--seed"), cluster_bits, backed=backed)
    session, both = bed.session(20)
    places = list(tears([change for _, change in both]))
    for count, torn in [*bed.chance.sample(places, min(40, len(places))), (len(both), 0)]:
        now: dict[str, bytearray] = {}
        for name in ("image", "data"):
            before = [change for each, change in both[:count] if each == name]
            part = both[count : count + 1] if torn else []
            changes = before + [change for each, change in part if each == name]
            now[name] = state(bed.start[name], changes, len(before), torn)
        found = bed.open(**now)[0].everything()

        assert [] == session.faults_of_a_kill(found, count), (count, torn)
        assert Bed.STALE not in found
        bed.look(now["image"])


@pytest.mark.parametrize(("cluster_bits", "backed"), [(9, True), (12, False)])
def test_power_lost_anywhere(
    tmp_path: Path, request: pytest.FixtureRequest, cluster_bits: int, *, backed: bool
) -> None:
    """Whatever unflushed writes each medium keeps, flushed data are there, and no table refers to stale data."""
    for turn in range(max(1, request.config.getoption("--requests") // 20_000)):
        bed = Bed(tmp_path, request.config.getoption("--seed") + turn, cluster_bits, backed=backed)
        session, both = bed.session(20)
        for _ in range(40):
            count = bed.chance.randint(0, len(both))
            now = {name: bed.lost(name, both[:count]) for name in ("image", "data")}
            found = bed.open(**now)[0].everything()

            assert [] == session.faults_of_power_loss(found, count - 1), count
            assert Bed.STALE not in found
            bed.look(now["image"])
        figures.add("crash points", 40)


@pytest.mark.parametrize(("cluster_bits", "number"), [(9, errno.EIO), (12, errno.ENOSPC)])
def test_files_that_fail(tmp_path: Path, request: pytest.FixtureRequest, cluster_bits: int, number: int) -> None:
    """If requests to either file fail, only those requests of the guest fail that needed them."""
    bed = Bed(tmp_path, request.config.getoption("--seed"), cluster_bits, backed=True)
    disk, both = bed.open()
    files = [disk.files.files[bed.paths[name]] for name in ("image", "data")]
    for file in files:
        file.fails = lambda _: number if bed.chance.random() < 0.1 else 0
    clock = RecordedFile(bytearray())
    clock.log = both
    session = Session(disk, clock, bytes(bed.first), bed.chance)
    session.run(30, 40)
    assert {0, number} <= {each.status for each in session.writes}
    for file in files:
        file.fails = lambda _: 0

    assert [] == session.faults_of_a_kill(disk.everything(), len(both))
    disk.chain.close()
    found = bed.open(image=files[0].bytes, data=files[1].bytes)[0].everything()
    assert [] == session.faults_of_a_kill(found, len(both))
    assert Bed.STALE not in found
    bed.look(files[0].bytes)
