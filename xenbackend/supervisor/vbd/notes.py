"""What the service has to know of a disk although it may die any moment: typed, in a memory that no worker is given.

Must not hold what is told by anything else: xenstore, the journal, a worker.

The memory is a page of words (0 MAGIC, 1 VERSION, 2 which copy is valid) and two copies of JSON, as `note.Note` has
it. Whoever changes these classes raises VERSION, and writes into `former` how the version before is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from xenbackend.note import Note
from xenbackend.protocol import codec
from xenbackend.protocol.opening import HeldFile
from xenbackend.units import PAGE

VERSION = 3
_ROOM = 64 * PAGE
_NAMES = 8 * PAGE  # bytes for those of memories, which a worker gives; the rest is for what it must not crowd out
_FILES = 48 * PAGE  # bytes for the files, whose names an image may give
SIZE = PAGE + 2 * _ROOM  # bytes
_NOTE = Note(0, 2, (PAGE, PAGE + _ROOM), _ROOM, VERSION)


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange of the chain that is under way: by which order, what ``params`` was, and which chain is put in."""

    order: int
    former_params: str
    chain: str
    names_unnamed: str = ""  # path that the disk's unnamed file gets with it
    renews_unnamed: bool = False  # the disk gets another unnamed file with it


@dataclass(frozen=True, slots=True)
class Claimed:
    """The backend directory while it is away because the vbd is being taken from the kernel's backend (`claim`)."""

    keys: dict[str, str]
    permissions: list[str]
    is_in_libxl: bool


@dataclass(frozen=True, slots=True)
class Notes:
    """All of them.

    chain         the chain in service, or the one that a worker was last told to open
    exchange      the exchange under way; None: there is none
    stale_params  what the key ``params`` may still say although `chain` has taken its place; none: it says so too
    paused        who has paused the disk, for people; None: it is not paused
    policy        what was ordered to become of requests that fail; None: as the settings say
    claim         see `Claimed`
    memories      of the chain: the name that its worker gave to each, by the slot that it is kept under
    files         of the chain, and of one that is being put in, by the slot that each is kept under: `kept_files`
    connections   to servers, by the slot that each is kept under: `kept_connections`
    program       version of the program that the worker was started from
    restarts      workers that took the place of one that had died
    exchanged_by  number of the order by which `chain` took another one's place
    in_service    files that a worker of the last release had open for this disk: they stay allowed
    undecided     a chain that may have taken the place of `chain`: an earlier service ended before it knew; else empty
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


def write(memory: memoryview, notes: Notes) -> None:
    """Replace the notes at one stroke. Raises: ValueError where they are too long, or hold what cannot be stored."""
    values = codec.as_fields(notes)
    codec.restore(Notes, values)
    if len(json.dumps(values["memories"])) > _NAMES:
        raise ValueError("the names of memories leave no room for anything else")
    if len(json.dumps(values["files"])) > _FILES:
        raise ValueError("the names of the disk's files are too long")
    _NOTE.write(memory, values)


def read(memory: memoryview) -> Notes:
    """Return the notes; those of a new disk where there are none."""
    found = _NOTE.read(memory)
    try:
        notes: Notes = codec.restore(Notes, found or {})
    except codec.NotAMessage:
        return Notes()
    return notes
