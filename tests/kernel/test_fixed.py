"""Pages of a file mapped side by side."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel.fixed import map_pages
from xenbackend.units import PAGE


@pytest.fixture
def pages():
    """A file of 8 pages, each filled with its own number."""
    fd = os.memfd_create("pages")
    os.write(fd, b"".join(bytes([number]) * PAGE for number in range(8)))
    yield fd
    os.close(fd)


@pytest.mark.parametrize("frames", [[0], [1, 2, 3], [5, 4, 7, 0], [6, 6], [2, 3, 0, 1, 7]])
def test_order_is_kept(pages: int, frames: list[int]) -> None:
    """The pages lie in the order asked for, adjacent or not, repeated or not."""
    view, address, release = map_pages(pages, frames, writable=True)

    assert b"".join(bytes([number]) * PAGE for number in frames) == bytes(view)
    assert 0 == address % PAGE
    release()


def test_writes_reach_the_file(pages: int) -> None:
    """A writable mapping is shared with the file."""
    view, _, release = map_pages(pages, [7, 2], writable=True)
    view[PAGE : PAGE + 2] = b"hi"
    release()

    assert b"hi" == os.pread(pages, 2, 2 * PAGE)


def test_read_only_view(pages: int) -> None:
    """A store to a read-only mapping is refused by its view, before the processor would trap."""
    view, _, release = map_pages(pages, [1], writable=False)
    with pytest.raises(TypeError):
        view[0] = 1
    release()


def test_failure_leaves_nothing_mapped(pages: int) -> None:
    """If mapping any page fails it is an error, and no part of the mapping stays."""
    read_only = os.open(f"/proc/self/fd/{pages}", os.O_RDONLY)
    before = address_space()
    with pytest.raises(KernelError):
        map_pages(read_only, [0, 2] * 50_000, writable=True)
    os.close(read_only)

    assert address_space() < before + 100_000


def test_release_unmaps(pages: int) -> None:
    """After the release nothing of the mapping is left."""
    before = maps()
    _, _, release = map_pages(pages, [0, 2, 4], writable=True)
    assert before != maps()
    release()

    assert before == maps()


def test_nothing_is_refused(pages: int) -> None:
    """A mapping of no pages is an error."""
    with pytest.raises(KernelError):
        map_pages(pages, [], writable=True)


def address_space() -> int:
    """Return the pages of our address space, mapped or reserved."""
    return int(Path("/proc/self/statm").read_text().split()[0])


def maps() -> list[str]:
    """Return the lines of our mappings of files that are memory."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:pages" in line]
