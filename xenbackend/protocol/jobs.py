"""The job of an opener: what may be opened for a worker, as plain values; `opening` has the other messages.

Must not open anything. Nothing in a job was chosen by a worker but the names of parents that an opener had allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_FILES = 640  # of one job at most: a VMDK disk has up to 512 extents, a chain 32 parents
MAX_CONNECTIONS = 16  # to servers, of one disk at a time


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file that an earlier worker of the same disk had open; `name`: the one by which it was opened."""

    name: str
    identity: str  # as `kernel.identity` writes it


@dataclass(frozen=True, slots=True)
class KeptConnection:
    """A connection that an earlier worker of the same disk had, or that this one has; see `ConnectTo`.

    `is_broken`: the network has given it up, so that its end will never be seen.
    """

    server: str
    place: int
    is_broken: bool = False


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A file that a worker of the last release had open, as `kernel.process.OpenFile`."""

    path: str
    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class Job:
    """What may be opened. Descriptors: the worker's socket, an O_PATH one per item of `kept`, the `connections`.

    If there are more than MAX_CARRIED, the rest comes beside `Ack`s, up to MAX_CARRIED beside each.

    vbd              for people: "vbd/5/51712"
    chains           texts. The first one is in service, or will be: its names mean the files in `kept`. A second one is
                     to take its place: its names are looked up again, and a name that still means the file kept for it
                     is opened by what is kept
    keeps            the names of the second chain mean the files in `kept`, too
    read_only        nothing may be opened for writing, except what a layer records
    parents          places in which the settings allow files that images name
    in_service       files that images may lead to because they did in the last release
    makes            path of the one file that may be made; empty: none
    export           path of the socket that may be made to listen; empty: none
    host             for `kernel.ports`, whose devices may be opened; empty: none may
    frontend_domid   the domain for which devices are opened
    turns            path of the file by which processes take turns at making keys (`kernel.in_turn`); empty: no turns
    scratch          directory for the disk's unnamed file (`block.files.UNNAMED`)
    names_unnamed    path that the unnamed file of the chain in service gets, for the second chain; empty: none
    renews_unnamed   the second chain gets an unnamed file of its own
    only_connects    nothing but `ConnectTo` is answered: a worker gets such an opener when it says that it wants one
    """

    vbd: str
    chains: list[str]
    read_only: bool
    shareable: bool = False
    keeps: bool = False
    kept: list[KeptFile] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)
    in_service: list[HeldFile] = field(default_factory=list)
    makes: str = ""
    export: str = ""
    host: str = ""
    frontend_domid: int = 0
    connections: list[KeptConnection] = field(default_factory=list)
    turns: str = ""
    scratch: str = ""
    names_unnamed: str = ""
    renews_unnamed: bool = False
    only_connects: bool = False
