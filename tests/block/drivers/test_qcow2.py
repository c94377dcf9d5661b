"""qcow2: what it opens and what it refuses, parents, and images that QEMU and we write in turn."""

from __future__ import annotations

import errno
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests import qemu
from tests.helpers_block import Machine, again, content, discard, flush, read, write
from tests.qcow_images import qcow2, with_word
from xenbackend.block.formats.qcow2_check import check
from xenbackend.block.formats.qcow2_tables import COPIED
from xenbackend.block.qcow.level2 import L2Table
from xenbackend.errors import DriverError

SIZE = 1 << 20
CLUSTER = 4096


def make(path: Path, **options: object) -> str:
    """Write an image and return the text of its layer."""
    path.write_bytes(qcow2(SIZE, **options))  # whether or not the test asks for data
    return f"qcow2:{path}"


def test_what_is_reported(machine: Machine, tmp_path: Path) -> None:
    """The reported size, granularity and format are those of the image."""
    chain = machine.open(make(tmp_path / "a"))
    geometry = chain.geometry
    chain.close()

    assert (SIZE, True, CLUSTER) == (geometry.size, geometry.can_discard, geometry.discard_granularity)


@pytest.mark.parametrize(
    ("bits", "sentence"),
    [(1, "out of date .dirty.*qemu-img check -r all"), (2, "corrupt, and can only be opened read-only")],
)
def test_dirty_and_corrupt_images(machine: Machine, tmp_path: Path, bits: int, sentence: str) -> None:
    """An image that is marked dirty or corrupt can be read and not written, and opening it does not change it."""
    text = make(tmp_path / "a", clusters={0: b"x" * CLUSTER}, incompatible=bits)
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(DriverError, match=sentence):
        machine.open(text)

    assert b"x" * CLUSTER == machine.contents(text)[:CLUSTER]
    assert before == (tmp_path / "a").read_bytes()[: len(before)]


def test_features_that_end_by_writing(machine: Machine, tmp_path: Path) -> None:
    """A writer clears auto-clear features before it writes anything. A reader does not."""
    text = make(tmp_path / "a", autoclear=1)
    machine.open(text, read_only=True).close()
    assert 1 == (tmp_path / "a").read_bytes()[95]
    machine.open(text).close()
    assert 0 == (tmp_path / "a").read_bytes()[95]


@pytest.mark.parametrize(
    ("image_format", "layer"), [(b"raw", "aio"), (b"qcow2", "qcow2"), (b"qcow", "qcow"), (b"vpc", "vhd")]
)
def test_formats_of_parents(machine: Machine, tmp_path: Path, image_format: bytes, layer: str) -> None:
    """A parent is opened in the format that the image gives, and special characters in its name are escaped."""
    qemu.qemu_img("create", "-f", image_format.decode(), tmp_path / "ba,se", "1M")
    chain = machine.open(make(tmp_path / "a", backing=b"ba,se", backing_format=image_format))
    texts = [each.text for each in chain.layers]
    chain.close()

    assert rf"{layer}:{tmp_path}/ba\,se" == texts[1].split(",parents")[0].split(",cache")[0]


@pytest.mark.parametrize(
    ("options", "more", "sentence"),
    [
        ({"backing": b"base"}, "", "never guessed; say parent_format="),
        ({"backing": b"base", "backing_format": b"qed"}, "", "format 'qed', which is not one of raw"),
        ({"backing": b"json:{}", "backing_format": b"raw"}, "", "'json:{}' is not a file"),
        ({"backing": b"nbd://host/x", "backing_format": b"raw"}, "", "is not a file"),
        (
            {"backing": b"/etc/passwd", "backing_format": b"raw"},
            "",
            "is named only by the image; if it is the right one, allow it with",
        ),
        (
            {"backing": b"../base", "backing_format": b"raw"},
            "",
            "is named only by the image; if it is the right one, allow it with",
        ),
        (
            {"backing": b"link", "backing_format": b"raw"},
            "",
            "is named only by the image; if it is the right one, allow it with",
        ),
        ({"backing": b"gone", "backing_format": b"raw"}, "", "is not there"),
        ({"backing": b"a", "backing_format": b"qcow2"}, "", "the same file as the image or one of its children"),
    ],
)
def test_parents_that_are_refused(tmp_path: Path, options: dict[str, object], more: str, sentence: str) -> None:
    """A parent without a format, of an unknown one, not a file, or in another place is refused with what to do."""
    directory = tmp_path / "images"
    directory.mkdir()
    (tmp_path / "base").write_bytes(bytes(SIZE))
    (directory / "base").write_bytes(bytes(SIZE))
    (directory / "link").symlink_to("/etc/passwd")
    machine = Machine(parents=[str(directory)])
    with pytest.raises(DriverError, match=sentence):
        machine.open(make(directory / "a", **options) + more)
    machine.close()


def test_parents_elsewhere(machine: Machine, tmp_path: Path) -> None:
    """`parents=` and `parent_format=` allow what an image alone may not ask for."""
    (tmp_path / "images").mkdir()
    (tmp_path / "base").write_bytes(b"p" * SIZE)
    text = make(tmp_path / "images" / "a", backing=b"../base")

    assert b"p" * SIZE == machine.contents(f"{text},parents={tmp_path},parent_format=raw")


def test_eight_parents(machine: Machine, tmp_path: Path) -> None:
    """In a chain of nine images, data of each show through where no image above has any."""
    for number in range(9):
        options = {"backing": b"%d" % (number - 1), "backing_format": b"qcow2"} if number else {}
        make(tmp_path / str(number), clusters={number: bytes([65 + number]) * CLUSTER}, **options)
    found = machine.contents(f"qcow2:{tmp_path}/8")

    assert b"ABCDEFGHI\0" == found[: 10 * CLUSTER : CLUSTER]


@pytest.mark.parametrize("parent_size", [SIZE // 2, 2 * SIZE])
def test_sizes_of_parents(machine: Machine, tmp_path: Path, parent_size: int) -> None:
    """A parent may be smaller than its child, which then reads zeros behind it, or larger."""
    (tmp_path / "base").write_bytes(b"p" * parent_size)
    found = machine.contents(make(tmp_path / "a", backing=b"base", backing_format=b"raw"))

    assert (b"p" * parent_size).ljust(SIZE, b"\0")[:SIZE] == found


def test_where_a_parent_ends(machine: Machine, tmp_path: Path) -> None:
    """Requests inside the cluster in which the parent ends are right before, across and behind its last sector."""
    end = SIZE // 2 + 512
    (tmp_path / "base").write_bytes(b"p" * end)
    chain = machine.open(make(tmp_path / "a", backing=b"base", backing_format=b"raw"))
    requests = [read(end - 512, 512), read(end - 512, 1024), read(end, 512), read(SIZE - CLUSTER, CLUSTER)]
    for _ in range(2):  # the second time the tables are there
        assert [0] * 4 == machine.do(chain, *map(again, requests))
    chain.close()

    assert [b"p" * 512, b"p" * 512 + bytes(512), bytes(512), bytes(CLUSTER)] == list(map(content, requests))


def test_tables_that_are_forgotten_are_gone(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that the cache has dropped free their memory, even without a garbage collection."""
    monkeypatch.setattr("xenbackend.block.qcow.disk.TABLES", 4096)  # two of them
    chain = machine.open(make(tmp_path / "a", cluster_bits=9, table_clusters=16))
    gc.collect()  # remains of earlier tests
    gc.disable()
    try:
        for place in range(0, SIZE, 32 << 10):  # the range of one table
            assert [0, 0] == machine.do(chain, write(place, b"w" * 512), read(place + 512, 512))
        tables = [each for each in gc.get_objects() if type(each) is L2Table]  # and no proxies
    finally:
        gc.enable()
    chain.close()

    assert len(tables) <= 4


def test_zeros_hide_the_parent(machine: Machine, tmp_path: Path) -> None:
    """A cluster of zeros hides the parent's data, and so does a discarded cluster."""
    (tmp_path / "base").write_bytes(b"p" * SIZE)
    text = make(
        tmp_path / "a",
        backing=b"base",
        backing_format=b"raw",
        zeros=[1],
        clusters={3: b"x" * CLUSTER, 4: b"y" * CLUSTER},
    )
    chain = machine.open(text)
    assert [0] == machine.do(chain, discard(2 * CLUSTER, 2 * CLUSTER + 512))
    chain.close()
    found = machine.contents(text)

    assert b"p\0p\0yp" == found[: 6 * CLUSTER : CLUSTER]


def test_no_discard_in_version_2_with_a_parent(machine: Machine, tmp_path: Path) -> None:
    """An image of version 2 with a parent offers no discard, because it cannot mark a cluster as zeros."""
    (tmp_path / "base").write_bytes(bytes(SIZE))
    chain = machine.open(make(tmp_path / "a", backing=b"base", backing_format=b"raw", version=2))
    assert not chain.geometry.can_discard
    assert [errno.EOPNOTSUPP] == machine.do(chain, discard(0, SIZE))
    chain.close()


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_clusters(machine: Machine, tmp_path: Path, compression: str) -> None:
    """A compressed cluster can be read in pieces, concurrently, and be written in part; the rest of it is kept."""
    data = Random(1).randbytes(2048) + bytes(2048)
    chain = machine.open(make(tmp_path / "a", compressed={3: data, 4: data[::-1]}, compression=compression))
    requests = [read(3 * CLUSTER + place, 512) for place in range(0, CLUSTER, 512)]
    assert [0] * 8 == machine.do(chain, *requests)
    assert data == b"".join(map(content, requests))
    assert [0, 0] == machine.do(chain, write(3 * CLUSTER + 512, b"w" * 512), flush())
    request = read(3 * CLUSTER, 2 * CLUSTER)
    assert [0] == machine.do(chain, request)
    chain.close()

    assert data[:512] + b"w" * 512 + data[1024:] + data[::-1] == content(request)
    assert (0, 0) == qemu.check(tmp_path / "a")


def test_a_compressed_cluster_is_discarded(machine: Machine, tmp_path: Path) -> None:
    """A discard of one compressed cluster frees it and nothing else, even if its table is already loaded."""
    data = Random(1).randbytes(64) + bytes(CLUSTER - 64)
    text = make(tmp_path / "a", compressed={0: data, 3: data})
    chain = machine.open(text)
    request = read(0, CLUSTER)
    assert [0] == machine.do(chain, request)
    assert [0, 0] == machine.do(chain, discard(0, CLUSTER), flush())
    chain.close()

    assert bytes(3 * CLUSTER) + data == machine.contents(text)[: 4 * CLUSTER]
    assert (0, 0) == qemu.check(tmp_path / "a")


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_a_compressed_cluster_that_is_damaged(machine: Machine, tmp_path: Path, compression: str) -> None:
    """A compressed cluster that cannot be inflated gives EIO to those who read it, and to nobody else."""
    path = tmp_path / "a"
    text = make(path, compressed={3: b"x" * CLUSTER}, clusters={0: b"y" * CLUSTER}, compression=compression)
    data = path.read_bytes()
    packed = data.index(b"y" * CLUSTER) + CLUSTER
    path.write_bytes(data[:packed] + b"\xff" * 64 + data[packed + 64 :])
    chain = machine.open(text)

    assert [0, errno.EIO, 0] == machine.do(chain, read(0, 512), read(3 * CLUSTER, 512), read(4 * CLUSTER, 512))
    chain.close()


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (0, lambda word: word | 2),
        (0, lambda word: word | 1 << 56),
        (0, lambda _word: COPIED),
        (1, lambda _word: 2),
        (1, lambda _word: 0x3F << 56),
        (1, lambda _word: COPIED | 1 << 60),
        (1, lambda _word: 3),
        (3, lambda word: word | COPIED),
    ],
)
def test_words_that_qemu_reads(machine: Machine, tmp_path: Path, index: int, change: Callable[[int], int]) -> None:
    """Reserved bits, and flags that mean nothing where they are, have the effect that they have in QEMU."""
    path, raw = tmp_path / "a", tmp_path / "raw"
    image = qcow2(SIZE, {0: b"a" * CLUSTER, 2: b"c" * CLUSTER}, compressed={3: b"z" * CLUSTER})
    path.write_bytes(with_word(image, 2, change, index))
    qemu.qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)

    assert raw.read_bytes() == machine.contents(f"qcow2:{path}")
    found = check(lambda offset, length: path.read_bytes()[offset : offset + length], path.stat().st_size)
    assert (found.errors > 0) == (qemu.check(path)[0] > 0)


def test_an_l1_entry_without_a_place(machine: Machine, tmp_path: Path) -> None:
    """A table that is at offset 0 and marked as writable is not written over the header."""
    path = tmp_path / "a"
    path.write_bytes(with_word(qcow2(SIZE), 1, lambda _word: COPIED))
    before = path.read_bytes()[:CLUSTER]
    chain = machine.open(f"qcow2:{path}")
    assert [0, 0] == machine.do(chain, write(0, b"w" * CLUSTER), flush())
    chain.close()

    assert before == path.read_bytes()[:CLUSTER]
    assert b"w" * CLUSTER + bytes(SIZE - CLUSTER) == machine.contents(f"qcow2:{path}")
    assert (0, 0) == qemu.check(path)


def test_zstd_that_the_host_does_not_have(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the host has no decompressor for zstd, the image is refused and not changed, and the error says what to do."""
    text = make(tmp_path / "a", compression="zstd", autoclear=1)
    before = (tmp_path / "a").read_bytes()
    for module in ("zstandard", "compression"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DriverError, match="install python3-zstandard, or zstandard with pip"):
        machine.open(text)

    assert before == (tmp_path / "a").read_bytes()[: len(before)]


@pytest.mark.slow
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_zstd_both_ways(machine: Machine, tmp_path: Path, request: pytest.FixtureRequest, cluster_size: int) -> None:
    """Clusters that QEMU compressed by zstd are read. After we have overwritten some, QEMU finds no fault."""
    chance = Random(request.config.getoption("--seed") + cluster_size)
    raw, path = tmp_path / "raw", tmp_path / "a"
    model = bytearray(b"".join(chance.randbytes(64) * chance.choice([1, 8]) for _ in range(4 * SIZE // 256)))
    model = model[: 2 * SIZE].ljust(2 * SIZE, b"\0")
    raw.write_bytes(model)
    options = f"compression_type=zstd,cluster_size={cluster_size}"
    qemu.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)

    assert bytes(model) == machine.contents(f"qcow2:{path}")
    random_guest(machine, f"qcow2:{path}", model, chance, request.config.getoption("--requests") // 200)
    raw.write_bytes(model)
    qemu.qemu_img("compare", "-f", "qcow2", "-F", "raw", path, raw)
    assert (0, 0) == qemu.check(path)


def test_a_snapshot_stays(machine: Machine, tmp_path: Path) -> None:
    """Writes after a snapshot do not change the snapshot."""
    path = tmp_path / "a"
    qemu.qemu_img("create", "-f", "qcow2", path, "1M")
    qemu.qemu_io(path, "qcow2", "write -P 1 0 256k")
    qemu.qemu_img("snapshot", "-c", "before", path)
    chain = machine.open(f"qcow2:{path}")
    assert [0, 0, 0] == machine.do(chain, write(4096, b"n" * 4096), write(SIZE - 512, b"n" * 512), flush())
    chain.close()

    assert (0, 0) == qemu.check(path)
    qemu.qemu_img("convert", "-f", "qcow2", "-O", "raw", "-l", "before", path, tmp_path / "before")
    assert (b"\1" * (256 << 10)).ljust(SIZE, b"\0") == (tmp_path / "before").read_bytes()


@pytest.mark.parametrize("cluster_size", ["64k", "2M"])
def test_two_tebibytes(machine: Machine, tmp_path: Path, cluster_size: str) -> None:
    """A disk of 2 TiB is opened at once, can be written at both ends, and is read by QEMU."""
    path, size = tmp_path / "a", 2 << 40
    qemu.qemu_img("create", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", path, str(size))
    chain = machine.open(f"qcow2:{path}")
    assert [0, 0, 0] == machine.do(
        chain, write(0, b"a" * 512), write(size - 512, b"z" * 512), discard(1 << 40, 1 << 39)
    )
    chain.close()

    assert (0, 0) == qemu.check(path)
    qemu.qemu_io(path, "qcow2", "read -P 97 0 512", f"read -P 122 {size - 512} 512", "read -P 0 1T 64k")


def test_an_image_that_is_not_whole_sectors(machine: Machine, tmp_path: Path) -> None:
    """New images of qemu-img end inside a sector. A reader leaves their length as it is, and a writer extends them."""
    path = tmp_path / "a"
    qemu.qemu_img("create", "-f", "qcow2", path, "1G")
    size = path.stat().st_size
    assert size % 512
    machine.open(f"qcow2:{path}", read_only=True).close()
    assert size == path.stat().st_size
    machine.open(f"qcow2:{path}").close()
    assert 0 == path.stat().st_size % 65536
    assert (0, 0) == qemu.check(path)


def random_guest(machine: Machine, text: str, model: bytearray, chance: Random, requests: int) -> None:
    """Send random requests to a disk and to its model, many at a time."""
    chain = machine.open(text)
    while requests > 0:
        batch, used = [], bytearray(len(model) >> 9)
        for _ in range(chance.randint(1, 16)):
            length = chance.choice([1, 8, chance.randint(1, 200)]) << 9
            offset = chance.randrange(0, (len(model) - length >> 9) + 1) << 9
            if any(used[offset >> 9 : offset + length >> 9]):
                continue
            used[offset >> 9 : offset + length >> 9] = b"\1" * (length >> 9)
            batch.append(write(offset, chance.randbytes(length)) if chance.random() < 0.6 else read(offset, length))
        expected = [bytes(model[each.offset : each.offset + each.length]) for each in batch]
        assert [0] * (len(batch) + 1) == machine.do(chain, *batch, flush())
        for request, data in zip(batch, expected, strict=True):
            if request.op:
                model[request.offset : request.offset + request.length] = content(request)
            else:
                assert data == content(request), request
        requests -= len(batch)
    chain.close()


@pytest.mark.slow
@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_both_ways(machine: Machine, tmp_path: Path, request: pytest.FixtureRequest, cluster_bits: int) -> None:
    """Whatever QEMU and we write in turn, both read it and qemu-img finds no fault, with all sizes of tables."""
    chance = Random(request.config.getoption("--seed") + cluster_bits)
    order = cluster_bits % 7
    base, path, raw = tmp_path / "base", tmp_path / "a", tmp_path / "raw"
    base.write_bytes(chance.randbytes(SIZE))
    model = bytearray(base.read_bytes()).ljust(2 * SIZE, b"\0")
    options = f"cluster_size={1 << cluster_bits},refcount_bits={1 << order}"
    qemu.qemu_img("create", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", path, str(len(model)))
    for turn in range(2):
        offset = chance.randrange(len(model) - 100_000 >> 9) << 9
        qemu.qemu_io(path, "qcow2", f"write -P {turn + 1} {offset} 99840", "write -z 1M 4k")
        model[offset : offset + 99840] = bytes([turn + 1]) * 99840
        model[SIZE : SIZE + 4096] = bytes(4096)
        random_guest(machine, f"qcow2:{path}", model, chance, request.config.getoption("--requests") // 200)
        raw.write_bytes(model)

        qemu.qemu_img("compare", "-f", "qcow2", "-F", "raw", path, raw)
        assert (0, 0) == qemu.check(path)
