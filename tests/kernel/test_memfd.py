"""Memory that processes share, and that none of them can shrink under the others."""

from __future__ import annotations

import errno
import fcntl
import os
import socket

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel import memfd
from xenbackend.units import PAGE


def unsealed(size: int, content: bytes = b"", flags: int = os.MFD_CLOEXEC) -> int:
    """Return a memory as any program would make one."""
    fd = os.memfd_create("test", flags)
    os.ftruncate(fd, size)
    os.pwrite(fd, content, 0)
    return fd


def test_what_is_made_has_its_size_for_good() -> None:
    """A memory's size and seals cannot be changed, so whoever maps it can touch all of it."""
    fd = memfd.make("test", 3 * PAGE)
    memory = memfd.map_sealed(fd, 3 * PAGE)
    for size in (0, PAGE, 4 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    for seal in (fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK):
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    memory[-1] = 7
    os.close(fd)

    assert (7, 3 * PAGE) == (memory[-1], len(memory))


@pytest.mark.parametrize(
    "what", ["unsealed", "half sealed", "open seals", "smaller", "larger", "file", "socket", "closed"]
)
def test_what_could_be_cut_short_is_not_mapped(what: str) -> None:
    """A descriptor that is not a memory, not fully sealed, or of another size, is refused."""
    near, far = socket.socketpair()
    fd = {
        "unsealed": lambda: unsealed(PAGE),
        "half sealed": lambda: unsealed(PAGE, flags=os.MFD_ALLOW_SEALING),
        "open seals": lambda: unsealed(PAGE, flags=os.MFD_ALLOW_SEALING),
        "smaller": lambda: memfd.make("test", PAGE - 1),
        "larger": lambda: memfd.make("test", 2 * PAGE),
        "file": lambda: os.open(__file__, os.O_RDONLY),
        "socket": lambda: os.dup(near.fileno()),
        "closed": lambda: 9999,
    }[what]()
    if what == "half sealed":
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    if what == "open seals":  # sealing it against writing would make every later mapping fail
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    with pytest.raises(KernelError, match="cut short"):
        memfd.map_sealed(fd, PAGE)

    assert not memfd.is_sealed(fd, PAGE)
    assert memfd.is_memory(fd) == (what not in ("file", "socket", "closed"))
    near.close()
    far.close()
    if what != "closed":
        os.close(fd)


@pytest.mark.parametrize("size", [2**63, 2**70, -1])
def test_a_size_that_cannot_be_is_an_error(size: int) -> None:
    """If the kernel refuses the size, an error says so, and nothing is left open."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(KernelError, match="make a memory"):
        memfd.make("test", size)

    assert before == os.listdir("/proc/self/fd")


def test_what_was_written_protected_is_an_error() -> None:
    """A memory that is also sealed against writing cannot be mapped, and the error says so."""
    fd = unsealed(PAGE, flags=os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, memfd.SEALS | fcntl.F_SEAL_WRITE)
    with pytest.raises(KernelError, match="map a memory"):
        memfd.map_sealed(fd, PAGE)
    os.close(fd)


def test_a_copy_is_sealed_and_as_sparse() -> None:
    """A copy has the contents at the same places, is sealed, and is as sparse."""
    size = 3 << 30
    fd = unsealed(size, b"first")
    os.pwrite(fd, b"last", size - 4)
    os.pwrite(fd, b"x" * (5 << 20), (1 << 30) + 5)
    copy = memfd.copy(fd, "test", 8 << 20)
    found = os.pread(copy, 6, 0), os.pread(copy, 9, size - 4), os.pread(copy, 6 << 20, 1 << 30).strip(b"\0")

    assert (b"first\0", b"last", b"x" * (5 << 20)) == found
    assert memfd.is_sealed(copy, size)
    assert os.fstat(copy).st_blocks * 512 < 16 << 20
    os.close(fd)
    os.close(copy)


@pytest.mark.parametrize("content", [b"", b"x" * 4097])
def test_a_copy_has_a_limit(content: bytes) -> None:
    """An empty memory, or one with more contents than the limit, is not copied."""
    fd = unsealed(len(content), content)
    with pytest.raises(KernelError) as problem:
        memfd.copy(fd, "test", 4096)
    os.close(fd)

    assert errno.ENOMEM == problem.value.errno


def test_what_is_shorter_than_expected_leaves_the_rest() -> None:
    """A memory that is shorter than expected, or is truncated, is read as far as it goes; the reader survives."""
    fd = unsealed(PAGE + 3, b"a" * (PAGE + 3))
    target = memoryview(bytearray(b"-" * 2 * PAGE))
    memfd.read_into(fd, 1, target)
    os.ftruncate(fd, 0)
    memfd.read_into(fd, 0, target)

    assert b"a" * (PAGE + 2) + b"-" * (PAGE - 2) == bytes(target)
    os.close(fd)


def test_a_small_memory_is_wiped() -> None:
    """A memory of one page is wiped, also for those that map it; a larger one cannot hold a key, and is kept."""
    for size, left in ((PAGE, b"\0"), (2 * PAGE, b"k")):
        fd = memfd.make("test", size)
        view = memfd.map_sealed(fd, size)
        view[:] = b"k" * size
        memfd.wipe(fd)
        assert left * size == bytes(view)
        os.close(fd)
    with pytest.raises(KernelError, match="overwrite a memory"):
        memfd.wipe(fd)
