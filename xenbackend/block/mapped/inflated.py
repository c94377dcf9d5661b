"""Reads compressed clusters of a disk: each is inflated once for all requests that wait for it; the last one is kept.

Must not know how a format compresses clusters, nor where it records that.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

from xenbackend.block.mapped.io import ImageIO
from xenbackend.block.mapped.shared import Once
from xenbackend.block.request import Request
from xenbackend.errors import DriverError
from xenbackend.units import SECTOR, round_up

Inflate = Callable[[bytes], bytes]  # from a compressed cluster, perhaps with other bytes behind it, to a cluster


class Inflated:
    """Reads from compressed clusters, for `MappedDisk.read_special`.

    Args:
        io: the image's.
        cluster_bits: a cluster has 2 to the power of this many bytes.
    """

    def __init__(self, io: ImageIO, cluster_bits: int) -> None:
        self._io = io
        self._bits = cluster_bits
        self._last: tuple[int, bytes] = (-1, b"")
        self._inflating: Once[Request] = Once(self._give)

    def read(self, request: Request, key: int, place: int, length: int, inflate: Inflate) -> None:
        """Do a read inside one cluster.

        Args:
            request: the read.
            key: a number that no other cluster has, and that this cluster does not have after it is rewritten.
            place: where its compressed data begin in the file, in bytes.
            length: the most bytes that they can have.
            inflate: inflates them; if it raises DriverError, the read ends with EIO.
        """
        if key == self._last[0]:
            self._give(request, 0, self._last[1])
        else:
            self._inflating.want(key, request, partial(self._begin, key, place, length, inflate))

    def _begin(self, key: int, place: int, length: int, inflate: Inflate, then: Callable[[int, bytes], None]) -> None:
        first = place // SECTOR * SECTOR
        got = partial(self._read, key, place - first, inflate, then)
        self._io.read_meta(first, round_up(place + length, SECTOR) - first, got)

    def _read(
        self, key: int, skip: int, inflate: Inflate, then: Callable[[int, bytes], None], status: int, data: memoryview
    ) -> None:
        cluster = b""
        if not status:
            try:
                cluster = inflate(bytes(data[skip:]))
                self._last = key, cluster
            except DriverError:
                status = errno.EIO
        then(status, cluster)

    def _give(self, request: Request, status: int, cluster: bytes) -> None:
        if status:
            self._io.finish(request, status)
            return
        place = request.offset & ((1 << self._bits) - 1)
        for view in request.iov:
            view[:] = cluster[place : place + len(view)]
            place += len(view)
        self._io.finish(request, 0)
