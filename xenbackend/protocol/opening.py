"""The messages by which something is opened for a worker, which opens nothing itself: plain values, strict both ways.

Must not open anything, nor know how files are told apart: `kernel.identity` writes and compares identities.

    supervisor                        opener                              worker
      Job                        ->
                                        <-  LookAt, FindFile, OpenFile ...   one at a time
                                 <-     Opened, Made, Connected, Undrained   what it has, to be kept; it waits for ...
      Ack                        ->
                                 <-     Waits         a step has not returned for a second, or has now
                                        Given  ->                            exactly one for each question

A `Look` in the place of a job asks what names mean now, and gets a `Meaning` for each; there is no worker then.

An opener is a process of its own, for one order or question to one worker (`messages`): it ends when the worker closes
its end of the socket. Both sockets are SOCK_SEQPACKET; descriptors travel beside a message, as its docstring says.

What a worker asks is as hostile as what a guest writes. It may name what its job's chains name, and what the opener has
found for it; everything else is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xenbackend.protocol import codec
from xenbackend.protocol.jobs import Job

MAX_MESSAGE = 256 * 1024  # bytes of one datagram
MAX_CARRIED = 250  # descriptors beside one datagram; SCM_MAX_FD of net/scm.h is 253
MAX_NAMES = 16  # by which an image may name one parent
MAX_REFUSED = 8  # files that images name, of one job; a chain is not opened after the first, and its former one next
WAITS_S = 1.0  # after which `Waits` says that storage does not answer


@dataclass(frozen=True, slots=True)
class Look:
    """Say what each of these names means now. It comes instead of a `Job`: nothing is opened, there is no worker."""

    names: list[str]


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name means now: an identity as `kernel.identity` writes it, or the errno of the failure to look."""

    name: str
    identity: str = ""
    errno: int = 0


@dataclass(frozen=True, slots=True)
class Opened:
    """A name was looked up. Descriptors: an O_PATH one of its file, to be kept while the disk lives.

    chain      index in `Job.chains` of the chain that has led to it
    is_again   the descriptor that was kept leads to no file any more (ESTALE); this one of the same file replaces it
    """

    name: str
    identity: str
    chain: int
    is_again: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """A memory was made. Descriptors: the memory, to be kept in place of a former one of that name."""

    name: str


@dataclass(frozen=True, slots=True)
class Waits:
    """The storage of the file `name` does not answer; empty: it has answered. There is no `Ack`.

    makes_key   instead, a key is being made of the passphrase in `name`, or waits for its turn
    """

    name: str
    makes_key: bool = False


@dataclass(frozen=True, slots=True)
class Connected:
    """A server was connected to. Descriptors: the socket, to be kept in place of a former one with server and place.

    `is_alone`: all other connections have ended, and need not be kept.
    """

    server: str
    place: int
    is_alone: bool


@dataclass(frozen=True, slots=True)
class Undrained:
    """A former connection does not end, so its server may still do what it received: no other one takes its place.

    `is_broken`: the network has given it up; otherwise nothing has come from it for too long.
    """

    server: str
    place: int
    is_broken: bool


@dataclass(frozen=True, slots=True)
class Ack:
    """What was found is kept, and the worker may have it; if it may not, `refusal` is a sentence about why."""

    refusal: str = ""


@dataclass(frozen=True, slots=True)
class LookAt:
    """Return the facts of a file, without opening it."""

    name: str
    chain: int = 0


@dataclass(frozen=True, slots=True)
class FindFile:
    """Find the file that an image names, if an administrator has allowed that: from then on its path may be opened.

    what       `block.mapped.parents`: PARENT, DATA_FILE or EXTENT
    named_by   the path of the image, which may be opened itself
    names      what it says, relative to its own directory, or absolute; MAX_NAMES at most
    """

    what: str
    named_by: str
    names: list[str]
    chain: int = 0


@dataclass(frozen=True, slots=True)
class OpenFile:
    """Open a file. The answer has a descriptor of a new open file description.

    create     make it if it is not there, as a regular file for its owner only
    claims     claim a block device, as `kernel.claims.open_medium`; the answer is EBUSY if somebody else uses it. This
               is required for writing, unless the disk or the layer is shared
    stands_in  with `create`, and for a chain that is to be put in: make nothing yet. Until the same is asked without
               this, the name means an unnamed file, if there is none or an empty one
    """

    name: str
    write: bool
    create: bool = False
    claims: bool = False
    chain: int = 0
    stands_in: bool = False


@dataclass(frozen=True, slots=True)
class LookBeside:
    """Look whether an image, which the worker has locked, is in use by another face: the answer is EBUSY if it is.

    write, shareable   how it is open, as `kernel.locks.access`
    """

    name: str
    write: bool
    shareable: bool
    chain: int = 0


@dataclass(frozen=True, slots=True)
class SayWhoUses:
    """Say who uses an image, which the worker has closed by now. The answer is EBUSY, with a sentence and a user.

    write, shareable   how it was to be opened, as `kernel.locks.access`
    is_claimed         it is a block device that could not be opened; otherwise it could not be locked
    with_names         find out who uses it, which takes a look at every process
    """

    name: str
    write: bool
    shareable: bool
    is_claimed: bool
    with_names: bool
    chain: int = 0


@dataclass(frozen=True, slots=True)
class Resolve:
    """Return the path of a file's directory with all links followed, if the file may be opened or made."""

    name: str
    chain: int = 0


@dataclass(frozen=True, slots=True)
class MakeFile:
    """Make `Job.makes`, at first under a temporary name. The answer has its descriptor, for reading and writing."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Mark the file of `MakeFile` with its parent, make it durable, and give it its name, never over another file."""


@dataclass(frozen=True, slots=True)
class MakeMemory:
    """Make a sealed memory of zeros, which the supervisor keeps for the worker's successors. The answer has it.

    size   bytes
    """

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class OpenDevices:
    """Open the devices of `Job.host`. The answer has their descriptors, in the order of `kernel.ports.open_devices`."""


@dataclass(frozen=True, slots=True)
class Listen:
    """Listen at `Job.export`, replacing what is there. The answer has the socket."""


@dataclass(frozen=True, slots=True)
class ConnectTo:
    """Connect to a server that the chain names. The answer has the socket.

    place   tells the connections of a layer to the same server apart
    after   of `block.servers.After`: which former connections must end first
    keeps   it is for a disk in service: the supervisor keeps the socket beyond the worker's end
    """

    server: str
    place: int
    after: str
    keeps: bool
    chain: int = 0


@dataclass(frozen=True, slots=True)
class Derive:
    """Make a key of a passphrase that the chain names. The answer has a memory of `length` bytes with the key.

    The other fields are those of `block.keys.Derivation`, `salt` in hexadecimal digits.

    without_newline   leave out the newline at the passphrase's end; the answer is ENODATA if it has none
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
    """Read the settings of a client of a cluster that the chain names: the answer's `settings`, with a key.

    conf, user   as `block.servers.Account`
    """

    conf: str
    user: str
    chain: int = 0


@dataclass(frozen=True, slots=True)
class ReadCertificates:
    """Read the certificates in a directory that the chain names: the answer's `settings`, by the names of the files."""

    directory: str
    chain: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file is.

    identity               as `kernel.identity` writes it
    is_device              it is a block device; otherwise it is a regular file
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
    """The answer to a question. Descriptors: as the question says; none if it failed.

    errno      0: it was done
    sentence   why it failed, for people; empty: as errno says
    path       of the file that was found or resolved, or that the failure is about
    facts      of the file
    user       who uses an image that is in use, if that is known
    by         the act of an administrator that allows the file (`block.driver.Found`)
    is_marked  the published file is marked with its parent
    settings   of a client of a cluster, by name, with `block.servers.DISK`; or certificates
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
    | MakeMemory
    | OpenDevices
    | Listen
    | ConnectTo
    | Derive
    | ReadCluster
    | ReadCertificates
)
Found = Opened | Made | Connected | Undrained
FromOpener = Found | Given | Meaning | Waits
FromSupervisor = Job | Ack | Look


def encode(message: Question | FromOpener | FromSupervisor) -> bytes:
    """Return the datagram for a message."""
    return codec.encode(message)


def from_worker(datagram: bytes) -> Question:
    """Return a worker's question. Raises: `codec.NotAMessage`, for anything that `encode` does not make of one."""
    return codec.decode(Question, datagram)  # type: ignore[no-any-return]  # it is of that union


def from_opener(datagram: bytes) -> FromOpener:
    """Return an opener's message. Raises: `codec.NotAMessage`."""
    return codec.decode(FromOpener, datagram)  # type: ignore[no-any-return]  # it is of that union


def from_supervisor(datagram: bytes) -> FromSupervisor:
    """Return a supervisor's message. Raises: `codec.NotAMessage`."""
    return codec.decode(FromSupervisor, datagram)  # type: ignore[no-any-return]  # it is of that union
