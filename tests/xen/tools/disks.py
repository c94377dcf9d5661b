"""Images for disks, on tmpfs or on ext4, where O_DIRECT works, and the line that stands for one in xl's configuration.

Must not need a loop device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.xen.tools.command import run

XEN = tuple(int(Path("/sys/hypervisor/version", part).read_text()) for part in ("major", "minor"))
KIND = "vbd3" if XEN >= (4, 19) else "vbd"  # of a disk in the line that docs/guest-configuration.md has for this Xen
# What xl says of a disk while no service runs, by the kinds that it knows. Of kind `vbd` the kernel's own backend says
# that it is there, so that xl runs our script. Nobody does so of kind `vbd3`, and xl waits for 10 s.
_UNSERVED = {"vbd": "systemctl start xenbackend", "vbd3": "unable to add device with path"}
UNSERVED = {kind: sentence for kind, sentence in _UNSERVED.items() if kind in ("vbd", KIND)}
_WORDS = {"vbd": "script=block-xenbackend", "vbd3": "backendtype=tap,script=block-xenbackend"}


def line(chain: str, vdev: str, access: str = "rw", *, kind: str = KIND) -> str:
    """Return a disk of ours as plain xl takes it."""
    return f"{_WORDS[kind]},vdev={vdev},access={access},target={chain}"


def backend(domid: int, devid: int, *, kind: str = KIND) -> str:
    """Return the directory of such a disk's backend in xenstore."""
    return f"/local/domain/0/backend/{kind}/{domid}/{devid}"


def blank(file: Path, size_mib: int) -> Path:
    """Make a sparse image."""
    with file.open("wb") as image:
        image.truncate(size_mib << 20)
    return file


@contextmanager
def memory_disk(*, sector_size: int = 512, milliseconds: int = 0) -> Iterator[Path]:
    """Have a block device of 1 GiB in memory that answers each request only after so long (Linux' null_blk)."""
    late = ("irqmode=2", f"completion_nsec={milliseconds * 1_000_000}") if milliseconds else ("irqmode=0",)
    run("modprobe", "null_blk", "nr_devices=1", "gb=1", f"bs={sector_size}", "memory_backed=1", "queue_mode=2", *late)
    try:
        yield Path("/dev/nullb0")
    finally:
        run("modprobe", "-r", "null_blk")


def with_files(file: Path, size_mib: int, files: dict[str, str | bytes], *, block_size: int = 1024) -> Path:
    """Make an image with an ext4 file system that holds `files`, by path."""
    tree = file.with_suffix(".tree")
    for path, content in files.items():
        place = tree / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content.encode() if isinstance(content, str) else content)
    blank(file, size_mib)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", block_size, "-d", tree, file)
    return file


def read_file(image: Path, path: str) -> str:
    """Return a file out of an image's ext4 file system that nobody has mounted."""
    return run("debugfs", "-R", f"cat {path}", image).out


def head(device: Path, size: int) -> bytes:
    """Return the first bytes of a device."""
    with device.open("rb") as file:
        return file.read(size)


def check(image: Path) -> None:
    """See that an image's ext4 file system is whole. Raises: Failed."""
    run("e2fsck", "-f", "-n", image)
