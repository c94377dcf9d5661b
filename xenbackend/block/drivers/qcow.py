r"""qcow: an image of QEMU's old format QCOW, version 1; its parent (backing file) is opened automatically.

Synopsis:
    qcow:FILE[,cache=on|off][,share=on|off][,parents=PLACES][,parent_format=FORMAT]

Description:
    The source of a chain for QCOW images of version 1, as made by blktap and QEMU. Data that the image does not have
    are read from its parent, or are zeros if it has none; writes go to the image. For new disks `qcow2:` is the better
    choice.

    The parent is also opened, for reading, in the format that `parent_format=` names: an image of this version does not
    say which format its parent has, and the format is never guessed.

Behaviour:
    Requests for clusters that the image already has go to the file as they are. The first write to a cluster puts it at
    the end of the file, with its old content around the new data; then the table that refers to it is written, and
    the write is answered after that. A kill in the middle wastes at most some room in the file. A flush returns when
    everything that was answered is durable.

    An image whose tables overlap, or reach beyond the end of its file, can be opened for reading only.

    A parent is opened only if an administrator has allowed it: by a mark on the image, which `image create --parent`,
    `image snapshot`, `snapshot` and `image trust` leave, and which names that one file; by `parents=`; or by `parents`
    in the settings. The latter two name directories below which a parent may be, or the parent itself; a device has to
    be named itself. `parents=` takes several, separated by colons. The image is locked while it is open: one writer,
    or any number of readers.

Example:
    log:|qcow:/srv/images/old.qcow
    qcow:/srv/images/child.qcow,parent_format=raw

Limits:
    No encryption, no discard. When a compressed cluster is overwritten, its old room in the file is not reused. L2
    tables take up to 32 MiB of memory, the L1 table up to 32 MiB, information about parents up to 16 MiB. On a block
    device, only clusters that the image already has can be written.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from xenbackend.block.driver import Env, File, Geometry
from xenbackend.block.formats import qcow
from xenbackend.block.formats.common import damaged
from xenbackend.block.formats.qcow2 import Region
from xenbackend.block.qcow.codec import Version1
from xenbackend.block.qcow.disk import QcowDisk
from xenbackend.block.qcow.occupied import Occupied
from xenbackend.block.request import IMAGE_DAMAGED
from xenbackend.loop.steps import Steps
from xenbackend.units import format_size, round_up

_GROW = 64 * 1024  # bytes: the file's size is a multiple of this, which suits the sectors of any medium


class Qcow(QcowDisk):
    """See the head of this file."""

    name = "qcow"

    def open_image(self, env: Env, file: File) -> Geometry:
        """See `QcowDisk`."""
        header = qcow.parse_header(file.read_at, file.size)
        env.report("format", f"QCOW version 1, clusters of {format_size(header.cluster_size)}")
        if header.backing_file:
            self.parent = self.find_parent(header.backing_file, "")
        self.serve(file, header.size, header.cluster_bits, header.l1, Version1(header))
        if not env.read_only:
            _check_tables(self.l1_words(), file.size, header)
            self.serve_writes(End(file, header, self.l1_words()))
        return Geometry(size=header.size, read_only=env.read_only)


def _check_tables(words: Sequence[int], file_size: int, header: qcow.Header) -> None:
    """Refuse tables that overlap, or that are where new clusters would go. Raises: DriverError."""
    length, places = 8 << header.l2_bits, sorted(filter(None, words))
    if places and places[-1] + length > round_up(file_size, header.cluster_size):
        raise damaged(f"its table at byte {places[-1]} reaches beyond the end of the file, where new data would go")
    l1 = header.l1.offset, header.l1.offset + header.l1.length
    spans = sorted([l1, *((place, place + length) for place in places)])
    if any(start < end for (_, end), (start, _) in pairwise(spans)):
        raise damaged("two of its tables overlap, so it can only be opened read-only")


class End:
    """The allocator: hands out clusters beyond the end of the file, where everything reads as zeros."""

    def __init__(self, file: File, header: qcow.Header, l1: Sequence[int]) -> None:
        self._file = file
        self._size = header.cluster_size
        self._next = round_up(file.size, self._size)
        self._table_size = 8 << header.l2_bits
        clusters = (cluster for place in l1 if place for cluster in self._clusters(place))
        self._occupied = Occupied(header.cluster_bits, [Region(0, self._size), header.l1], clusters)

    def reserve(self, count: int, then: Callable[[int, int, int, bool], None]) -> None:
        """See `Allocator`."""
        place, end = self._next, self._next + count * self._size
        try:
            if end > self._file.size:
                self._file.grow(round_up(end, _GROW))
        except OSError as error:
            then(error.errno or errno.EIO, 0, 0, False)
            return
        self._next = end
        then(0, place, count, True)

    def free(self, places: Sequence[int]) -> None:
        """Do nothing with freed clusters: the format has no way to mark them as free."""

    def free_table(self, place: int) -> None:
        """Do nothing with a freed table, either."""

    def note_table(self, place: int) -> None:
        """See `Allocator`."""
        for cluster in self._clusters(place):
            self._occupied.add_table(cluster)

    def tables_among(self, places: Iterable[int]) -> set[int]:
        """See `Allocator`."""
        return self._occupied.among(places)

    def refuse(self) -> Steps[None]:
        """See `Allocator`. This format has no bit for a corrupt image. Raises: OSError."""
        yield from ()
        raise OSError(IMAGE_DAMAGED, "a write would overwrite a table of the image")

    def _clusters(self, place: int) -> range:
        return range(place // self._size * self._size, place + self._table_size, self._size)
