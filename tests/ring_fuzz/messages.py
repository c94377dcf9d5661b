"""Ring messages: made at random, changed at random, written into a slot, kept as lines of JSON.

Must not say what a message is worth: `judge` does. Pages are named by their grefs, which are the same in every run: the
guest's pool is granted first of all.

A message is a slot as x86_64 has it, without its id. Bytes are all that the other side sees, and bytes are quickly made
and changed: a recipe of fields takes longer to encode than the backend takes to answer it.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from struct import Struct
from typing import NamedTuple, TypeVar

from xenbackend.blkif.abi import (
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_DISCARD,
    BLKIF_OP_INDIRECT,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    SEGMENT_SIZE,
    X86_64,
    Layout,
)
from xenbackend.rig.table import RESERVED

SECTORS = 2048  # of the disk
ATTACKED = 1024  # the first sector that messages are for; what lies before is a neighbour's
FIRST = RESERVED  # gref of the pool's first page
POOL = 72  # pages

SECTOR_EDGES = (
    ATTACKED, SECTORS - 1, SECTORS, SECTORS + 1, SECTORS - 8, SECTORS - 88, 2**32 - 1, 2**32, 2**32 + 1, 2**55,
    2**61, 2**63, 2**63 - 1, 2**64 - 1, 2**64 - 8,
)  # fmt: skip
COUNT_EDGES = (0, 1, 2, 10, 11, 12, 127, 128, 255)
LONG_EDGES = (0, 1, 11, 12, 31, 32, 255, 256, 257, 512, 513, 4096, 65535)
OPERATIONS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 77, 255)
EDGES = ((0, 7), (0, 0), (7, 7), (1, 0), (0, 8), (8, 8), (255, 255), (0, 255), (3, 4))
GREFS = (1000, 1000 + 16383, 16384, 2**31, 2**32 - 1, 0xFFFF)
_LENGTHS = (0, 1, 8, SECTORS, 2**55, 2**63, 2**64 - 1)
_DIRECT = (BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_WRITE_BARRIER)
_INDIRECT_COUNTS = (1, 1, 2, 11, 12, 13, 32, 64)

# bytes of a slot
_SIZE = X86_64.slot_size
_ID, _BEHIND_ID = 8, 16
_SECTOR, _SEGMENTS, _DISCARDED, _LIST = 16, 24, 24, 28
_HEAD = Struct("<BBHxxxxxxxxxxxxQ")
_INDIRECT = Struct("<BBHxxxxxxxxxxxxQI8I52x")
_U16, _U32, _U64, _SEGMENT = Struct("<H"), Struct("<I"), Struct("<Q"), Struct("<IBBxx")
_TAPE = 2048  # segments
_T = TypeVar("_T")


class Message(NamedTuple):
    """One slot: `slot` as x86_64 has it, the id zero; an indirect one has `segments` in its list page.

    The first list page of an indirect message is its own where it is 0.
    """

    slot: bytes
    segments: bytes = b""

    def __str__(self) -> str:
        operation, second, third, sector = _HEAD.unpack_from(self.slot)
        segments = [*_SEGMENT.iter_unpack(self.segments or self.slot[_SEGMENTS:])]
        return f"({operation}, {second}, {third}, sector {sector}, {segments})"


class Maker:
    """Makes and changes messages.

    Segments come from tapes of random ones, made at once, from a random place on: one by one they would take most of
    the time. A random number is `int(self._draw() * count)`: it takes a fifth of `randrange`'s time.
    """

    def __init__(self, random: Random) -> None:
        """Make them of what `random` says."""
        self._random = random
        self._draw = random.random
        self._whole = _tape(random, POOL // 2, ((0, 7),))
        self._ragged = _tape(random, POOL, EDGES[:3])

    def make(self) -> Message:
        """Return a message that is right, or nearly."""
        kind = self._draw()
        if kind < 0.55:
            return self._direct()
        if kind < 0.75:
            return self._indirect()
        if kind < 0.82:
            return _discard(self._sector(8), (1, 8, 64)[int(self._draw() * 3)])
        if kind < 0.92:
            return Message(_HEAD.pack(self._pick(OPERATIONS), 0, 0, self._sector(0)).ljust(_SIZE, b"\0"))
        return self.change(self.change(self._direct()))

    def noise(self) -> Message:
        """Return a message of random bytes."""
        noise = self._random.randbytes(_SIZE)
        segments = self._segments(64) if noise[0] & 1 else b""
        return Message(noise[:4] + bytes(_BEHIND_ID - 4) + noise[_BEHIND_ID:], segments)

    def change(self, message: Message) -> Message:
        """Return a message that differs in one field."""
        slot, segments = message
        is_indirect = slot[0] == BLKIF_OP_INDIRECT
        what = int(self._draw() * 8)
        if what == 0:
            return _put(message, int(is_indirect), bytes((self._pick(OPERATIONS),)))
        if what == 1 and is_indirect:
            return _put(message, 2, _U16.pack(self._pick(LONG_EDGES)))
        if what == 1:
            return _put(message, 1, bytes((self._pick(COUNT_EDGES),)))
        if what == 2:
            return _put(message, _SECTOR, _U64.pack(self._pick(SECTOR_EDGES)))
        if what == 3 and is_indirect:
            return Message(slot, self._change_segment(segments, 0, len(segments) // SEGMENT_SIZE))
        if what == 3:
            count = min(max(slot[1], 1), BLKIF_MAX_SEGMENTS_PER_REQUEST)
            return Message(self._change_segment(slot, _SEGMENTS, count), segments)
        return self._change_rest(message, what, is_indirect=is_indirect)

    def _change_rest(self, message: Message, what: int, *, is_indirect: bool) -> Message:
        if what == 4 and is_indirect:
            lists = [self._pick((0, 0, *GREFS)) for _ in range(self._pick((1, 2, 8)))]
            return _put(message, _LIST, b"".join(map(_U32.pack, lists)))
        if what == 5:
            return self._change_form(message)
        if what == 6 and not is_indirect:
            return _put(message, _DISCARDED, _U64.pack(self._pick(_LENGTHS)))
        for _ in range(self._pick((1, 1, 8))):
            at = int(self._draw() * (_SIZE - _BEHIND_ID + 4))
            message = _put(message, at if at < 4 else at + _BEHIND_ID - 4, self._random.randbytes(1))
        return message

    def _change_form(self, message: Message) -> Message:
        """Return the same sectors and segments, laid out otherwise."""
        slot, segments = message
        operation, second, count, sector = _HEAD.unpack_from(slot)
        form = int(self._draw() * 3)
        if form == 0:
            return _discard(sector, count)
        if form == 1 and operation == BLKIF_OP_INDIRECT:
            head = _HEAD.pack(second, count & 0xFF, 0, sector)
            return Message((head + segments[: _SIZE - _SEGMENTS]).ljust(_SIZE, b"\0"))
        if form == 2 and operation != BLKIF_OP_INDIRECT:
            return _indirect(operation, second, sector, slot[_SEGMENTS:])
        return message

    def _change_segment(self, content: bytes, start: int, count: int) -> bytes:
        at = start + int(self._draw() * count) * SEGMENT_SIZE
        if not count:
            return content
        gref, first, last = _SEGMENT.unpack_from(content, at)
        if self._draw() < 0.5:
            first, last = self._pick(EDGES)
        elif self._draw() < 0.2:
            gref = FIRST + int(self._draw() * POOL)
        else:
            gref = self._pick(GREFS)
        return content[:at] + _SEGMENT.pack(gref, first, last) + content[at + SEGMENT_SIZE :]

    def _pick(self, choices: tuple[_T, ...]) -> _T:
        return choices[int(self._draw() * len(choices))]

    def _sector(self, room: int) -> int:
        if self._draw() < 0.9:
            return ATTACKED + int(self._draw() * (SECTORS - room - ATTACKED))
        return self._pick(SECTOR_EDGES)

    def _segments(self, count: int) -> bytes:
        tape = self._whole if self._draw() < 0.7 else self._ragged
        at = int(self._draw() * (_TAPE - count)) * SEGMENT_SIZE
        return tape[at : at + count * SEGMENT_SIZE]

    def _direct(self) -> Message:
        count = 1 if self._draw() < 0.6 else 1 + int(self._draw() * BLKIF_MAX_SEGMENTS_PER_REQUEST)
        head = _HEAD.pack(_DIRECT[int(self._draw() * 5)], count, 0, self._sector(88))
        return Message((head + self._segments(count)).ljust(_SIZE, b"\0"))

    def _indirect(self) -> Message:
        count = _INDIRECT_COUNTS[int(self._draw() * 8)]
        return _indirect(int(self._draw() * 2), count, self._sector(512), self._segments(count))


def _indirect(operation: int, count: int, sector: int, segments: bytes) -> Message:
    head = _INDIRECT.pack(BLKIF_OP_INDIRECT, operation, count, sector, 0, *[0] * 8)
    return Message(head, segments)


def _discard(sector: int, length: int) -> Message:
    return Message((_HEAD.pack(BLKIF_OP_DISCARD, 0, 0, sector) + _U64.pack(length)).ljust(_SIZE, b"\0"))


def _put(message: Message, at: int, value: bytes) -> Message:
    slot, segments = message
    return Message(slot[:at] + value + slot[at + len(value) :], segments)


def _tape(random: Random, pages: int, edges: tuple[tuple[int, int], ...]) -> bytes:
    """Return random segments in the first `pages` of the pool, with these first and last sectors."""
    tape = bytearray(_TAPE * SEGMENT_SIZE)
    tape[0::SEGMENT_SIZE] = random.randbytes(_TAPE).translate(bytes(FIRST + byte % pages for byte in range(256)))
    chosen = random.randbytes(_TAPE)
    for which, place in enumerate((4, 5)):
        tape[place::SEGMENT_SIZE] = chosen.translate(bytes(edges[byte % len(edges)][which] for byte in range(256)))
    return bytes(tape)


def encode(message: Message, layout: Layout, guest_id: int, own_list: int) -> bytes:
    """Return the slot; `own_list` is the gref of the message's list page. x86_32 has no padding before the id."""
    slot = message.slot
    if slot[0] == BLKIF_OP_INDIRECT and not any(slot[_LIST : _LIST + 4]):
        slot = slot[:_LIST] + _U32.pack(own_list) + slot[_LIST + 4 :]
    return slot[: _ID if layout is X86_64 else 4] + _U64.pack(guest_id) + slot[_BEHIND_ID:]


def as_line(message: Message) -> str:
    """Return a message as it is kept."""
    return json.dumps([part.hex() for part in message])


def read(file: Path) -> list[Message]:
    """Return the messages that were kept in a file, none where there is no file."""
    if not file.exists():
        return []
    return [read_line(line) for line in file.read_text().splitlines() if line]


def read_line(line: str) -> Message:
    """Return the message that a line keeps."""
    return Message(*map(bytes.fromhex, json.loads(line)))
