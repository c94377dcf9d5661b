"""Tests of `xenbackend.kernel.memory`."""

import ctypes
import gc
import mmap
import os
from pathlib import Path

import pytest
from descriptors import open_descriptors

from xenbackend.errors import KernelError
from xenbackend.kernel import memory


def test_arena_is_page_aligned_zero_and_ours() -> None:
    """An arena begins at a page boundary, is zero, and its address is that of its bytes."""
    arena = memory.allocate(3 << 20)
    arena.view[4096:4101] = b"hello"

    assert arena.address % mmap.PAGESIZE == 0
    assert ctypes.string_at(arena.address + 4096, 6) == b"hello\0"


@pytest.mark.parametrize("whole", [memoryview(bytearray(b"0123456789")), memoryview(b"0123456789")])
def test_address_of_slices(whole: memoryview) -> None:
    """The address of a slice is that of its first byte, whether the memory is writable or not."""
    assert ctypes.string_at(memory.address_of(whole[3:]), 7) == b"3456789"
    assert memory.address_of(whole[5:7]) - memory.address_of(whole) == 5


def test_noted_views_are_found_and_forgotten() -> None:
    """The address of a noted view is kept together with the view, so that no other object can get the same id."""
    arena = memory.allocate(8192)
    ids = set()
    view = arena.view[4096:]
    memory.note([view])
    ids.add(id(view))
    assert memory.addresses[id(view)] == arena.address + 4096

    del view
    gc.collect()
    others = [arena.view[:n] for n in range(1, 1000)]

    assert not ids & {id(other) for other in others}
    memory.forget(memory._noted[each] for each in ids)
    assert memory.addresses == {}


def test_forgetting_what_was_not_noted() -> None:
    """Forgetting a view that was never noted does nothing."""
    memory.forget([memoryview(bytearray(1))])

    assert memory.addresses == {}


def test_device_mapping_is_shared_and_released() -> None:
    """A mapping shows the device's bytes from the offset on, takes no descriptor, and is gone after unmap."""
    fd = os.memfd_create("test")
    os.pwrite(fd, b"page two", 8192)
    before = len(open_descriptors())
    address = memory.map_device(fd, 4096, 4096, writable=True, operation="map")
    more = memory.map_device(fd, 4096, 8192, writable=False, operation="map")
    view = memory.view_at(address, 4096, writable=True)
    view[:5] = b"hello"

    assert os.pread(fd, 5, 4096) == b"hello"
    assert bytes(memory.view_at(more, 8, writable=False)) == b"page two"
    assert memory.view_at(more, 8, writable=False).readonly
    assert len(open_descriptors()) == before
    for each in (address, more):
        memory.unmap(each, 4096)
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text()
    os.close(fd)


def test_refused_mapping_names_the_operation() -> None:
    """A mapping that the kernel refuses is a KernelError with the caller's words."""
    with pytest.raises(KernelError, match="map 4 grants: Bad file"):
        memory.map_device(-1, 4096, 0, writable=True, operation="map 4 grants")
