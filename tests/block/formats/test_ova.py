"""Archives and the descriptions in them."""

from __future__ import annotations

import tarfile
from random import Random

import pytest

from tests.foreign_images import archive, ovf
from tests.fuzzing import endure
from xenbackend.block.formats import ova
from xenbackend.block.formats.ova import Described, Member, described_disks, find_disk, is_archive, members
from xenbackend.errors import DriverError

DISK = b"d" * 1000
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def found(data: bytes, wanted: str = "") -> bytes:
    """Return the bytes of the disk in a file."""
    member = find_disk(lambda place, length: data[place : place + length], len(data), wanted)
    return data[member.offset : member.offset + member.length]


def patched(data: bytes, place: int, value: bytes, header: int = 0) -> bytes:
    """Return an archive with other bytes in a header, and its checksum corrected."""
    changed = bytearray(data)
    changed[header + place : header + place + len(value)] = value
    changed[header + 148 : header + 156] = b" " * 8
    total = sum(changed[header : header + 512])
    changed[header + 148 : header + 156] = b"%06o\0 " % total
    return bytes(changed)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["disk.vmdk", "e" * 90 + "/" + "f" * 90 + ".vmdk", "ü.vmdk"])
def test_a_disk_is_a_place_and_a_length(kind: str, name: str) -> None:
    """The disk is found in each kind of tar archive, also if its name is long."""
    data = archive([("a.ovf", ovf(name)), ("other", b"x" * 700), (name, DISK)], tar_format=FORMATS[kind])

    assert is_archive(data[:512])
    assert DISK == found(data)


def test_a_size_to_the_base_256() -> None:
    """A size that is too large for octal digits is given in base 256."""
    data = archive([("a.ovf", ovf("b")), ("b", DISK)])
    place = data.index(b"b\0\0\0\0", 512)
    data = patched(data, 124, b"\x80" + (1000).to_bytes(11, "big"), place)

    assert DISK == found(data)


def test_a_pax_header_gives_size_and_name() -> None:
    """The size in a pax header counts, not the one in the member's own header."""
    record = b"13 size=1000\n"
    pax = patched(archive([("p", record)]), 156, b"x")[:1024]
    before = archive([("a.ovf", ovf("b"))])
    before = before[: len(before.rstrip(b"\0")) + 511 & ~511]
    data = before + pax + patched(archive([("b", DISK)]), 124, b"%011o" % 8)

    assert DISK == found(data)


@pytest.mark.parametrize(
    ("records", "name"),
    [
        (b"9 path=q\n", "q"),
        (b"22 mtime=1700000000.5\n9 path=q\n", "q"),
        (b"9 path=q\n99 path=r\n", "q"),
        (b"9 path=q\n0 path=r\n", "q"),
        (b"9 path=q\n6 path=r\n", "q"),
        (b"path=q\n", "p"),
    ],
    ids=["a name", "behind another key", "before the end", "no length", "shorter than itself", "no record"],
)
def test_records_of_a_pax_header(records: bytes, name: str) -> None:
    """Records with other keys are skipped. A record that is longer than the header, or than itself, ends the list."""
    data = patched(archive([("x", records)]), 156, b"x")[:1024] + archive([("p", DISK)])

    assert [Member(name, 1536, 1000)] == list(members(lambda place, length: data[place : place + length], len(data)))


def test_links_and_directories_have_no_bytes() -> None:
    """A link has no content, whatever size its header gives: the next header follows directly."""
    link = patched(patched(archive([("l", b"")]), 156, b"1"), 124, b"%011o" % 5000)[:512]
    data = link + archive([("a.ovf", ovf("b")), ("b", DISK)])

    assert DISK == found(data)


def test_several_disks_are_named() -> None:
    """If there are several disks, one has to be chosen, and the error lists all of them."""
    data = archive([("a.ovf", ovf("1.vmdk", "2.vmdk")), ("1.vmdk", DISK), ("2.vmdk", b"two")])

    assert b"two" == found(data, "2.vmdk")
    with pytest.raises(DriverError, match=r"it has 2 disks; choose one with disk=NAME: 1.vmdk, 2.vmdk"):
        found(data)
    with pytest.raises(DriverError, match=r"it has no disk 3; its disks are 1.vmdk, 2.vmdk"):
        found(data, "3")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (archive([("readme", b"x")]), "a tar archive, but not an OVA"),
        (archive([("a.ovf", ovf())]), "names no disk"),
        (archive([("a.ovf", b"<a")]), "description cannot be read"),
        (archive([("a.ovf", ovf("d", prefix="<!DOCTYPE x [<!ENTITY a 'b'>]>"))]), "a document type"),
        (archive([("a.ovf", ovf("gone"))]), "disk gone, which is not in the archive"),
        (archive([("a.ovf", ovf("b", more='ovf:compression="gzip"')), ("b", DISK)]), "disk b is compressed by gzip"),
        (archive([("a.ovf", ovf("b", more='ovf:chunkSize="9"')), ("b", DISK)]), "disk b is in several chunks"),
        (archive([("a.ovf", ovf("b")), ("b", DISK)])[:2048], "but the file ends earlier"),
        (patched(archive([("a.ovf", ovf("b"))]), 124, b"77777777777"), "but the file ends earlier"),
        (patched(archive([("a.ovf", ovf("b"))]), 124, b"\x80" + b"\xff" * 11), "but the file ends earlier"),
        (patched(archive([("a.ovf", ovf("b"))]), 124, b"\xff" * 12), "but the file ends earlier"),
        (patched(archive([("a.ovf", ovf("b"))]), 124, b"0000x"), "a size that is not a number"),
        (patched(archive([("a.ovf", ovf("b"))]), 156, b"S"), "as a sparse member"),
        (patched(archive([("p", bytes(70 << 10))]), 156, b"x"), "a header at byte 0 of the archive has 71680 bytes"),
        (patched(archive([("p", b"a" * 5000)]), 156, b"L"), "a name of 5000 bytes"),
        (patched(archive([("p", b"19 GNU.sparse.a=bc\n")]), 156, b"x"), "is sparse"),
        (patched(archive([("p", b"11 size=-1\n")]), 156, b"x")[:1024] + archive([("b", DISK)]), "has -1 bytes"),
        (b"x" + archive([("a.ovf", ovf("b"))])[1:], "wrong checksum"),
    ],
)
def test_what_is_refused(data: bytes, sentence: str) -> None:
    """Each fault is reported with a name, before anything of a claimed length is read."""
    with pytest.raises(DriverError, match=sentence):
        found(data)


def test_an_archive_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of members that are looked at is limited."""
    monkeypatch.setattr(ova, "MAX_MEMBERS", 3)
    data = archive([(str(each), b"") for each in range(4)])
    with pytest.raises(DriverError, match="more than 3 members"):
        list(members(lambda place, length: data[place : place + length], len(data)))


def test_a_description_that_is_too_long() -> None:
    """A description of more than 4 MiB is refused before it is read."""
    data = archive([("a.ovf", bytes((4 << 20) + 1))])

    def read(place: int, length: int) -> bytes:
        assert length == 512, "the description was read"
        return data[place : place + length]

    with pytest.raises(DriverError, match=r"its description a\.ovf has 4194305 bytes"):
        find_disk(read, len(data), "")


def test_members_are_not_read() -> None:
    """Only the headers of members are read."""
    data = archive([("a", bytes(5 << 20)), ("b", b"x")])
    asked = []

    def read(place: int, length: int) -> bytes:
        asked.append(length)
        return data[place : place + length]

    assert [Member("a", 512, 5 << 20), Member("b", (5 << 20) + 1024, 1)] == list(members(read, len(data)))
    assert {512} == set(asked)


def test_a_description() -> None:
    """Disks are the files that the disk section refers to, in its order, each once. "identity" means no compression."""
    text = ovf("b", "c", more='ovf:compression="identity"').replace(b'fileRef="f1"', b'fileRef="f0"')

    assert [Described("b", "", is_chunked=False)] == described_disks(text)


@pytest.mark.parametrize("data", [b"", bytes(512), b"0" * 512, archive([("a", b"")])[:500]])
def test_what_is_no_archive(data: bytes) -> None:
    """A file that does not begin with a tar header is not an archive."""
    assert not is_archive(data)


@pytest.mark.slow
def test_any_bytes_are_an_archive_or_a_sentence(request: pytest.FixtureRequest) -> None:
    """R19: any bytes in headers and descriptions are accepted or raise DriverError, quickly and in little memory."""
    chance = Random(request.config.getoption("--seed"))
    long = "e" * 90 + "/" + "f" * 90
    good = archive([("a.ovf", ovf("1", long)), ("1", DISK), (long, DISK)], tar_format=tarfile.PAX_FORMAT)
    headers = [place for place in range(0, len(good), 512) if good[place + 257 : place + 262] == b"ustar"]

    def damaged() -> bytes:
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(data.rstrip(b"\0")))
            data[place] = chance.choice([0, 0x80, 0xFF, ord("7"), ord("x"), chance.randrange(256)])
        for header in headers:  # so that damage inside of them is not hidden by a wrong checksum
            data[:] = patched(bytes(data), 0, b"", header) if chance.random() < 0.9 else data
        return bytes(data)

    assert 0 < endure(request.config.getoption("--requests") // 100, damaged, found)
