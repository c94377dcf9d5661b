"""Unpacks clusters that are compressed by zstd, by the standard library (Python 3.14) or the package `zstandard`.

Must not import either on its own import: `find_unzstd` does, when such an image is opened, or `worker.preload`. An
image's content is not trusted: at most one byte more than a cluster is unpacked, with a window of at most 8 MiB, which
RFC 8878 has every decoder support.

QEMU writes a cluster as one frame; when QEMU reads one, it may be several frames, the last of which ends the cluster.
"""

from __future__ import annotations

import sys
from typing import Any

from xenbackend.block.formats.common import damaged
from xenbackend.block.formats.qcow2_tables import Unpack
from xenbackend.errors import DriverError

_WINDOW_BITS = 23  # log2 of the largest window of a frame: 8 MiB
_MOST_FRAMES = 64  # of a cluster


def find_unzstd() -> Unpack:
    """Return a function that unpacks a cluster. Raises: DriverError if the host has no implementation of zstd."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd

            return OfLibrary(zstd)
        else:  # noqa: RET505 - what follows a `return` would be unreachable to mypy
            import zstandard

            return OfPackage(zstandard)
    except ImportError as error:
        problem = "its clusters are compressed by zstd, for which this Python has no package"
        raise DriverError(f"{problem}; install python3-zstandard, or zstandard with pip") from error


class OfPackage:
    """Unpacks by the package `zstandard`."""

    def __init__(self, zstandard: Any) -> None:
        self._error: type[Exception] = zstandard.ZstdError
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_BITS)

    def __call__(self, data: bytes, cluster_size: int) -> bytes:
        """See `Unpack`."""
        try:
            cluster = self._read(data, cluster_size + 1, across=False)
            if 0 < len(cluster) < cluster_size:
                cluster = self._read(data, cluster_size, across=True)
        except self._error as error:
            raise damaged(f"a compressed cluster cannot be read: {error}") from error
        return _checked(cluster, cluster_size)

    def _read(self, data: bytes, most: int, *, across: bool) -> bytes:
        with self._unpacker.stream_reader(data, read_across_frames=across) as reader:
            return bytes(reader.read(most))


class OfLibrary:
    """Unpacks by `compression.zstd`, or a module with its interface."""

    def __init__(self, zstd: Any) -> None:
        self._error: type[Exception] = zstd.ZstdError
        self._begin = zstd.ZstdDecompressor
        self._options = {zstd.DecompressionParameter.window_log_max: _WINDOW_BITS}

    def __call__(self, data: bytes, cluster_size: int) -> bytes:
        """See `Unpack`."""
        cluster = b""
        try:
            for _ in range(_MOST_FRAMES):
                if len(cluster) >= cluster_size or not data:
                    break
                frame = self._begin(options=self._options)
                cluster += frame.decompress(data, cluster_size + 1 - len(cluster))
                if not frame.eof:
                    break
                data = frame.unused_data
        except self._error as error:
            raise damaged(f"a compressed cluster cannot be read: {error}") from error
        return _checked(cluster, cluster_size)


def _checked(cluster: bytes, cluster_size: int) -> bytes:
    if len(cluster) != cluster_size:
        found = "more" if len(cluster) > cluster_size else str(len(cluster))
        raise damaged(f"a compressed cluster gives {found} bytes and not {cluster_size}")
    return cluster
