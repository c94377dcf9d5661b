"""What a disk holds, as our drivers read it and as QEMU does: for the tests of images."""

from __future__ import annotations

from pathlib import Path

from tests.helpers_block import content, read, write
from tests.qemu import qemu_img
from xenbackend.block.formats.table import FORMATS
from xenbackend.block.spec import parse_chain
from xenbackend.image.session import Session

_STEP = 1 << 20  # bytes of a request


def disk_content(text: str, length: int | None = None) -> bytes:
    """Return what a chain reads as, or its beginning."""
    with Session() as session:
        disk = session.open(parse_chain(text), read_only=True)
        end = disk.size if length is None else length
        requests = [read(place, min(_STEP, end - place)) for place in range(0, end, _STEP)]
        session.do(disk, *requests)
        return b"".join(map(content, requests))


def disk_write(text: str, pieces: dict[int, bytes]) -> None:
    """Write to a chain."""
    with Session() as session:
        session.do(disk := session.open(parse_chain(text), read_only=False), *[write(*each) for each in pieces.items()])
        session.close(disk)


def assert_same_for_qemu(first: Path, image_format: str, raw: Path) -> None:
    """Have QEMU compare an image with a raw one."""
    qemu_img("compare", "-f", FORMATS[image_format].qemu_name, "-F", "raw", first, raw)


def leak(path: Path, clusters: int = 1) -> None:
    """Lengthen a small QCOW2 image, of 64 KiB clusters as QEMU lays it out or we do, by clusters that nothing uses."""
    first = -(-path.stat().st_size // 65536)
    with path.open("r+b") as file:
        file.truncate((first + clusters) * 65536)
        file.seek(2 * 65536 + 2 * first)  # the first refcount block
        file.write(b"\0\1" * clusters)


def ignore(_done: int, _total: int) -> None:
    """Ignore progress."""
