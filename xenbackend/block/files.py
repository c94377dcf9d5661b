"""What a driver sees of files, servers and clusters, all of which somebody else opens: `worker.files`, `image.session`.

Must not do anything: these are the shapes that both sides agree on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from xenbackend.block.keys import Derivation
from xenbackend.block.request import Complete, Request
from xenbackend.block.servers import Account, After, Endpoint

if TYPE_CHECKING:
    import socket

# In the place of a path: a file that has no name, in a directory of the settings. It begins empty, is there for as long
# as the disk is attached, whoever serves it, and nothing of it can be left.
UNNAMED = "(unnamed)"


class File(Protocol):
    """An open image file or block device: itself a bottom layer, with blocking helpers for `open` only."""

    size: int  # bytes
    sector_size: int  # bytes; what was asked for, or the smallest unit that the medium writes
    physical_sector_size: int  # bytes; what the medium writes at once
    can_discard: bool
    discard_granularity: int  # bytes, 0 where it cannot discard
    complete: Complete  # set by the owner before the first submit
    mode: str  # what was chosen, for people: "O_DIRECT, Linux AIO"

    def submit(self, batch: list[Request]) -> None:
        """Take requests as a driver does (D1-D9). Reads past the end of the file give zeros."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Read up to `length` bytes, blocking. For `open` only. Raises: OSError."""

    def write_at(self, offset: int, data: bytes) -> None:
        """Write all of `data`, blocking. For `open` and `close` only. Raises: OSError."""

    def sync(self) -> None:
        """Make everything durable, blocking. For `open` and `close` only. Raises: OSError."""

    @property
    def allocated(self) -> int:
        """Bytes that the host keeps for it: fewer than `size` where it has holes; 0 for a block device."""

    def next_data(self, offset: int) -> tuple[int, int]:
        """Return where the first data at or behind `offset` begin and end, in bytes: in between are holes.

        What cannot have holes, such as a block device, is all data; where there are none, it is `size` twice.

        Raises: OSError.
        """

    def grow(self, size: int, tail: bytes = b"") -> None:
        """Make the file `size` bytes long; never shorter. What is new reads as zeros, up to `tail` at the very end.

        File and tail appear in one step: whoever is killed leaves both or nothing. Blocking, but quick without `tail`:
        then `submit` may call it, else a thread.

        Raises: OSError; ENOSPC for a block device, EINVAL for a size that the medium cannot have.
        """

    def close(self) -> None:
        """Release the file and its lock; nothing is in flight."""


@dataclass(frozen=True, slots=True)
class Found:
    """The file that an image means: `path` opens it from now on, `by` says by which act of an administrator."""

    path: str
    by: str


class FileFacts(Protocol):
    """What a file is; `identity` tells it from any other, whatever it is called."""

    @property
    def identity(self) -> str:
        """Equal texts are of one file, or of one block device."""

    @property
    def is_device(self) -> bool:
        """It is a block device, else a regular file."""

    @property
    def mtime_ns(self) -> int:
        """Time of its last change, since 1970; of an image that is open by this path, of the last one before."""

    @property
    def real(self) -> str:
        """Its path with all links followed."""


class Lookup(Protocol):
    """Says what names mean. A driver looks nothing up itself: the process that it runs in may not be able to."""

    def look(self, path: str) -> FileFacts:
        """Return what a file is, without opening it. Raises: OSError; DriverError where it cannot be an image."""

    def resolve(self, path: str) -> str:
        """Return the directory of a file with all links followed. Raises: DriverError."""

    def find(self, what: str, image: str, names: Sequence[str], within: str = "") -> Found:
        """Find the file that an image names, if an administrator has allowed that this image is followed to it.

        From then on `open` of the path that it returns opens that very file, for reading, whatever the name means by
        then. An image is not to be trusted.

        Args:
            what: of `block.mapped.parents`: PARENT, DATA_FILE or EXTENT.
            image: the path by which the image itself was opened.
            names: what it says, the likeliest name first, relative to its own directory, or absolute.
            within: what the chain says of where such files may be (`parents=`).

        Raises: DriverError.
        """


class Files(Lookup, Protocol):
    """Opens image files, with the lock that keeps two writers apart."""

    def connect(self, endpoint: Endpoint, place: int, after: After, *, keeps: bool) -> socket.socket:
        """Return a socket connected to a server; drivers call `Env.connect`, which knows what came before."""

    def derive(self, source: str, how: Derivation, *, without_newline: bool = False) -> memoryview:
        """Return a key that is made of a passphrase, in memory that is the caller's to wipe. For `open` only.

        It takes up to minutes, and is done by an opener: a worker never gets the passphrase.

        Args:
            source: where the passphrase is; an option of the layer has it as a `block.keys.KeySource`.
            how: as a header says.
            without_newline: make it of all of the passphrase but the newline at its end; ENODATA: it has none.

        Raises: DriverError, OSError.
        """

    def read_cluster(self, account: Account) -> Mapping[str, str]:
        """Return what a client of a cluster has to know: Ceph's options by their names, the key among them.

        An opener reads it from the host's files; of monitors the names are resolved. For a guest's disk there is a text
        besides that no other disk has, of this host or another one (`block.servers.DISK`).

        Raises: DriverError, also for an account that the layer's options do not name (`block.servers`); OSError.
        """

    def read_certificates(self, directory: str) -> Mapping[str, str]:
        """Return what is in the files of a directory that are for TLS, by their names (`block.servers`), as PEM.

        An opener reads them; the key is the worker's to keep from then on, for connections that are made later.

        Raises: DriverError, also for a directory that the layer's options do not name; OSError.
        """

    def open(
        self,
        path: str,
        *,
        read_only: bool,
        shareable: bool = False,
        direct: bool = True,
        blocking: bool = False,
        step: int = 0,
        sector_size: int = 0,
    ) -> File:
        """Open an image.

        Args:
            path: the file or block device.
            read_only: open it for reading only.
            shareable: others may write to it, too: somebody said so. Otherwise one may who has it alone, or all read.
            direct: bypass the page cache where the file allows.
            blocking: do every request by a blocking call, one after the other.
            step: for image formats whose file may end anywhere, also inside a sector. A file that is opened for writing
                is first made to end at a multiple of so many bytes, by a hole.
            sector_size: bytes of a sector of the disk; 0 for the medium's own. What is opened for reading only may end
                inside its last sector, which zeros make whole.

        Raises: OSError, as open(2) would; DriverError where the file cannot be an image or is locked.
        """

    def open_record(self, path: str) -> int:
        """Return a descriptor of a regular file, for reading and writing; it is made where it is not there.

        Raises: DriverError where it is another thing, or no option of the layer names it as a record; OSError.
        """
