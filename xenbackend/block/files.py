"""The interfaces by which a driver gets files, servers and clusters: `worker.files` and `image.session` open them.

Must not do anything itself: these are protocols, on which both sides agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from xenbackend.block.keys import Derivation
from xenbackend.block.length import Lengths
from xenbackend.block.places import Places
from xenbackend.block.request import Complete, Request
from xenbackend.block.servers import Account, After, Endpoint

if TYPE_CHECKING:
    import socket

# Instead of a path: a file without a name, in a directory of the settings. It is empty at first, exists as long as the
# disk is attached, whichever worker serves that, and leaves nothing behind.
UNNAMED = "(unnamed)"


class File(Protocol):
    """An open image file or block device. It takes requests as a bottom layer does; its other methods block."""

    size: int  # bytes
    sector_size: int  # bytes; the size that was asked for, or the smallest unit that the medium writes
    physical_sector_size: int  # bytes; the unit in which the medium writes
    can_discard: bool
    discard_granularity: int  # bytes, 0 if it cannot discard
    complete: Complete  # set by the owner before the first submit
    mode: str  # how I/O is done, for people: "O_DIRECT, Linux AIO"

    def submit(self, batch: list[Request]) -> None:
        """Take requests as a driver does (D1-D9). Reads beyond the end of the file return zeros."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Read up to `length` bytes, blocking. For `open` only. Raises: OSError."""

    def write_at(self, offset: int, data: bytes) -> None:
        """Write all of `data`, blocking. For `open` and `close` only. Raises: OSError."""

    def sync(self) -> None:
        """Make everything durable, blocking. For `open` and `close` only. Raises: OSError."""

    @property
    def allocated(self) -> int:
        """The bytes that the host has allocated for it: fewer than `size` if it has holes; 0 for a block device."""

    def next_data(self, offset: int) -> tuple[int, int]:
        """Return where the first data at or after `offset` begin and end, in bytes; before them is a hole.

        If there are no more data, return `size` twice. What cannot have holes, such as a block device, is all data.

        Raises: OSError.
        """

    def grow(self, size: int, tail: bytes = b"") -> None:
        """Make the file `size` bytes long, never shorter. The new part reads as zeros, up to `tail` at its very end.

        New size and tail appear in one step: a kill leaves both or neither. It blocks, but is quick without `tail`, so
        that it may be called in `submit`; with `tail` call it in a thread.

        Raises: OSError; ENOSPC for a block device, EINVAL for a size that the medium cannot have.
        """

    def close(self) -> None:
        """Release the file and its lock; nothing is in flight."""


class HostFile(File, Protocol):
    """A file of the host."""

    def read_mapped(
        self, batch: list[Request], places: Places
    ) -> tuple[list[Request], list[tuple[Request, int]], list[Request]]:
        """Do those reads of a batch that lie in one block each whose place in the file is known.

        Args:
            batch: of the owner, who gets it back by this return, and not by `complete`.
            places: where blocks are.

        Returns: reads that the host's memory had, with status 0; those that take longer, with their places; what lies
        in no such block, or is no read, in its order. These two as they were.
        """

    def do_moved(self, batch: list[Request], by: int) -> tuple[list[Request], list[Request]]:
        """Do those reads and writes of a batch that the host's memory can do at once, `by` bytes further on.

        Args:
            batch: of the owner, who gets it back by this return, and not by `complete`.
            by: what is added to each offset.

        Returns: requests that were done, with status 0; those that take longer or failed, as they were.
        """


@dataclass(frozen=True, slots=True)
class Found:
    """The file that an image names: `path` opens it from now on, `by` says which act of an administrator allowed it."""

    path: str
    by: str


class FileFacts(Protocol):
    """Facts about a file; `identity` distinguishes it from any other file, whatever its name is."""

    @property
    def identity(self) -> str:
        """A text that is equal for the same file or block device only."""

    @property
    def is_device(self) -> bool:
        """Whether it is a block device; else it is a regular file."""

    @property
    def mtime_ns(self) -> int:
        """When it was changed last, in ns since 1970; for an image that is open by this path, before it was opened."""

    @property
    def real(self) -> str:
        """Its path, with all links followed."""


class Lookup(Protocol):
    """Looks names up. A driver must not do that by itself, since its process may not be able to."""

    def look(self, path: str) -> FileFacts:
        """Return the facts about a file, without opening it. Raises: OSError; DriverError if it cannot be an image."""

    def resolve(self, path: str) -> str:
        """Return the directory of a file with all links followed. Raises: DriverError."""

    def find(self, what: str, image: str, names: Sequence[str], within: str = "") -> Found:
        """Find the file that an image names, if an administrator has allowed this image to lead to it.

        From then on `open` with the path that is returned opens exactly that file, for reading, whatever the name
        refers to by then. An image is not trusted.

        Args:
            what: PARENT, DATA_FILE or EXTENT of `block.mapped.parents`.
            image: the path by which the image itself was opened.
            names: the names in the image, the likeliest first, relative to its own directory, or absolute.
            within: where the chain says that such files may be (`parents=`).

        Raises: DriverError.
        """


class Files(Lookup, Protocol):
    """Opens image files, with the lock that keeps two writers apart."""

    def connect(self, endpoint: Endpoint, place: int, after: After, *, keeps: bool) -> socket.socket:
        """Return a socket connected to a server. Drivers call `Env.connect`, which knows about former connections."""

    def derive(self, source: str, how: Derivation, *, without_newline: bool = False) -> memoryview:
        """Return a key derived from a passphrase, in memory that the caller has to wipe. For `open` only.

        It may take minutes, and is done by the opener: a worker never gets the passphrase.

        Args:
            source: where the passphrase is, as in an option of the layer that is a `block.keys.KeySource`.
            how: the parameters, as in a header.
            without_newline: leave out the newline at the end of the passphrase; ENODATA if it has none.

        Raises: DriverError, OSError.
        """

    def read_cluster(self, account: Account) -> Mapping[str, str]:
        """Return the settings of a cluster's client: Ceph's options by name, including the key.

        The opener reads them from the host's files, and resolves the names of monitors. For a guest's disk there is a
        text, too, that is unique among the disks of all hosts (`block.servers.DISK`).

        Raises: DriverError, also for an account that the layer's options do not name (`block.servers`); OSError.
        """

    def read_certificates(self, directory: str) -> Mapping[str, str]:
        """Return the contents of a directory's files for TLS, by file name (`block.servers`), as PEM.

        The opener reads them. The worker has to keep them, including the key, for connections that are made later.

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
        lengths: Lengths | None = None,
        is_copy: bool = False,
    ) -> HostFile:
        """Open an image.

        Args:
            path: the file or block device.
            read_only: open it for reading only.
            shareable: others may write to it, too, as somebody has said. Else there is one writer or any readers.
            direct: bypass the page cache if the file allows it.
            blocking: do every request by a blocking call, one after the other.
            step: for image formats whose file may end anywhere, also inside a sector: the size of a file that is opened
                for writing is first increased to a multiple of so many bytes, by a hole.
            sector_size: bytes of a sector of the disk; 0 for that of the medium. A file that is opened for reading only
                may end inside its last sector, which is then filled with zeros.
            lengths: from `Env.lengths`: the file's size is noted there, also when it grows. If the same file is shorter
                than it was, another program has cut off the rest; it is refused, and stays as it is.
            is_copy: the disk has everything elsewhere, too. If another program cuts such a file off, only requests for
                it fail: the disk does not pause, and the file may be opened again.

        Raises: OSError, as open(2) would; DriverError if the file cannot be an image, or is locked.
        """

    def open_record(self, path: str) -> int:
        """Return a descriptor of a regular file, for reading and writing; create the file if necessary.

        Raises: DriverError if it is no regular file, or if no option of the layer names it as a record; OSError.
        """
