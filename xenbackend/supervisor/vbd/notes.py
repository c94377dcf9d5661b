"""What the service must remember of a disk beyond its own death: typed, in a memory that no worker is given.

Must not hold what can be learnt from anything else: xenstore, the journal, a worker.

The memory is a page of words (0 MAGIC, 1 VERSION, 2 which copy is valid) and two copies of JSON, as in `note.Note`. A
change of these classes raises VERSION, and `former` then has to read the version before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from xenbackend.note import Note
from xenbackend.protocol import codec
from xenbackend.protocol.jobs import HeldFile
from xenbackend.supervisor.vbd.kept_files import Of
from xenbackend.units import PAGE

VERSION = 3
_ROOM = 64 * PAGE
_NAMES = 8 * PAGE  # bytes for the names of memories, which a worker gives, and which must not crowd out the rest
_FILES = 48 * PAGE  # bytes for the files, whose names may come from an image
_MORE_OF_A_FILE = max(map(len, Of)) - min(map(len, Of))  # bytes by which its note may grow when an exchange ends
SIZE = PAGE + 2 * _ROOM  # bytes
_NOTE = Note(0, 2, (PAGE, PAGE + _ROOM), _ROOM, VERSION)


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange under way: the number of its order, what ``params`` was then, and the chain that is being put in."""

    order: int
    former_params: str
    chain: str
    names_unnamed: str = ""  # path that the disk's unnamed file gets
    renews_unnamed: bool = False  # the disk gets another unnamed file


@dataclass(frozen=True, slots=True)
class Claimed:
    """The contents of a backend directory that is away while its vbd is taken from the kernel's backend (`claim`)."""

    keys: dict[str, str]
    permissions: list[str]
    is_in_libxl: bool


@dataclass(frozen=True, slots=True)
class Notes:
    """All notes about one disk.

    chain         the chain in service, or the one that a worker was last told to open
    exchange      the exchange under way, None if there is none
    stale_params  values that the key ``params`` may still have instead of `chain`; empty if it is known to follow
    paused        who has paused the disk, for people; None if it is not paused
    policy        the policy that was ordered; None: as in the settings
    claim         see `Claimed`
    memories      the name of each memory of the chain, as its worker gave it, by slot
    files         a text about each file of the chain, and of one that is being put in, by slot: `kept_files`
    connections   a text about each connection to a server, by slot: `kept_connections`
    program       version of the program that the worker was started from
    restarts      how many workers took the place of one that had died
    exchanged_by  number of the order that last put a chain in
    in_service    files that a worker of the last release had open for this disk, which stay allowed
    undecided     a chain that may be in service instead of `chain`: an earlier service ended before it knew; else empty
    begun_after   number of the last order that was given before this disk was in its place: that was for another disk
    """

    chain: str = ""
    exchange: Exchange | None = None
    stale_params: list[str] = field(default_factory=list)
    paused: str | None = None
    policy: str | None = None
    claim: Claimed | None = None
    memories: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    connections: dict[str, str] = field(default_factory=dict)
    program: str = ""
    restarts: int = 0
    exchanged_by: int = 0
    in_service: list[HeldFile] = field(default_factory=list)
    undecided: str = ""
    begun_after: int = 0


def write(memory: memoryview, notes: Notes) -> None:
    """Replace the notes atomically. Raises: ValueError, if they are too long, or hold what cannot be stored.

    How an exchange ends can always be noted: the room for it is reserved while it is under way.
    """
    values = codec.as_fields(notes)
    codec.restore(Notes, values)
    if len(json.dumps(values["memories"])) > _NAMES:
        raise ValueError("the names of memories leave no room for anything else")
    reserved = _MORE_OF_A_FILE * len(notes.files) if notes.exchange is not None else 0
    if len(json.dumps(values["files"])) + reserved > _FILES:
        raise ValueError("the names of the disk's files are too long")
    _NOTE.write(memory, values, reserved=reserved)


def read(memory: memoryview) -> Notes:
    """Return the notes; those of a new disk if there are none."""
    found = _NOTE.read(memory)
    try:
        notes: Notes = codec.restore(Notes, found or {})
    except codec.NotAMessage:
        return Notes()
    return notes
