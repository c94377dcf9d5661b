"""Headers of encrypted volumes, sound, odd and damaged."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from tests.fuzzing import endure
from tests.luks_images import DATA_1, SLOTS_2, Made, header2, luks1, luks2, metadata
from xenbackend.block.driver import Look
from xenbackend.block.formats.luks import parse
from xenbackend.block.formats.luks_volume import Volume
from xenbackend.errors import DriverError

PLAIN = bytes(16384)


def look_at(image: bytes) -> Look:
    """Return a function that reads an image, but nothing beyond its end."""

    def look(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(image), "a read outside of the disk"
        return image[offset : offset + length]

    return look


def parsed(image: bytes, slot: int | None = None) -> Volume:
    """Return what an image's header says."""
    return parse(look_at(image), len(image), slot)


@pytest.mark.parametrize("make", [luks1, luks2])
def test_a_sound_header(make: Callable[[Made], bytes]) -> None:
    """A header is read as it was written: the place of the data, their encryption, and the key slots in use."""
    made = Made(PLAIN, passphrases=[b"a", b"b", b"c"])
    image = make(made)
    volume = parsed(image)

    assert len(image) - len(PLAIN) == volume.offset
    assert len(PLAIN) == volume.size
    assert ("aes-xts-plain64", 64) == (volume.cipher.text, volume.cipher.key_size)
    assert [0, 1, 2] == [slot.number for slot in volume.slots]
    assert all(slot.derivation.iterations == 1000 for slot in volume.slots)
    assert [1] == [slot.number for slot in parsed(image, 1).slots]
    assert volume.digest.fits(bytearray(made.key))
    assert not volume.digest.fits(bytearray(64))
    assert volume.identity == parsed(image, 1).identity != parsed(make(made)).identity


def test_what_is_no_volume_is_said_to_be_none() -> None:
    """A disk without a header, or too small for one, is not reported as a damaged volume."""
    with pytest.raises(DriverError, match="there is no LUKS header; to make one: `cryptsetup luksFormat`"):
        parsed(bytes(1 << 20))
    with pytest.raises(DriverError, match="has 512 bytes, too few for a LUKS header"):
        parsed(bytes(512))
    with pytest.raises(DriverError, match="neither copy of it has a correct checksum"):
        parsed(b"LUKS\xba\xbe\0\3".ljust(1 << 20, b"\0"))


ODD_1: list[tuple[str, int, str, Any]] = [  # the problem; offset, format and value of what is written to the header
    ("its header is a detached one", 104, ">I", 0),
    ("it has been truncated", 104, ">I", 1 << 20),
    ("a key of 63 bytes", 108, ">I", 63),
    ("is encrypted by serpent-xts-plain64", 8, "8s", b"serpent"),
    ("is encrypted by aes-xts-plain64be", 40, "16s", b"xts-plain64be"),
    ("uses the hash whirlpool; this driver supports sha1, ", 72, "32s", b"whirlpool"),
    ("is not ASCII text", 72, "32s", b"\xff"),
    ("needs 4294967295 iterations", 164, ">I", 0xFFFFFFFF),
    ("needs 0 iterations", 164, ">I", 0),
    ("key slot 0 is neither active nor inactive", 208, ">I", 7),
    ("none of its key slots is active", 208, ">I", 0x0000DEAD),
    ("4294967295 iterations of PBKDF2", 212, ">I", 0xFFFFFFFF),
    ("1 iterations of PBKDF2", 212, ">I", 1),
    ("outside of the area for key slots", 208 + 40, ">I", 0),
    ("outside of the area for key slots", 208 + 40, ">I", 0xFFFFFFFF),
    ("outside of the area for key slots", 208 + 40, ">I", (DATA_1 + 8 * 258048 - 4096) // 512),
    ("0 stripes", 208 + 44, ">I", 0),
    ("4001 stripes", 208 + 44, ">I", 4001),
]


@pytest.mark.parametrize(("problem", "place", "kind", "value"), ODD_1)
def test_odd_values_of_luks1(problem: str, place: int, kind: str, value: Any) -> None:
    """Each number of a header is checked before it is used, and the message says what is wrong."""
    image = bytearray(luks1(Made(PLAIN)))
    struct.pack_into(kind, image, place, value)

    with pytest.raises(DriverError, match=problem):
        parsed(bytes(image))


ODD_2: list[tuple[str, str, Any]] = [  # the problem; the name and value of what is replaced in the JSON
    ("features that this driver does not know: online-reencrypt-v2; `cryptsetup reencrypt`", "config.requirements",
     {"mandatory": ["online-reencrypt-v2"]}),
    ("requires features that this driver does not know: opal", "config.requirements", {"mandatory": ["opal"]}),
    ("its requirements are not a list", "config.requirements", {"mandatory": "x"}),
    ("config: missing, or not a JSON object", "config", None),
    ("its data have 0 segments", "segments", {}),
    (r"segment \\x1b\[31mred: missing, or not a JSON object", "segments", {"\x1b[31mred" + "x" * 300: 1}),
    ("its data have 2 segments", "segments", {"0": {"type": "crypt"}, "1": {"type": "crypt"}}),
    ("a segment of type hw-opal", "segments.0.type", "hw-opal"),
    ("a segment of type linear", "segments.0.type", "linear"),
    ("have tags", "segments.0.integrity", {"type": "hmac(sha256)"}),
    ("is encrypted by aes-gcm-random", "segments.0.encryption", "aes-gcm-random"),
    ("sectors have 8192 bytes", "segments.0.sector_size", 8192),
    ("sector_size is not a number", "segments.0.sector_size", "512"),
    ("sector_size is not a number", "segments.0.sector_size", True),
    ("its header is a detached one", "segments.0.offset", "0"),
    ("offset is not a number", "segments.0.offset", 4096),
    ("offset is not a number", "segments.0.offset", "-1"),
    ("offset is not a number", "segments.0.offset", "9" * 21),
    ("offset is not a number", "segments.0.offset", "18446744073709551616"),
    ("its data are", "segments.0.offset", "18446744073709551104"),
    ("its data are", "segments.0.offset", "65537"),
    ("it has been truncated", "segments.0.size", "1048576"),
    ("its data are 100 bytes", "segments.0.size", "100"),
    ("its data segment is empty", "segments.0.size", "0"),
    ("size is not a number", "segments.0.size", "all"),
    ("iv_tweak is not a number", "segments.0.iv_tweak", 1.5),
    ("there are 0 digests", "digests", {}),
    ("the digest of its key is of type argon2", "digests.0.type", "argon2"),
    ("the digest of its key uses the hash md5", "digests.0.hash", "md5"),
    ("needs 4294967295 iterations", "digests.0.iterations", 4294967295),
    ("salt is not base64", "digests.0.salt", "!"),
    ("digest of its key has 3 bytes", "digests.0.digest", "AAAA"),
    ("and 3 bytes of salt", "digests.0.salt", "AAAA"),
    ("keyslots is not a list", "digests.0.keyslots", "0"),
    ("keyslots is not a list", "digests.0.keyslots", ["0", "0"]),
    ("key slot 7: missing, or not a JSON object", "digests.0.keyslots", ["7"]),
    ("none of its key slots is active", "digests.0.keyslots", []),
    ("none of its key slots is active", "keyslots.0.type", "reencrypt"),
    ("none of its key slots is active", "keyslots.0.priority", 0),
    ("priority is not a number", "keyslots.0.priority", []),
    ("priority is not a number", "keyslots.0.priority", {}),
    ("33 key slots", "keyslots", {str(number): {} for number in range(33)}),
    ("is stored in a way", "keyslots.0.area.type", "datashift"),
    ("outside of the area", "keyslots.0.area.offset", "0"),
    ("outside of the area", "keyslots.0.area.offset", "17592186044416"),
    ("outside of the area", "keyslots.0.area.offset", str(SLOTS_2 + 1)),
    ("is encrypted by null", "keyslots.0.area.encryption", "null"),
    ("a key of 48 bytes", "keyslots.0.area.key_size", 48),
    ("a key of 1 bytes", "keyslots.0.key_size", 1),
    ("4000000000 stripes", "keyslots.0.af.stripes", 4000000000),
    ("stripes by md5", "keyslots.0.af.hash", "md5"),
    ("are derived by 'scrypt'", "keyslots.0.kdf.type", "scrypt"),
    ("4294967295 iterations of PBKDF2", "keyslots.0.kdf.iterations", 4294967295),
    ("time is not a number", "keyslots.0.kdf.type", "argon2id"),
    ("passes of Argon2 over 4194303 MiB", "keyslots.0.kdf",
     {"type": "argon2id", "salt": "AAAAAAAAAAAAAAAAAAAAAA==", "time": 4, "memory": 4294967295, "cpus": 4}),
    ("4294967295 passes of Argon2 over 1024 MiB", "keyslots.0.kdf",
     {"type": "argon2i", "salt": "AAAAAAAAAAAAAAAAAAAAAA==", "time": 4294967295, "memory": 1 << 20, "cpus": 4}),
]  # fmt: skip


@pytest.mark.parametrize(("problem", "name", "value"), ODD_2)
def test_odd_values_of_luks2(problem: str, name: str, value: Any) -> None:
    """E4: each value of the JSON is checked. A valid feature that is not supported is refused by its name."""
    with pytest.raises(DriverError, match=problem):
        parsed(luks2(Made(PLAIN), {name: value}))


@pytest.mark.parametrize(("name", "shown"), [("100", "100"), ("-1", "-1"), ("\x1b[31mred", r"\\x1b\[31mred")])
def test_names_that_no_key_slot_has(name: str, shown: str) -> None:
    """A key slot's name has one or two digits. Any other name is refused, and shown with control characters escaped."""
    with pytest.raises(DriverError, match=f"a key slot is called {shown};"):
        parsed(luks2(Made(PLAIN), {f"keyslots.{name}": {}, "digests.0.keyslots": ["0", name]}))


def test_key_slots_hold_one_key() -> None:
    """Key slots of one digest whose keys have different sizes are refused, whichever slot is to be tried."""
    image = luks2(Made(PLAIN, passphrases=[b"a", b"b"]), {"keyslots.1.key_size": 32})
    for slot in (None, 0, 1):
        with pytest.raises(DriverError, match="its key slots have keys of different sizes"):
            parsed(image, slot)


def test_a_segment_of_a_backup_is_none_of_the_data() -> None:
    """Segments that a re-encryption keeps as backups are not part of the data."""
    made = Made(PLAIN)
    volume = parsed(luks2(made, {"segments.1": {"type": "linear", "flags": ["backup-previous"]}}))

    assert len(PLAIN) == volume.size


def test_slots_are_tried_as_their_priorities_say() -> None:
    """Slots with a higher priority are tried first. A slot with priority 0 is tried only if it is named."""
    made = Made(PLAIN, passphrases=[b"a", b"b", b"c", b"d"])
    image = luks2(made, {"keyslots.2.priority": 2, "keyslots.1.priority": 0})

    assert [2, 0, 3] == [slot.number for slot in parsed(image).slots]
    assert [1] == [slot.number for slot in parsed(image, 1).slots]


def test_the_disk_grows_with_its_file() -> None:
    """E3: a volume that extends to the end of its disk grows with it, and one of a stated size does not. A partial
    sector at the end is refused.
    """
    made = Made(PLAIN, sector=4096)
    for image, grows in [
        (luks1(Made(PLAIN)), 8192),
        (luks2(made), 8192),
        (luks2(made, {"segments.0.size": "8192"}), 0),
    ]:
        before = parsed(image).size
        assert before + grows == parsed(image + bytes(8192)).size
    assert 8192 == before
    with pytest.raises(DriverError, match="which is not a whole number of its sectors of 4096 bytes"):
        parsed(luks2(made) + bytes(512))


def copies(first: bytes | None, second: bytes | None, rest: bytes) -> bytes:
    """Return an image with these two copies of its header, or random bytes for None."""
    noise = Random(1).randbytes(0x4000)
    return (first or noise) + (second or noise) + rest


def test_of_two_copies_the_newer_sound_one_counts() -> None:
    """E4: the second copy is found even if the first is destroyed. If both are sound, the newer one counts."""
    made = Made(PLAIN)
    rest = luks2(made)[0x8000:]
    data_at = 0x8000 + len(rest) - len(PLAIN)
    old, new = (metadata(made, [bytes(32)], data_at) for _ in range(2))
    new["segments"]["0"]["iv_tweak"] = "7"
    olds, news = (
        [header2(values, sequence=sequence, is_second=second) for second in (False, True)]
        for values, sequence in ((old, 5), (new, 6))
    )
    damaged = olds[0][:5000] + b"!" + olds[0][5001:]
    for first, second, tweak in [
        (olds[0], news[1], 7), (news[0], olds[1], 7), (olds[0], None, 0), (None, olds[1], 0), (None, news[1], 7),
        (damaged, news[1], 7), (news[0], damaged, 7),
    ]:  # fmt: skip
        assert tweak == parsed(copies(first, second, rest)).tweak
    with pytest.raises(DriverError, match="neither copy of it has a correct checksum"):
        parsed(copies(damaged, None, rest))
    with pytest.raises(DriverError, match="there is no LUKS header"):
        parsed(copies(None, None, rest))


def test_a_copy_with_a_checksum_of_another_kind_is_not_sound() -> None:
    """A copy whose header names another checksum than sha256 does not count, even if the bytes match sha256."""
    made = Made(PLAIN)
    whole = luks2(made)
    named = bytearray(header2(metadata(made, [bytes(32)], len(whole) - len(PLAIN)), sequence=9))
    named[72:78], named[448:512] = b"sha512", bytes(64)
    named[448:480] = hashlib.sha256(named).digest()

    assert parsed(whole).identity == parsed(bytes(named) + whole[0x4000:]).identity
    with pytest.raises(DriverError, match="neither copy of it has a correct checksum"):
        parsed(copies(bytes(named), None, whole[0x8000:]))


@pytest.mark.parametrize("size", [0x4000, 0x8000, 0x40000, 0x400000])
def test_headers_of_every_size(size: int) -> None:
    """The second copy is found at every offset that a header size allows, with and without the first copy."""
    made = Made(PLAIN)
    data_at = 2 * size + 258048
    values = metadata(made, [bytes(32)], data_at)
    values["keyslots"]["0"]["area"]["offset"] = str(2 * size)
    both = [header2(values, is_second=second, size=size) for second in (False, True)]
    rest = bytes(258048) + PLAIN

    assert data_at == parsed(both[0] + both[1] + rest).offset
    assert data_at == parsed(bytes(size) + both[1] + rest).offset


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 12000, b'{"a":' * 2000, b"{}", b"[]", b"nul", b"1" * 12000, b"\xff\xfe", b"", b'{"config": 1e999}',
        b'{"config": {"requirements": NaN}}', b'"' + b"x" * 12000,
    ],
)  # fmt: skip
def test_json_that_is_none_of_ours(text: bytes) -> None:
    """However deep, long or odd the JSON of a header is, it is refused with a message."""
    first = header2(text)
    with pytest.raises(DriverError, match="damaged"):
        parsed(copies(first, None, bytes(1 << 20)))


def test_deep_json_in_the_largest_header() -> None:
    """4 MiB of brackets or of numbers are refused too."""
    for text in (b"[" * ((4 << 20) - 4096), b"[" + b"0," * (2 << 20 - 1)):
        first = header2(text[: (4 << 20) - 4096], size=4 << 20)
        with pytest.raises(DriverError, match="damaged"):
            parsed(first + bytes(8 << 20))


VALUES = [
    0,
    1,
    -1,
    1 << 31,
    1 << 32,
    1 << 64,
    "0",
    "-1",
    "99999999999999999999",
    "dynamic",
    "",
    None,
    [],
    {},
    True,
    1.5,
]


def damage_json(values: Any, chance: Random) -> None:
    """Change a random part of the JSON."""
    place = values
    while True:
        name = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
        below = place[name]
        if isinstance(below, dict | list) and below and chance.random() < 0.85:
            place = below
            continue
        if chance.random() < 0.2:
            del place[name]
        else:
            place[name] = chance.choice(VALUES)
        return


@pytest.mark.rows("R19")
def test_any_bytes_are_a_volume_or_a_sentence(request: pytest.FixtureRequest) -> None:
    """Any header is accepted or refused with a message, quickly and in little memory. Nothing outside of the disk is
    read, and the data of an accepted volume lie on the disk.
    """
    chance = Random(request.config.getoption("--seed"))
    made = Made(PLAIN, passphrases=[b"a", b"b"], stripes=7)
    first, second = luks1(made), luks2(made)
    data_at = len(second) - len(PLAIN)

    def make() -> bytes:
        if chance.random() < 0.4:
            image = bytearray(first)
            for _ in range(chance.choice([1, 1, 2, 5])):
                image[chance.randrange(0, 592)] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
            return bytes(image)
        values = json.loads(json.dumps(metadata(made, [bytes(32)] * 2, data_at)))
        for _ in range(chance.choice([1, 1, 2, 4])):
            damage_json(values, chance)
        head = header2(values, is_second=False)
        if chance.random() < 0.1:
            place = chance.randrange(0, 4096)
            head = head[:place] + chance.randbytes(4) + head[place + 4 :]
        return head + second[0x4000:] if chance.random() < 0.5 else head + head[:100] + second[0x4064:]

    def look(image: bytes) -> None:
        volume = parsed(image, chance.choice([None, None, 0, 1]))
        assert 0 < volume.offset < volume.offset + volume.size <= len(image)
        for slot in volume.slots:
            assert 0 < slot.offset <= slot.offset + slot.length(volume.cipher.key_size) <= volume.offset

    count = request.config.getoption("--requests") // 20
    assert count // 10 < endure(count, make, look) < count
