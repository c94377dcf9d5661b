"""The log of VHDX images, with entries that tests/foreign_images.py writes: what is replayed, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import pytest

from tests.foreign_images import MIB, vhdx, vhdx_entry, vhdx_ring
from tests.fuzzing import endure
from xenbackend.block.formats import vhdx_log
from xenbackend.block.formats.crc32c import crc32c
from xenbackend.block.formats.vhdx import parse
from xenbackend.block.formats.vhdx_log import Replay
from xenbackend.errors import DriverError

LOG, OTHER = b"identity of log1", b"identity of log2"
FILE = bytes(8 * MIB)  # with a log at its end
PLACE = 7 * MIB
SECTOR = 4096


def sector(name: str) -> bytes:
    """Return a sector that has this text at both of its ends."""
    return name.encode().ljust(SECTOR - 8, b".") + name.encode().rjust(8)


def replayed(entries: Mapping[int, bytes], *, length: int = MIB, file_size: int = len(FILE)) -> Replay:
    """Return what a log with these entries changes."""
    ring = vhdx_ring(entries, length)
    return vhdx_log.replay(lambda _place, count: ring[:count], file_size, LOG, file_size - length, length)


def at(replay: Replay, place: int, length: int = 4) -> bytes:
    """Return the file's bytes at a place after the changes. The file is full of `-`."""
    return replay.changes.reader(lambda _offset, count: b"-" * count, len(FILE))(place, length)


def entry(sequence: int, tail: int, name: str, place: int = MIB, **more: int) -> bytes:
    """Return an entry of two sectors, which changes one sector."""
    return vhdx_entry(LOG, sequence, tail, [(place, sector(name))], **more)


def test_changes_of_all_kinds() -> None:
    """A data descriptor restores the bytes of a sector, and a zero descriptor sets its range to zeros."""
    changes = [(MIB, sector("one")), (2 * MIB, 64 << 10), (3 * MIB, sector("two"))]
    found = replayed({0: vhdx_entry(LOG, 1 << 40, 0, changes)})

    assert [sector("one"), b"-"] == [at(found, MIB, SECTOR), at(found, MIB + SECTOR, 1)]
    assert [b"-", bytes(64 << 10), b"-"] == [
        at(found, 2 * MIB - 1, 1), at(found, 2 * MIB, 64 << 10), at(found, 2 * MIB + (64 << 10), 1)
    ]  # fmt: skip
    assert sector("two") == at(found, 3 * MIB, SECTOR)


@pytest.mark.parametrize("count", [0, 126, 127, 253, 254, 255])
def test_how_many_descriptors(count: int) -> None:
    """Data sectors follow the descriptors: 126 descriptors fit into the first sector, 128 into each further one."""
    changes = [(MIB + number * SECTOR, sector(f"{number:4}")) for number in range(count)]
    found = replayed(
        {0: vhdx_entry(LOG, 1, 0, changes), max(8, 2 * count) * SECTOR: b"not a part of it"}, length=4 * MIB
    )

    assert [f"{number:4}".encode() for number in range(count)] == [at(found, place) for place, _ in changes]


def test_the_order() -> None:
    """Later entries, and later descriptors of an entry, overwrite the changes of earlier ones."""
    first = vhdx_entry(LOG, 5, 0, [(MIB, sector("old ")), (2 * MIB, 2 * SECTOR), (2 * MIB, sector("data"))])
    second = vhdx_entry(LOG, 6, 0, [(MIB, sector("new ")), (3 * MIB, sector("gone")), (3 * MIB, SECTOR)])
    found = replayed({0: first, len(first): second})

    assert [b"new ", b"data", bytes(4)] == [at(found, place * MIB) for place in (1, 2, 3)]
    assert (bytes(4), 2) == (at(found, 2 * MIB + SECTOR), found.entries)


def test_what_is_in_its_place_is_not_replayed() -> None:
    """Entries before the one that the newest entry names as the oldest are not replayed."""
    found = replayed({0: entry(1, 0, "one"), 8192: entry(2, 8192, "two", 2 * MIB), 16384: entry(3, 8192, "3", 3 * MIB)})

    assert (b"----", b"two.", b"3...", 2) == (at(found, MIB), at(found, 2 * MIB), at(found, 3 * MIB), found.entries)


@pytest.mark.parametrize("place", [MIB - 16384, MIB - 12288, MIB - 8192, MIB - 4096])
def test_the_log_is_a_ring(place: int) -> None:
    """The log is a ring: sequences and entries continue at its beginning."""
    places = [(place + number * 8192) % MIB for number in range(4)]
    entries = {each: entry(7 + number, place, f"{number}...", (1 + number) * MIB) for number, each in enumerate(places)}
    found = replayed(entries)

    assert [b"0...", b"1...", b"2...", b"3..."] == [at(found, number * MIB) for number in range(1, 5)]


def test_a_log_full_to_its_last_sector() -> None:
    """A sequence may fill the whole log, wherever it begins."""
    count = MIB // 8192
    for shift in (0, 4096):
        places = [(shift + number * 8192) % MIB for number in range(count)]
        found = replayed({each: entry(1 + number, shift, f"{number:4}") for number, each in enumerate(places)})

        assert (f"{count - 1:4}".encode(), count) == (at(found, MIB), found.entries)


def test_entries_of_another_log_do_not_count() -> None:
    """Entries of an earlier use of the log are ignored, whatever their number."""
    stale = vhdx_entry(OTHER, 2, 0, [(MIB, sector("bad "))])
    newer = vhdx_entry(OTHER, 99, 40960, [(MIB, sector("bad "))])
    found = replayed({0: entry(1, 0, "good"), 8192: stale, 40960: newer})

    assert (b"good", 1) == (at(found, MIB), found.entries)


@pytest.mark.parametrize("places", [(0, 40960), (40960, 0)])
def test_the_newest_sequence_counts(places: tuple[int, int]) -> None:
    """Of two complete sequences only the one with the higher number is replayed, wherever they are."""
    old, new = places
    entries = {old: entry(3, old, "old1"), old + 8192: entry(4, old, "old2", 2 * MIB)}
    found = replayed({**entries, new: entry(9, new, "new ")})

    assert (b"new ", b"----") == (at(found, MIB), at(found, 2 * MIB))


@pytest.mark.parametrize("number", [1, 3, 4, 1 << 63])
def test_a_number_that_does_not_follow_ends_the_sequence(number: int) -> None:
    """The next entry must have the next number. Otherwise it belongs to an earlier round, or to no sequence."""
    found = replayed({0: entry(5, 0, "five"), 8192: vhdx_entry(LOG, number, 40960, [(MIB, sector("bad "))])})

    assert b"five" == at(found, MIB)


def test_a_sequence_whose_oldest_entry_is_gone() -> None:
    """A sequence without its oldest entry is ignored as a whole, and an older complete one is replayed instead."""
    gone = {8192: entry(8, 0, "bad1"), 16384: entry(9, 0, "bad2")}
    found = replayed({**gone, 65536: entry(3, 65536, "good")})
    assert b"good" == at(found, MIB)

    with pytest.raises(DriverError, match="but has no complete entry"):
        replayed(gone)


def test_an_entry_may_be_longer_than_it_needs() -> None:
    """An entry may be padded to more than a sector. Sectors behind its last descriptor or data sector are skipped."""
    found = replayed({0: entry(1, 0, "one ", padding=3), 5 * SECTOR: entry(2, 0, "two ", 2 * MIB)})

    assert (b"one ", b"two ") == (at(found, MIB), at(found, 2 * MIB))


@pytest.mark.parametrize("keep", range(0, 3 * SECTOR, 512))
@pytest.mark.parametrize("before", [b"", b"-" * 3 * SECTOR, vhdx_entry(LOG, 1, 0, [(MIB, sector("x"))] * 2)])
def test_an_entry_that_was_torn(keep: int, before: bytes) -> None:
    """If the power failed anywhere inside an entry, the log ends there, and earlier entries are replayed."""
    torn = vhdx_entry(LOG, 6, 0, [(MIB, sector("bad ")), (2 * MIB, sector("bad "))])
    for begun in (torn[:keep] + before[keep:], before[: 3 * SECTOR - keep] + torn[3 * SECTOR - keep :]):
        found = replayed({0: entry(5, 0, "good"), 8192: begun})
        assert (b"good", b"----", 1) == (at(found, MIB), at(found, 2 * MIB), found.entries)
        with pytest.raises(DriverError, match="but has no complete entry"):
            replayed({8192: begun})


def test_sectors_of_an_entry_that_did_not_arrive() -> None:
    """An entry that lacks one sector, of descriptors or of data, ends the log, whatever is there instead."""
    torn = vhdx_entry(LOG, 6, 0, [(MIB + number * SECTOR, sector("bad ")) for number in range(130)])
    other = vhdx_entry(LOG, 7, 0, [(MIB + number * SECTOR, sector("bad ")) for number in range(130)])
    for number in (0, 1, 2, 70, 131):
        place = number * SECTOR
        for instead in (bytes(SECTOR), other[place : place + SECTOR]):
            begun = torn[:place] + instead + torn[place + SECTOR :]
            assert b"good" == at(replayed({0: entry(5, 0, "good"), 8192: begun}), MIB)


@pytest.mark.slow
def test_any_damage_to_an_entry() -> None:
    """If a bit of the newest entry has flipped, the log ends before it. If it is the only one, the image is refused."""
    whole = vhdx_entry(LOG, 6, 0, [(MIB, sector("bad ")), (2 * MIB, SECTOR)], flushed=MIB, last=MIB)
    good = entry(5, 0, "good")
    for place in (*range(160), *range(160, len(whole), 61)):
        for bit in range(place % 3, 8, 3):
            begun = bytearray(whole)
            begun[place] ^= 1 << bit
            assert b"good" == at(replayed({0: good, 8192: bytes(begun)}), MIB), (place, bit)
    with pytest.raises(DriverError, match="but has no complete entry"):
        replayed({0: bytes(begun)})


def resummed(data: bytes, place: int, value: bytes) -> bytes:
    """Return an entry with other bytes in it, and its checksum corrected."""
    changed = data[:4] + bytes(4) + data[8:place] + value + data[place + len(value) :]
    return changed[:4] + crc32c(changed).to_bytes(4, "little") + changed[8:]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (8, b"\0\x10\0\0"),  # shorter than its descriptors and data
        (8, b"\1\x20\0\0"),
        (8, b"\0\0\x20\0"),  # longer than the log
        (12, b"\1"),
        (16, bytes(8)),
        (24, b"\xff\xff\xff\xff"),
        (24, b"\3"),
        (64, b"desk"),
        (64 + 17, b"\1"),
        (64 + 24, b"\7"),
        (96 + 8, b"\1"),
        (SECTOR, b"Data"),
        (SECTOR + 4, b"\1"),
        (2 * SECTOR - 4, b"\7"),
    ],
)
def test_entries_that_only_look_whole(place: int, value: bytes) -> None:
    """Lengths, numbers and signatures are checked even if the checksum is correct. A wrong one ends the log."""
    whole = vhdx_entry(LOG, 6, 0, [(MIB, sector("bad ")), (2 * MIB, SECTOR)])
    assert b"bad " == at(replayed({0: entry(5, 0, "good"), 8192: whole}), MIB)

    found = replayed({0: entry(5, 0, "good"), 8192: resummed(whole, place, value)})
    assert (b"good", 1) == (at(found, MIB), found.entries)


def test_what_no_entry_can_be() -> None:
    """An entry must have whole sectors and a number above 0, even if its checksum is correct."""
    longer = resummed(entry(6, 0, "bad ") + bytes(512), 8, (2 * SECTOR + 512).to_bytes(4, "little"))
    assert 1 == replayed({0: entry(5, 0, "good"), 8192: longer}).entries

    with pytest.raises(DriverError, match="but has no complete entry"):
        replayed({0: entry(0, 0, "none")})


def test_the_file_is_as_long_as_its_log_says() -> None:
    """The file ends where the newest entry says or where the changes end, and is never made shorter."""
    for last, place, size in ((9 * MIB, MIB, 9 * MIB), (MIB, MIB, 8 * MIB), (MIB, 12 * MIB, 12 * MIB + SECTOR)):
        assert size == replayed({0: entry(1, 0, "x", place, last=last)}).size
    assert 8 * MIB == replayed({0: entry(1, 0, "x", last=16 * MIB), 8192: entry(2, 0, "x")}).size
    assert 128 << 40 == replayed({0: entry(1, 0, "x", last=128 << 40)}).size


def test_a_change_of_nothing() -> None:
    """A zero descriptor of length 0 changes nothing, whatever its offset."""
    found = replayed({0: vhdx_entry(LOG, 1, 0, [(0, 0), (MIB, sector("data"))])})

    assert (b"data", 1) == (at(found, MIB), len(found.changes))


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({}, "but has no complete entry"),
        ({0: entry(1, 0, "x", flushed=8 * MIB + 1)}, "it was truncated: it had 8388609 bytes .*, and now has 8388608"),
        ({0: entry(1, 0, "x", place=0)}, "4096 bytes at byte 0, where nothing may be changed"),
        ({0: entry(1, 0, "x", place=128 << 10)}, "at byte 131072, where nothing may be changed"),
        ({0: entry(1, 0, "x", place=PLACE + MIB - SECTOR)}, "where nothing may be changed"),
        ({0: vhdx_entry(LOG, 1, 0, [(6 * MIB, 2 * MIB)])}, "where nothing may be changed"),
        ({0: vhdx_entry(LOG, 1, 0, [(MIB, 128 << 40)])}, "where nothing may be changed"),
        ({0: vhdx_entry(LOG, 1, 0, [((1 << 64) - SECTOR, (1 << 64) - SECTOR)])}, "where nothing may be changed"),
        ({0: entry(1, 0, "x", place=(1 << 64) - SECTOR)}, "where nothing may be changed"),
        ({0: entry(1, 0, "x", last=(1 << 64) - 1)}, "says that the file needs 18446744073709551615 bytes"),
        ({0: entry(1, 0, "x", last=(128 << 40) + 1)}, "says that the file needs"),
    ],
)
def test_logs_that_are_refused(entries: dict[int, bytes], sentence: str) -> None:
    """A log with impossible values is refused, and the error has the values."""
    with pytest.raises(DriverError, match=sentence):
        replayed(entries)


def test_a_file_that_was_long_enough() -> None:
    """Only the newest entry's file length counts, since the file may have been shortened in between."""
    found = replayed({0: entry(1, 0, "x", flushed=64 * MIB), 8192: entry(2, 0, "new ", flushed=8 * MIB)})

    assert b"new " == at(found, MIB)


@pytest.mark.parametrize(
    ("place", "length", "sentence"),
    [
        (0, MIB, "not inside"),
        (MIB + 512, MIB, "not inside"),
        (MIB, MIB + 512, "not inside"),
        (8 * MIB, MIB, "not inside"),
    ],
)
def test_places_that_are_no_log(place: int, length: int, sentence: str) -> None:
    """A log must be inside of the file, behind the headers, and aligned to 1 MiB."""
    with pytest.raises(DriverError, match=sentence):
        vhdx_log.replay(lambda _offset, count: bytes(count), len(FILE), LOG, place, length)


def test_logs_that_are_too_large() -> None:
    """A log of more than 64 MiB is not read, nor one with more changes than any real log has."""
    with pytest.raises(DriverError, match="its log has 65 MiB, more than the 64 MiB that are supported"):
        vhdx_log.replay(lambda _offset, _count: b"", 1 << 40, LOG, MIB, 65 * MIB)
    many = vhdx_entry(LOG, 1, 0, [(MIB, SECTOR)] * ((1 << 16) + 1))
    with pytest.raises(DriverError, match="more than the 65536 changes"):
        replayed({0: many}, length=4 * MIB)


def test_entries_that_lie_over_one_another() -> None:
    """A log in which an entry as long as the log begins in every sector is refused within a second."""
    long = vhdx_entry(LOG, 1, 0, [], padding=MIB // SECTOR - 1)
    ring = dict.fromkeys(range(SECTOR, MIB, SECTOR), long[:SECTOR])
    with pytest.raises(DriverError, match="entries of its log overlap"):
        replayed(ring)


def test_descriptors_that_lie_over_one_another() -> None:
    """The same holds if the entries consist of descriptors, each list of which is as long as the log."""
    long = vhdx_entry(LOG, 1, 0, [(MIB, SECTOR)] * ((MIB - 64) // 32))
    assert MIB == len(long)
    with pytest.raises(DriverError, match="entries of its log overlap"):
        replayed(dict.fromkeys(range(0, MIB, SECTOR), long[:SECTOR]))


def test_a_long_sequence_without_its_oldest_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries of an incomplete sequence are looked at once, not again from each of them."""
    looked: list[int] = []
    look = vhdx_log._Ring._entry
    monkeypatch.setattr(vhdx_log._Ring, "_entry", lambda ring, place: looked.append(place) or look(ring, place))
    with pytest.raises(DriverError, match="but has no complete entry"):
        replayed({number * SECTOR: vhdx_entry(LOG, number, 0, []) for number in range(1, MIB // SECTOR)})

    assert len(looked) < 3 * MIB // SECTOR


def test_an_image_is_read_with_its_log() -> None:
    """Table and sizes are read after the log has been applied: here, the log adds a block to the table."""
    bat = (7 * MIB | 6).to_bytes(8, "little") + bytes(8) + (3 * MIB | 6).to_bytes(8, "little")
    ring = vhdx_ring({0: vhdx_entry(LOG, 1, 0, [(MIB, bat.ljust(SECTOR, b"\0"))], last=8 * MIB)})
    data = vhdx(4 * MIB, {2: b"d" * MIB}, log=LOG, ring=ring)
    image = parse(lambda offset, length: data[offset : offset + length], len(data))
    assert image.log is not None
    place, length = image.table_at(0)
    table = image.decode(image.log.changes.reader(lambda offset, count: data[offset:][:count], 8 * MIB)(place, length))

    assert ([7 * MIB, 3 * MIB], 8 * MIB) == ([table[0] & ~511, table[2] & ~511], image.shape.file_size)


@pytest.mark.slow
@pytest.mark.rows("D4", "D6", "R19")
def test_any_bytes_are_a_log_or_a_sentence(request: pytest.FixtureRequest) -> None:
    """R19: any log, even with right checksums, is accepted or raises DriverError, quickly and in little memory."""
    chance = Random(request.config.getoption("--seed"))
    count = request.config.getoption("--requests") // 100
    kinds = [4, 8, 12, 16, 24, 32, 48, 56, 64, 68, 72, 80, 88, 96, SECTOR, SECTOR + 4, 2 * SECTOR - 4]

    def damaged() -> bytes:
        place, entries = chance.randrange(256) * SECTOR, {}
        for number in range(chance.randint(1, 3)):
            tail = chance.choice([place, chance.randrange(256) * SECTOR])
            changes = [(MIB, sector("x")), (2 * MIB, SECTOR)]
            each = vhdx_entry(LOG, 1 + number, tail, changes, last=chance.choice([0, 9 * MIB, 1 << 63]))
            for _ in range(chance.choice([0, 1, 1, 2])):
                width = chance.choice([1, 2, 4, 8])
                value = chance.choice([bytes(width), b"\xff" * width, b"\0\x10" + bytes(6), chance.randbytes(width)])
                changed = chance.choice([lambda data, at, value: data[:at] + value + data[at + len(value) :], resummed])
                each = changed(each, chance.choice(kinds), value[:width])[: len(each)]
            entries[place] = each
            place = (place + len(each)) % MIB
        return vhdx_ring(entries)

    def look(ring: bytes) -> None:
        found = vhdx_log.replay(lambda _place, length: ring[:length], len(FILE), LOG, PLACE, MIB)
        assert found.size >= len(FILE)
        found.changes.reader(lambda _offset, length: bytes(length), found.size)(MIB, 4 * SECTOR)

    assert 0 < endure(count, damaged, look) < count
