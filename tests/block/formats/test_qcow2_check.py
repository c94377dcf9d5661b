"""The check of QCOW2 images finds what qemu-img finds, and reports it in sentences."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random

import pytest

from tests import qemu
from tests.qcow_images import qcow2
from xenbackend.block.formats.qcow2 import parse_header
from xenbackend.block.formats.qcow2_check import MAX_SENTENCES, Check, Report, check
from xenbackend.block.formats.qcow2_repair import plan_repair
from xenbackend.errors import DriverError

SIZE = 1 << 20
CLUSTERS = {0: b"a" * 4096, 7: b"b" * 4096, 100: b"c" * 4096}


def checked(data: bytes) -> Report:
    """Return the report for an image."""
    return check(lambda offset, length: data[offset : offset + length], len(data))


def places(data: bytes) -> dict[str, int]:
    """Return the offsets of the refcount table, the first refcount block, L1 and the first L2 table."""
    header = parse_header(lambda offset, length: data[offset : offset + length], len(data))
    (block,) = struct.unpack_from(">Q", data, header.refcount_table.offset)
    (l2,) = struct.unpack_from(">Q", data, header.l1.offset)
    return {"table": header.refcount_table.offset, "block": block, "l1": header.l1.offset, "l2": l2 & (1 << 56) - 512}


def with_word(data: bytes, offset: int, word: int, size: int = 8) -> bytes:
    """Return an image with another number at an offset."""
    changed = bytearray(data)
    changed[offset : offset + size] = word.to_bytes(size, "big")
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
def test_good_images(tmp_path: Path, cluster_bits: int, order: int) -> None:
    """An image with data, zeros and compressed clusters is sound, with refcounts of every width."""
    size = 1 << cluster_bits
    data = qcow2(
        64 * size, {1: b"x" * size}, cluster_bits=cluster_bits, order=order, zeros=[5], compressed={9: b"y" * size}
    )
    (tmp_path / "image").write_bytes(data)
    report = checked(data)

    assert (0, 0, []) == (report.errors, report.leaks, report.sentences)
    assert (0, 0) == qemu.check(tmp_path / "image")


@pytest.mark.slow
def test_good_snapshots_and_bitmaps(tmp_path: Path) -> None:
    """Clusters that a snapshot or a bitmap of qemu-img uses count neither as leaked nor as shared."""
    path = tmp_path / "image"
    qemu.qemu_img("create", "-f", "qcow2", path, "4M")
    qemu.qemu_io(path, "qcow2", "write -P 1 0 1M", "write -c -P 2 2M 64k")
    qemu.qemu_img("snapshot", "-c", "before", path)
    qemu.qemu_io(path, "qcow2", "write -P 3 0 100k", "write -z 1M 64k")
    qemu.qemu_img("bitmap", "--add", path, "changes")
    qemu.qemu_io(path, "qcow2", "write -P 4 300k 100k")
    report = checked(path.read_bytes())

    assert (0, 0, []) == (report.errors, report.leaks, report.sentences)


def test_a_leak() -> None:
    """A refcount without a user is a leak, but no error."""
    data = qcow2(SIZE, CLUSTERS)
    report = checked(with_word(data, places(data)["l2"] + 7 * 8, 0))

    assert (1, 0) == (report.leaks, report.errors)
    assert "is leaked: its refcount is 1, but it has 0 references" in report.sentences[0]


def test_a_refcount_that_is_too_low() -> None:
    """A cluster in use whose refcount is 0 is an error."""
    data = qcow2(SIZE, CLUSTERS)
    report = checked(with_word(data, places(data)["block"] + 2 * 5, 0, size=2))

    assert (0, 1, ["cluster 5 has refcount 0, but 1 references"]) == (
        report.leaks,
        report.low_refcounts,
        report.sentences,
    )


@pytest.mark.parametrize(
    ("where", "index", "word", "sentence"),
    [
        ("l1", 0, 1 << 40, "an L2 table at byte 1099511627776 is outside the file"),
        ("l1", 0, 4097, "an entry of its L1 table is 0x1001"),
        ("l2", 3, 1 << 40, "a cluster, 4096 bytes at byte 1099511627776, is outside the file"),
        ("l2", 3, 3, "an entry of its L2 tables is 0x3"),
        ("l2", 3, 1 << 62 | 1 << 40, "a compressed cluster, 512 bytes at byte 1099511627776, is outside the file"),
        ("l2", 3, 4096 | 1 << 63, "cluster 1 holds metadata, but something else uses it too"),
        ("table", 1, 1 << 40, "refcount block 1 at byte 1099511627776 is outside the file"),
        ("table", 1, 7, "an entry of its refcount table is 0x7"),
        ("table", 1, 4096, "cluster 1 holds metadata, but something else uses it too"),
    ],
)
def test_broken_tables(where: str, index: int, word: int, sentence: str) -> None:
    """Each kind of entry that is impossible, or leads into other metadata, is found and named."""
    data = qcow2(SIZE, CLUSTERS)
    report = checked(with_word(data, places(data)[where] + 8 * index, word))

    assert report.broken
    assert any(sentence in each for each in report.sentences), report.sentences


def test_a_bitmap_that_leads_outside() -> None:
    """A bitmap's cluster outside of the file is reported as such, not as metadata that something else uses."""
    for place in (len(qcow2(SIZE, CLUSTERS)), 1 << 40):
        extension = struct.pack(">IIIIQQ", 0x23852875, 24, 1, 0, 32, len(qcow2(SIZE, CLUSTERS)))
        data = qcow2(SIZE, CLUSTERS, extensions=extension, autoclear=1)
        directory = struct.pack(">QIIBBHI", len(data) + 4096, 1, 0, 1, 16, 4, 0) + b"name"
        table = struct.pack(">Q", place + 2 * 4096)
        report = checked(data + directory.ljust(4096, b"\0") + table.ljust(4096, b"\0"))
        told = [each for each in report.sentences if "has refcount 0, but 1 references" not in each]

        assert [f"a bitmap, 4096 bytes at byte {place + 2 * 4096}, is outside the file"] == told
        assert 1 == report.broken


@pytest.mark.parametrize(
    ("index", "word", "sentence"),
    [
        (1, 4096 | 1 << 63, ""),
        (1, 1, ""),
        (1, 1 << 63, "the cluster at byte 4096 of the disk is at byte 0 of the data file"),
        (1, 8192 | 1 << 63, "the cluster at byte 4096 of the disk is at byte 8192 of the data file"),
        (1, 8192 | 1, "the cluster at byte 4096 of the disk is at byte 8192 of the data file"),
        (1, 1 << 62 | 4096, "the cluster at byte 4096 of the disk is compressed, but belongs in the data file"),
        (1, 4096 | 1 << 63 | 2, "an entry of its L2 tables is 0x8000000000001002"),
    ],
)
def test_places_in_a_data_file(index: int, word: int, sentence: str) -> None:
    """Clusters in an external data file are not counted, and must be at their disk's offsets."""
    data = qcow2(SIZE, CLUSTERS, data_name=b"data")
    report = checked(with_word(data, places(data)["l2"] + 8 * index, word))

    assert (bool(sentence), bool(sentence), 0) == (bool(report.sentences), bool(report.errors), report.leaks)
    assert all(sentence in each for each in report.sentences)


def test_a_flag_that_all_clusters_of_a_data_file_have(tmp_path: Path) -> None:
    """A cluster of an external data file without the COPIED flag is an error, as in qemu-img, and can be repaired."""
    (tmp_path / "data").write_bytes(bytes(SIZE))
    data = qcow2(SIZE, CLUSTERS, data_name=bytes(tmp_path / "data"))
    data = with_word(data, places(data)["l2"] + 7 * 8, 7 * 4096)
    (tmp_path / "image").write_bytes(data)
    found = Check(lambda offset, length: data[offset : offset + length], len(data))

    assert 1 == found.run().wrong_flags
    assert (1, 0) == qemu.check(tmp_path / "image")
    with (tmp_path / "image").open("r+b") as file:
        for offset, sector in (each for writes in plan_repair(found) for each in writes):
            file.seek(offset)
            file.write(sector)
    assert 0 == checked((tmp_path / "image").read_bytes()).errors
    assert (0, 0) == qemu.check(tmp_path / "image")


def test_two_users_of_one_cluster() -> None:
    """Two entries with the same cluster are found, and so are their flags, which say that it has one user."""
    data = qcow2(SIZE, CLUSTERS)
    l2 = places(data)["l2"]
    (word,) = struct.unpack_from(">Q", data, l2)
    report = checked(with_word(data, l2 + 8, word))

    assert (1, 2) == (report.low_refcounts, report.wrong_flags)


def test_what_the_image_says_of_itself() -> None:
    """The bits for dirty and corrupt are reported."""
    assert (True, False) == (checked(qcow2(SIZE, incompatible=1)).is_dirty, checked(qcow2(SIZE)).is_dirty)
    assert checked(qcow2(SIZE, incompatible=2)).is_corrupt


def test_sentences_are_bounded() -> None:
    """The number of sentences is limited however much is wrong, but the totals count everything."""
    data = qcow2(SIZE, dict.fromkeys(range(200), b"x" * 4096))
    report = checked(with_word(data, places(data)["table"], 0))

    assert MAX_SENTENCES == len(report.sentences)
    assert report.low_refcounts >= 200


def test_no_image() -> None:
    """A file that is not an image is refused as when it is opened."""
    with pytest.raises(DriverError, match="not a QCOW2 image"):
        checked(bytes(8192))


def damage(chance: Random, data: bytes) -> bytes:
    """Return an image with a random fault in one of its tables."""
    at = places(data)
    clusters = len(data) // 4096
    if chance.random() < 0.4:
        return with_word(data, at["block"] + 2 * chance.randrange(clusters), chance.choice([0, 1]), size=2)
    place = chance.choice([at["l2"] + 8 * chance.randrange(512), at["l1"], at["table"]])
    cluster = chance.randrange(1, clusters) * 4096
    return with_word(data, place, chance.choice([0, cluster, cluster | 1 << 63, chance.getrandbits(62)]))


@pytest.mark.slow
def test_agrees_with_qemu(tmp_path: Path) -> None:
    """On images with a random fault, qemu-img and we agree whether there is an error and how much is leaked."""
    chance = Random(7)
    good = qcow2(SIZE, {number: bytes([number]) * 4096 for number in range(0, 250, 5)})
    path = tmp_path / "image"
    for _ in range(60):
        data = damage(chance, good)
        path.write_bytes(data)
        report = checked(data)
        errors, leaks = qemu.check(path)

        assert (errors > 0) == (report.errors > 0), report.sentences
        assert report.broken or leaks == report.leaks, report.sentences
