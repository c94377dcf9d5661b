"""The hosts that there is a bed for: Debian releases with their Xen, newest first, and everything that differs.

Must not build anything. No other file may distinguish releases by their numbers.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import zstandard


@dataclass(frozen=True, slots=True)
class Release:
    """One host.

    Attributes:
        xen: the version, as in the names of packages and files.
        suite: Debian's name for the release.
        packages: those that only this release has, or has by another name.
        hypervisor: the file below the root.
        kernel: how the payload of Linux' bzImage is compressed; a key of `DECOMPRESS`.
        modules: how its modules are compressed; busybox' insmod takes only uncompressed ones.
    """

    xen: str
    suite: str
    packages: tuple[str, ...]
    hypervisor: str
    kernel: str
    modules: str


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


# What follows the stream is left alone: the kernel's build puts the size of the content there.
DECOMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "xz": lambda data: lzma.LZMADecompressor().decompress(data),
    "zstd": _zstd,
}

_ALL = (
    Release(
        xen="4.20",
        suite="trixie",
        packages=("xen-hypervisor-4.20-amd64", "xen-utils-4.20"),
        hypervisor="boot/xen-4.20-amd64.gz",
        kernel="zstd",
        modules="xz",
    ),
    Release(
        xen="4.17",
        suite="bookworm",
        packages=("xen-hypervisor-4.17-amd64", "xen-utils-4.17"),
        hypervisor="boot/xen-4.17-amd64.gz",
        kernel="xz",
        modules="",
    ),
)
RELEASES = {each.xen: each for each in _ALL}
NEWEST = _ALL[0]
