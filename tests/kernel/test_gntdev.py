"""Tests of `xenbackend.kernel.gntdev`: as there is no Xen here, the layouts are compared with the C headers."""

import errno
import json
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel import gntdev
from xenbackend.kernel.gntdev import Gntdev
from xenbackend.kernel.ports import CopySegment

TESTS = Path(__file__).parent.parent
HEADERS = json.loads((TESTS / "data" / "xen_devices.json").read_text())
SEGMENT = "gntdev_grant_copy_segment"


def number_at(buffer: bytes | bytearray, name: str, size: int, base: int = 0) -> int:
    """Return the number of `size` bytes where the header puts the field `name`."""
    place = base + HEADERS[name]
    return int.from_bytes(buffer[place : place + size], "little")


@pytest.mark.slow
def test_data_is_what_the_headers_say(tmp_path: Path) -> None:
    """The committed numbers and offsets are those of the C headers installed here."""
    if shutil.which("gcc") is None or not Path("/usr/include/xen/gntdev.h").exists():
        pytest.skip("no gcc or no xen/gntdev.h here")
    program = tmp_path / "xen_devices"
    subprocess.run(["gcc", "-o", program, TESTS / "tools" / "xen_devices.c"], check=True)

    printed = subprocess.run([program], check=True, capture_output=True).stdout

    assert json.loads(printed) == HEADERS


def test_numbers() -> None:
    """The ioctl numbers are those of the header."""
    assert HEADERS["IOCTL_GNTDEV_MAP_GRANT_REF"] == gntdev.MAP_GRANT_REF
    assert HEADERS["IOCTL_GNTDEV_UNMAP_GRANT_REF"] == gntdev.UNMAP_GRANT_REF
    assert HEADERS["IOCTL_GNTDEV_GRANT_COPY"] == gntdev.GRANT_COPY


def test_map_layout() -> None:
    """MAP_GRANT_REF's argument has the count, and one (domid, ref) per page, where the header puts them."""
    buffer = gntdev.pack_map(7, [100, 0xFFFFFFFE])
    refs, size = HEADERS["ioctl_gntdev_map_grant_ref.refs"], HEADERS["sizeof ioctl_gntdev_grant_ref"]

    assert number_at(buffer, "ioctl_gntdev_map_grant_ref.count", 4) == 2
    assert len(buffer) == refs + 2 * size
    assert gntdev.MAP.size == refs
    for place, gref in enumerate((100, 0xFFFFFFFE)):
        assert number_at(buffer, "ioctl_gntdev_grant_ref.domid", 4, refs + place * size) == 7
        assert number_at(buffer, "ioctl_gntdev_grant_ref.ref", 4, refs + place * size) == gref


def test_unmap_and_copy_heads() -> None:
    """UNMAP_GRANT_REF's and GRANT_COPY's arguments have their fields where the header puts them."""
    unmap, copy = gntdev.UNMAP.pack(0x12345678000, 9, 0), gntdev.COPY.pack(3, 0x7F0011223344)

    assert number_at(unmap, "ioctl_gntdev_unmap_grant_ref.index", 8) == 0x12345678000
    assert number_at(unmap, "ioctl_gntdev_unmap_grant_ref.count", 4) == 9
    assert number_at(copy, "ioctl_gntdev_grant_copy.count", 4) == 3
    assert number_at(copy, "ioctl_gntdev_grant_copy.segments", 8) == 0x7F0011223344


@pytest.mark.parametrize("to_guest", [False, True])
def test_copy_segment_layout(to_guest: bool) -> None:
    """A copy segment names the far side by reference and the near side by address, and its status begins as failed."""
    size = HEADERS[f"sizeof {SEGMENT}"]
    buffer = bytearray(2 * size)
    skipped = CopySegment(gref=1, page_offset=0, arena_offset=0, length=1, to_guest=False)
    segment = CopySegment(gref=0xABCDEF01, page_offset=512, arena_offset=0x3000, length=1536, to_guest=to_guest)

    gntdev.pack_copy(buffer, 5, 0x7F0000000000, [skipped, segment])

    far, near = ("dest", "source") if to_guest else ("source", "dest")
    assert number_at(buffer, f"{SEGMENT}.{far}.foreign.ref", 4, size) == 0xABCDEF01
    assert number_at(buffer, f"{SEGMENT}.{far}.foreign.offset", 2, size) == 512
    assert number_at(buffer, f"{SEGMENT}.{far}.foreign.domid", 2, size) == 5
    assert number_at(buffer, f"{SEGMENT}.{near}.virt", 8, size) == 0x7F0000003000
    assert number_at(buffer, f"{SEGMENT}.len", 2, size) == 1536
    assert number_at(buffer, f"{SEGMENT}.flags", 2, size) == (2 if to_guest else 1)
    assert number_at(buffer, f"{SEGMENT}.status", 2, size) == 0xFFFF
    assert HEADERS[f"{SEGMENT}.status"] == gntdev.STATUS_AT
    assert size == gntdev.FROM_GUEST.size == gntdev.TO_GUEST.size


def test_each_status_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment that the kernel did not process, or that failed, is not okay even if the call returned 0."""
    table = Gntdev(5, gntdev.open_device("/dev/null"))

    def kernel(_fd: int, _request: int, _argument: bytes, _operation: str) -> int:
        table._segments[gntdev.STATUS_AT : gntdev.STATUS_AT + 2] = b"\0\0"  # the first is done, the others never tried
        return 0

    monkeypatch.setattr(gntdev.ioctl, "call", kernel)
    segments = [CopySegment(gref, 0, gref * 4096, 4096, to_guest=True) for gref in range(3)]

    statuses = table.copy(gntdev.memory.allocate(3 * 4096), segments)

    assert statuses == [0, -1, -1]
    table.close()


def test_no_device() -> None:
    """Without gntdev the error names the device, and for another device the operation that was tried."""
    with pytest.raises(KernelError, match="open /dev/xen/nothing: No such file"):
        gntdev.open_device("/dev/xen/nothing")
    table = Gntdev(1, gntdev.open_device("/dev/null"))
    with pytest.raises(KernelError, match="reserve the mapping of 1 grants") as caught:
        table.map([8], writable=True)

    assert caught.value.errno == errno.ENOTTY
    table.close()


@pytest.mark.rows("A28")
def test_a_map_that_fails_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that fails half-way gives back its reservation once: old kernels leak with each further try."""
    table = Gntdev(5, gntdev.open_device("/dev/null"))
    calls = []

    def refuse(*_: object, **__: object) -> int:
        raise KernelError("map 2 grants", 12)

    monkeypatch.setattr(gntdev.ioctl, "call", lambda _fd, request, *_: calls.append(request) or 0)
    monkeypatch.setattr(gntdev.memory, "map_device", refuse)
    with pytest.raises(KernelError, match="map 2 grants"):
        table.map([1, 2], writable=True)

    assert [gntdev.MAP_GRANT_REF, gntdev.UNMAP_GRANT_REF] == calls
    assert set() == table._live
    table.close()


class Kernel:
    """A model of the kernel's state for one open gntdev, whose n-th call fails, counted from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
        self.reserved: list[bytes] = []
        self.mapped = self.calls = 0
        self._fails = fails
        monkeypatch.setattr(gntdev.ioctl, "call", self._ioctl)
        monkeypatch.setattr(gntdev.memory, "map_device", self._map)
        monkeypatch.setattr(gntdev.memory, "unmap", self._unmap)
        monkeypatch.setattr(gntdev.memory, "view_at", lambda *_, **__: memoryview(bytearray(4096)))

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self._fails:
            raise KernelError("a call that fails", 12)

    def _ioctl(self, _fd: int, request: int, argument: bytearray | bytes, _operation: str) -> int:
        self._count()
        if request == gntdev.MAP_GRANT_REF:
            gntdev.MAP.pack_into(argument, 0, 1, 0, len(self.reserved) * 4096 + 4096)
            self.reserved.append(gntdev.UNMAP.pack(len(self.reserved) * 4096 + 4096, 1, 0))
        elif request == gntdev.UNMAP_GRANT_REF:
            self.reserved[self.reserved.index(bytes(argument))] = b""
        return 0

    def _map(self, *_: object, **__: object) -> int:
        self._count()
        self.mapped += 1
        return 4096

    def _unmap(self, *_: object) -> None:
        self.mapped -= 1  # even if a call fails later, this mapping is gone
        self._count()


@pytest.mark.rows("A27")
@pytest.mark.parametrize("fails", range(1, 14))
def test_whatever_fails_the_device_is_closed(monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    """Whichever call fails while grants are mapped, released and closed, no other mapping stays, nor the descriptor."""
    table = Gntdev(5, gntdev.open_device("/dev/null"))
    fd = table._fd
    kernel = Kernel(monkeypatch, fails)
    mappings = []
    for gref in range(3):
        with suppress(KernelError):
            mappings.append(table.map([gref], writable=True))
    with suppress(KernelError):
        mappings[0].release()
    with suppress(KernelError):
        table.close()

    assert 0 == kernel.mapped
    assert sum(map(bool, kernel.reserved)) <= 1  # only the one whose release was refused
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert (kernel.calls >= fails) == (fails <= 12)
