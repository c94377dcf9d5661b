"""Ring messages as recipes: made at random, changed at random, written into a slot, kept as lines of JSON.

Must not say what a message is worth: `judge` does. A recipe names pages by their place in the guest's pool, so that it
means the same in every run.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import NamedTuple

from xenbackend.blkif.abi import (
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_DISCARD,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    X86_64,
    Layout,
)
from xenbackend.blkif.request import encode_direct, encode_discard, encode_indirect

SECTORS = 2048  # of the disk
ATTACKED = 1024  # the first sector that messages are for; what lies before is a neighbour's
POOL = 72  # pages that recipes name
RAW = 1000  # from here on a page's number is a gref, whatever that is

SECTOR_EDGES = (
    ATTACKED, SECTORS - 1, SECTORS, SECTORS + 1, SECTORS - 8, SECTORS - 88, 2**32 - 1, 2**32, 2**32 + 1, 2**55,
    2**61, 2**63, 2**63 - 1, 2**64 - 1, 2**64 - 8,
)  # fmt: skip
COUNT_EDGES = (0, 1, 2, 10, 11, 12, 127, 128, 255)
LONG_EDGES = (0, 1, 11, 12, 31, 32, 255, 256, 257, 512, 513, 4096, 65535)
OPERATIONS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 77, 255)
EDGES = ((0, 7), (0, 0), (7, 7), (1, 0), (0, 8), (8, 8), (255, 255), (0, 255), (3, 4))
GREFS = (RAW, RAW + 16383, 16384, 2**31, 2**32 - 1, 0xFFFF)


class Message(NamedTuple):
    """One slot.

    form        "direct", "indirect" or "discard": how it is laid out, whatever `operation` says
    operation   of an indirect message the inner one
    count       what the slot says: segments, or the flag of a discard
    segments    (page, first sector, last sector); of an indirect message they lie in its list page
    lists       of an indirect message: 0 for its own list page, else a gref
    length      sectors of a discard
    patches     (byte of the slot, value): written over the rest
    """

    form: str
    operation: int
    count: int
    sector: int
    segments: tuple[tuple[int, int, int], ...] = ()
    lists: tuple[int, ...] = (0,)
    length: int = 0
    patches: tuple[tuple[int, int], ...] = ()


def make(random: Random) -> Message:
    """Return a message that is right, or nearly."""
    kind = random.random()
    if kind < 0.55:
        return _direct(random)
    if kind < 0.75:
        return _indirect(random)
    if kind < 0.82:
        return Message("discard", BLKIF_OP_DISCARD, 0, _sector(random, 8), length=random.choice((1, 8, 64)))
    if kind < 0.92:
        return Message("direct", random.choice(OPERATIONS), 0, _sector(random, 0))
    return change(random, change(random, _direct(random)))


def change(random: Random, message: Message) -> Message:
    """Return a message that differs in one field."""
    what = random.randrange(8)
    if what == 0:
        return message._replace(operation=random.choice(OPERATIONS))
    if what == 1:
        return message._replace(count=random.choice(LONG_EDGES if message.form == "indirect" else COUNT_EDGES))
    if what == 2:
        return message._replace(sector=random.choice(SECTOR_EDGES))
    if what == 3 and message.segments:
        return message._replace(segments=_change_segment(random, message.segments))
    if what == 4 and message.form == "indirect":
        return message._replace(lists=tuple(random.choice((0, 0, *GREFS)) for _ in range(random.choice((1, 2, 8)))))
    if what == 5:
        return message._replace(form=random.choice(("direct", "indirect", "discard")))
    if what == 6:
        return message._replace(length=random.choice((0, 1, 8, SECTORS, 2**55, 2**63, 2**64 - 1)))
    patches = tuple(
        (random.randrange(X86_64.slot_size), random.randrange(256)) for _ in range(random.choice((1, 1, 8)))
    )
    return message._replace(patches=message.patches[-8:] + patches)


def _change_segment(random: Random, segments: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
    place = random.randrange(len(segments))
    page, first, last = segments[place]
    if random.random() < 0.5:
        first, last = random.choice(EDGES)
    else:
        page = random.choice((random.randrange(POOL), *GREFS))
    return (*segments[:place], (page, first, last), *segments[place + 1 :])


def _sector(random: Random, room: int) -> int:
    return random.randrange(ATTACKED, SECTORS - room) if random.random() < 0.9 else random.choice(SECTOR_EDGES)


def _segments(random: Random, count: int) -> tuple[tuple[int, int, int], ...]:
    if random.random() < 0.7:
        return tuple([(random.randrange(POOL // 2), 0, 7) for _ in range(count)])
    return tuple([(random.randrange(POOL), *random.choice(EDGES[:3])) for _ in range(count)])


def _direct(random: Random) -> Message:
    operation = random.choice((BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_WRITE_BARRIER))
    count = 1 if random.random() < 0.6 else random.randint(1, BLKIF_MAX_SEGMENTS_PER_REQUEST)
    return Message("direct", operation, count, _sector(random, 88), _segments(random, count))


def _indirect(random: Random) -> Message:
    count = random.choice((1, 12, 13, 20, 32, 64))
    operation = random.choice((BLKIF_OP_READ, BLKIF_OP_WRITE))
    return Message("indirect", operation, count, _sector(random, 512), _segments(random, count))


def encode(message: Message, layout: Layout, guest_id: int, grefs: list[int], own_list: int) -> bytes:
    """Return the slot: `grefs` are those of the pool, `own_list` that of the message's list page."""
    if message.form == "indirect":
        lists = [own_list if gref == 0 else gref for gref in message.lists]
        slot = encode_indirect(
            layout, message.operation & 0xFF, guest_id, message.sector, message.count & 0xFFFF, lists[:8]
        )
    elif message.form == "discard":
        slot = encode_discard(layout, guest_id, message.sector, message.length)
        slot = bytes((message.operation & 0xFF, message.count & 0xFF)) + slot[2:]
    else:
        segments = resolve(message.segments[:BLKIF_MAX_SEGMENTS_PER_REQUEST], grefs)
        slot = encode_direct(layout, message.operation & 0xFF, guest_id, message.sector, segments)
        slot = slot[:1] + bytes((message.count & 0xFF,)) + slot[2:]
    if not message.patches:
        return slot
    patched = bytearray(slot)
    for place, value in message.patches:
        if (
            place < len(patched)
            and not 8 <= place < 16 - 4 * (layout is not X86_64)
            and not (layout is not X86_64 and 4 <= place < 8)
        ):  # the id stays: answers are known by it
            patched[place] = value
    return bytes(patched)


def resolve(segments: tuple[tuple[int, int, int], ...], grefs: list[int]) -> list[tuple[int, int, int]]:
    """Return segments with grefs in the place of the pool's numbers."""
    return [
        (grefs[page] if page < len(grefs) else page & 0xFFFFFFFF, first & 0xFF, last & 0xFF)
        for page, first, last in segments
    ]


def as_line(message: Message) -> str:
    """Return a message as it is kept."""
    return json.dumps(list(message), separators=(",", ":"))


def read(file: Path) -> list[Message]:
    """Return the messages that were kept in a file, none where there is no file."""
    if not file.exists():
        return []
    return [read_line(line) for line in file.read_text().splitlines() if line]


def read_line(line: str) -> Message:
    """Return the message that a line keeps."""
    form, operation, count, sector, segments, lists, length, patches = json.loads(line)
    return Message(
        form, operation, count, sector, tuple(map(tuple, segments)), tuple(lists), length, tuple(map(tuple, patches))
    )
