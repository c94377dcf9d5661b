"""What is said when something is opened for a worker, which opens nothing itself: plain values, strict both ways.

Must not open anything, nor know how files are told apart: `kernel.identity` writes an identity, and compares it.

    supervisor                        opener                              worker
      Job                        ->
                                        <-  LookAt, FindFile, OpenFile ...   one at a time
                                 <-     Opened, Connected, Undrained   what it has found shall be kept; it waits for ...
      Ack                        ->
                                 <-     Waits         a step has not come back for a second, or has come back
                                        Given  ->                            exactly one for each question

A `Look` in the place of the job asks what names mean now, and gets a `Meaning` for each; there is no worker then.

An opener is a process of its own, for one order or question to one worker (`messages`): it ends when the worker closes
its end of the socket. Both sockets are SOCK_SEQPACKET; descriptors travel beside a message, as its docstring says.

What a worker asks is as hostile as what a guest writes. It may name what its job's chains name, and what the opener has
found for it; everything else is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xenbackend.protocol import codec

MAX_MESSAGE = 256 * 1024  # bytes of one datagram
MAX_CARRIED = 250  # descriptors beside one datagram; SCM_MAX_FD of net/scm.h is 253
MAX_FILES = 640  # that one job may have to do with: a VMDK disk has up to 512 extents, a chain 32 parents
MAX_CONNECTIONS = 16  # to servers that one disk may have at a time
MAX_NAMES = 16  # by which an image may name one parent
WAITS_S = 1.0  # in which storage has answered, or `Waits` says that it does not


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file that an earlier worker of the same disk had open; `name` is that by which it was opened."""

    name: str
    identity: str  # as `kernel.identity` writes it


@dataclass(frozen=True, slots=True)
class KeptConnection:
    """A connection that an earlier worker of the same disk had, or that this one has; see `ConnectTo`.

    `is_broken`: the network has given it up, so that nobody will see its end.
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

    Those that are more than MAX_CARRIED come beside an `Ack` each time, until all of them are there.

    vbd              for people: "vbd/5/51712"
    chains           texts; the first one is in service, or to be, and what `kept` has is opened through that. A second
                     one is to take its place: its names are looked up anew, and one that means the file that is kept
                     for it is opened through that
    keeps            what `kept` has is opened through that for the second chain, too
    read_only        nothing may be opened for writing, but for what a layer records
    parents          places of the settings where images may lead to
    in_service       files where they may lead to, since they did in the last release
    makes            path of the one file that may be made, empty: none
    export           path of the socket that may be listened at, empty: none
    host             for `kernel.ports`: the devices may be opened there, empty: they may not
    frontend_domid   of the domain that they are for
    turns            path of the file by which those take turns that make keys (`kernel.in_turn`); empty: nobody else
    scratch          directory for the disk's unnamed file (`block.files.UNNAMED`)
    names_unnamed    path that the unnamed file of the chain in service gets, for the second chain; empty: none
    renews_unnamed   the second chain has another unnamed file than the one in service
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


@dataclass(frozen=True, slots=True)
class Look:
    """Say of each of these names what it means now: nothing is opened, and there is no worker. It comes for a Job."""

    names: list[str]


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name means now: an identity as `kernel.identity` writes it, or the errno of what was met instead."""

    name: str
    identity: str = ""
    errno: int = 0


@dataclass(frozen=True, slots=True)
class Opened:
    """A name was looked up. Descriptors: an O_PATH one of its file, to be kept while the disk lives.

    `chain` is the place in `Job.chains` of the one that has led to it.
    """

    name: str
    identity: str
    chain: int


@dataclass(frozen=True, slots=True)
class Waits:
    """The storage of a file does not answer; empty: it has answered. Nobody acknowledges it.

    makes_key   instead, a key is being made of the passphrase that is there, or waits for its turn
    """

    name: str
    makes_key: bool = False


@dataclass(frozen=True, slots=True)
class Connected:
    """A server was connected to. Descriptors: the socket, to be kept in the place of a former one of the same name.

    `is_alone`: all others have ended, and are kept no more.
    """

    server: str
    place: int
    is_alone: bool


@dataclass(frozen=True, slots=True)
class Undrained:
    """A former connection has no end, so that its server may still do what it was given: nothing takes its place.

    `is_broken`: the network has given it up; else nothing has come of it for too long.
    """

    server: str
    place: int
    is_broken: bool


@dataclass(frozen=True, slots=True)
class Ack:
    """The file is kept, and the worker may have it; or it may not, for which `refusal` is a sentence."""

    refusal: str = ""


@dataclass(frozen=True, slots=True)
class LookAt:
    """Say what a file is. It is not opened for anything."""

    name: str
    chain: int = 0


@dataclass(frozen=True, slots=True)
class FindFile:
    """Find the file that an image names, if an administrator has allowed that: from then on its path may be opened.

    what       `block.mapped.parents`: PARENT, DATA_FILE or EXTENT
    named_by   the path of the image, which may be opened itself
    names      what it says, relative to its own directory, or absolute
    """

    what: str
    named_by: str
    names: list[str]
    chain: int = 0


@dataclass(frozen=True, slots=True)
class OpenFile:
    """Open a file. The answer has a descriptor of an open file description that nobody else has.

    create   make it if it is not there, as a regular file for its owner only
    claims   have a block device to oneself, as `kernel.claims.open_medium`; EBUSY is the answer where somebody else
             uses it. Whoever writes has to, unless the disk or the layer is shared.
    """

    name: str
    write: bool
    create: bool = False
    claims: bool = False
    chain: int = 0


@dataclass(frozen=True, slots=True)
class LookBeside:
    """Look whether an image, which the worker has locked, is in use by another face: EBUSY is the answer if it is.

    write, shareable   how it is open, as `kernel.locks.access`
    """

    name: str
    write: bool
    shareable: bool
    chain: int = 0


@dataclass(frozen=True, slots=True)
class SayWhoUses:
    """Say why an image cannot be had; the worker has it open no more. The answer is EBUSY, with a sentence and a user.

    write, shareable   how it was to be opened, as `kernel.locks.access`
    is_claimed         it is a block device, and could not be opened; else it could not be locked
    with_names         look who uses it, which takes a look at every process
    """

    name: str
    write: bool
    shareable: bool
    is_claimed: bool
    with_names: bool
    chain: int = 0


@dataclass(frozen=True, slots=True)
class Resolve:
    """Say which path the directory of a file is with all links followed, if the file may be opened, or made."""

    name: str
    chain: int = 0


@dataclass(frozen=True, slots=True)
class MakeFile:
    """Make `Job.makes`, under another name at first. The answer has its descriptor, open for reading and writing."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Mark what `MakeFile` made with its parent, make it durable, and give it its name, never over another file."""


@dataclass(frozen=True, slots=True)
class OpenDevices:
    """Open the devices of `Job.host`. The answer has their descriptors, in the order of `kernel.ports.open_devices`."""


@dataclass(frozen=True, slots=True)
class Listen:
    """Listen at `Job.export`, in the place of what is there. The answer has the socket."""


@dataclass(frozen=True, slots=True)
class ConnectTo:
    """Connect to a server that the chain names. The answer has the socket.

    place   tells one connection to a server from another one of the same layer
    after   of `block.servers.After`: which former connections must have ended before
    keeps   the disk is served by it: the supervisor keeps the socket beyond the worker's end
    """

    server: str
    place: int
    after: str
    keeps: bool
    chain: int = 0


@dataclass(frozen=True, slots=True)
class Derive:
    """Make a key of a passphrase that the chain names. The answer has a memory of `length` bytes with it.

    The other fields are those of `block.keys.Derivation`, `salt` in hexadecimal digits.

    without_newline   of the passphrase without the newline at its end; ENODATA is the answer where it has none
    """

    source: str
    function: str
    salt: str
    length: int
    iterations: int
    hash: str
    memory_kib: int
    lanes: int
    without_newline: bool
    chain: int = 0


@dataclass(frozen=True, slots=True)
class ReadCluster:
    """Read what a client of a cluster that the chain names has to know: the answer's `settings`, a key among them.

    conf, user   as `block.servers.Account`
    """

    conf: str
    user: str
    chain: int = 0


@dataclass(frozen=True, slots=True)
class ReadCertificates:
    """Read the certificates of a directory that the chain names: they are the answer's `settings`, by files' names."""

    directory: str
    chain: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file is.

    identity               as `kernel.identity` writes it
    is_device              it is a block device; else it is a regular file
    size                   bytes
    mtime_ns               time of its last change, since 1970
    discard_granularity    bytes, of a device; 0: it cannot discard
    real                   its path with all links followed
    """

    identity: str
    is_device: bool
    size: int
    mtime_ns: int
    discard_granularity: int
    real: str


@dataclass(frozen=True, slots=True)
class Given:
    """The answer to a question. Descriptors: as the question says, none where it failed.

    errno      0: it was done
    sentence   why it was not, for people; empty: as errno says
    path       of a file that was found or resolved, or which the failure is about
    facts      of the file
    user       who uses an image that is in use, where that is known
    by         the act of an administrator by which a file was found (`block.driver.Found`)
    is_marked  what was published is marked with its parent
    settings   of a client of a cluster, by their names, with `block.servers.DISK`; or certificates
    """

    errno: int = 0
    sentence: str = ""
    path: str = ""
    facts: Facts | None = None
    user: str = ""
    by: str = ""
    is_marked: bool = False
    settings: dict[str, str] = field(default_factory=dict)


Question = (
    LookAt
    | FindFile
    | OpenFile
    | LookBeside
    | SayWhoUses
    | Resolve
    | MakeFile
    | Publish
    | OpenDevices
    | Listen
    | ConnectTo
    | Derive
    | ReadCluster
    | ReadCertificates
)
Found = Opened | Connected | Undrained
FromOpener = Found | Given | Meaning | Waits
FromSupervisor = Job | Ack | Look


def encode(message: Question | FromOpener | FromSupervisor) -> bytes:
    """Return the datagram for a message."""
    return codec.encode(message)


def from_worker(datagram: bytes) -> Question:
    """Return what a worker asks. Raises: `codec.NotAMessage` for anything that `encode` does not make of it."""
    return codec.decode(Question, datagram)  # type: ignore[no-any-return]  # it is of that union


def from_opener(datagram: bytes) -> FromOpener:
    """Return what an opener says. Raises: `codec.NotAMessage`."""
    return codec.decode(FromOpener, datagram)  # type: ignore[no-any-return]  # it is of that union


def from_supervisor(datagram: bytes) -> FromSupervisor:
    """Return what a supervisor says. Raises: `codec.NotAMessage`."""
    return codec.decode(FromSupervisor, datagram)  # type: ignore[no-any-return]  # it is of that union
