"""The rules of `xenbackend.kernel.ports`, for every machine that implements them: the rig, and a real Xen host.

On a real host this process is guest and backend at once: gntalloc grants our own pages to our own domain, and an event
channel leads from us to us. Run there as root, with the modules xen-gntalloc, xen-gntdev and xen-evtchn.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract import real
from xenbackend.errors import KernelError
from xenbackend.kernel.ports import GRANT_OK, CopySegment, open_host
from xenbackend.rig.guest import Guest
from xenbackend.rig.xen import Xen
from xenbackend.units import PAGE

DEVICES = ("/dev/xen/gntdev", "/dev/xen/gntalloc", "/dev/xen/evtchn")
NEVER_GRANTED = 9999  # no gref of ours
SIGNAL_TIMEOUT_S = 5


class RigGuest:
    """The far side on the rig."""

    domid = 5

    def __init__(self, directory: Path) -> None:
        self.xen = Xen(directory)
        self.xen.start()
        self.guest = Guest(directory, self.domid, pages=64)
        self.host = f"xenbackend.rig.host:{directory}"

    def grant(self, *, read_only: bool = False) -> tuple[int, memoryview]:
        """Return a new gref and its page."""
        frame = self.guest.allocate(2)[1]  # never two neighbours, so that a mapping must put them side by side
        return self.guest.grant(frame, read_only=read_only), self.guest.page(frame)

    def allocate_port(self) -> int:
        """Return the number of a new port that we may bind."""
        self.port = self.guest.allocate_port()
        return self.port.number

    def notify(self) -> None:
        """Notify the port's other end, if anybody has bound it."""
        self.port.notify()

    def was_notified(self) -> bool:
        """Wait for a notification. Return False if none comes."""
        return self.port.wait(SIGNAL_TIMEOUT_S)

    def close_port(self) -> None:
        """Close the port."""
        self.port.close()

    def is_mapped(self, gref: int) -> bool:
        """Return whether the guest's own table says that a page is mapped."""
        return self.guest.table.in_use(gref)

    def close(self) -> None:
        """End the guest."""
        self.guest.close()
        self.xen.close()


class LoopbackGuest:
    """The far side on a real host: this domain itself.

    Source: Linux include/uapi/xen/gntalloc.h (IOCTL_GNTALLOC_ALLOC_GREF, 'G' 5), evtchn.h ('E').
    """

    host = "xenbackend.kernel.xen"

    def __init__(self) -> None:
        self.domid = int(subprocess.run(["xenstore-read", "domid"], check=True, capture_output=True).stdout or 0)
        self.alloc = os.open("/dev/xen/gntalloc", os.O_RDWR)
        self.evtchn = os.open("/dev/xen/evtchn", os.O_RDWR)
        self.pages: list[mmap.mmap] = []

    def grant(self, *, read_only: bool = False) -> tuple[int, memoryview]:
        """Return a new gref and its page."""
        call = bytearray(struct.pack("=HHIQI4x", self.domid, 0 if read_only else 1, 1, 0, 0))
        fcntl.ioctl(self.alloc, len(call) << 16 | ord("G") << 8 | 5, call)
        _, _, _, index, gref = struct.unpack("=HHIQI4x", call)
        self.pages.append(mmap.mmap(self.alloc, PAGE, offset=index))
        return gref, memoryview(self.pages[-1])

    def allocate_port(self) -> int:
        """Return the number of a new port that we may bind."""
        call = bytearray(struct.pack("=I", self.domid))
        self.port = fcntl.ioctl(self.evtchn, 0x00044502, call)  # IOCTL_EVTCHN_BIND_UNBOUND_PORT
        return self.port

    def notify(self) -> None:
        """Notify the port's other end, if anybody has bound it."""
        fcntl.ioctl(self.evtchn, 0x00044504, struct.pack("=I", self.port))  # IOCTL_EVTCHN_NOTIFY

    def was_notified(self) -> bool:
        """Wait for a notification; False if none comes."""
        readable = bool(select.select([self.evtchn], [], [], SIGNAL_TIMEOUT_S)[0])
        if readable:
            os.write(self.evtchn, os.read(self.evtchn, 4))
        return readable

    def close_port(self) -> None:
        """Close the port."""
        fcntl.ioctl(self.evtchn, 0x00044503, struct.pack("=I", self.port))  # IOCTL_EVTCHN_UNBIND

    def close(self) -> None:
        """End the guest."""
        os.close(self.alloc)
        os.close(self.evtchn)


@pytest.fixture(params=["rig", "xen"])
def far(request, tmp_path: Path) -> Iterator[RigGuest | LoopbackGuest]:
    """The far side of each kind of machine."""
    if request.param == "xen" and not all(Path(device).exists() for device in DEVICES):
        real.is_missing(f"this machine has not all of {', '.join(DEVICES)}")
    far = RigGuest(tmp_path) if request.param == "rig" else LoopbackGuest()
    yield far
    far.close()


@pytest.fixture
def host(far):
    """The near side."""
    return open_host(far.host)


@pytest.fixture
def grants(far, host):
    """The grant table of the far side."""
    grants = host.open_grants(far.domid)
    yield grants
    grants.close()


@pytest.fixture
def events(far, host):
    """Event channels towards the far side."""
    events = host.open_events(far.domid)
    yield events
    events.close()


def wait_pending(events) -> list[int]:
    """Wait until a port is pending, and return it."""
    select.select([events], [], [], SIGNAL_TIMEOUT_S)
    return list(events.pending())


def bound(events, far) -> int:
    """Bind a new port, and consume the event that every bind causes."""
    port = events.bind(far.allocate_port())
    assert [port] == wait_pending(events)
    events.unmask(port)
    return port


def test_mapping_is_side_by_side(far, grants) -> None:
    """Scattered grants are mapped side by side, in the order asked for, and the memory is shared with the guest."""
    (one, one_page), (two, two_page) = far.grant(), far.grant()
    one_page[:3], two_page[:3] = b"one", b"two"
    mapping = grants.map([two, one], writable=True)

    assert 2 * PAGE == len(mapping.view)
    assert (b"two", b"one") == (bytes(mapping.view[:3]), bytes(mapping.view[PAGE : PAGE + 3]))
    mapping.view[PAGE - 1 : PAGE + 1] = b"ab"
    assert (b"a", b"b") == (bytes(two_page[-1:]), bytes(one_page[:1]))
    mapping.release()


def test_mapping_has_an_address(far, grants) -> None:
    """A mapping is aligned to a page, and its address is that of its view."""
    gref, page = far.grant()
    page[:4] = b"here"
    mapping = grants.map([gref], writable=True)

    assert 0 == mapping.address % PAGE
    assert b"here" == ctypes.string_at(mapping.address, 4)
    mapping.release()


def test_one_grant_is_mapped_twice(far, grants) -> None:
    """The same page can be mapped again, both after its release and while it is still mapped."""
    gref, _ = far.grant()
    grants.map([gref], writable=True).release()
    one, two = grants.map([gref], writable=True), grants.map([gref], writable=True)
    one.view[0] = 7

    assert 7 == two.view[0]
    one.release()
    two.release()


def test_read_only_grant_is_not_mapped_writable(far, grants) -> None:
    """A page granted for reading is mapped for reading, and refused for writing."""
    gref, page = far.grant(read_only=True)
    page[:4] = b"data"
    with pytest.raises(KernelError):
        grants.map([gref], writable=True)
    mapping = grants.map([gref], writable=False)

    assert b"data" == bytes(mapping.view[:4])
    mapping.release()


def test_mapping_is_all_or_nothing(far, grants) -> None:
    """If one gref of many is invalid, the whole mapping is refused, and no page of it stays mapped."""
    good, _ = far.grant()
    with pytest.raises(KernelError):
        grants.map([good, NEVER_GRANTED], writable=True)
    if isinstance(far, RigGuest):
        assert not far.is_mapped(good)
    grants.map([good], writable=True).release()


def test_copy_both_ways(far, host, grants) -> None:
    """A copy moves exactly the bytes that were named; one call can copy to the guest and from it."""
    gref, page = far.grant()
    page[100:104] = b"from"
    arena = host.allocate(PAGE)
    arena.view[8:10] = b"to"
    statuses = grants.copy(
        arena, [CopySegment(gref, 100, 0, 4, to_guest=False), CopySegment(gref, 200, 8, 2, to_guest=True)]
    )

    assert [GRANT_OK, GRANT_OK] == list(statuses)
    assert b"from" == bytes(arena.view[:4])
    assert b"\0to\0" == bytes(page[199:203])


def test_copy_status_is_per_segment(far, host, grants) -> None:
    """A segment that fails has its own status and copies nothing. Its neighbours are copied."""
    good, page = far.grant()
    locked, locked_page = far.grant(read_only=True)
    arena = host.allocate(2 * PAGE)
    arena.view[:] = b"n" * len(arena.view)
    statuses = grants.copy(
        arena,
        [
            CopySegment(NEVER_GRANTED, 0, 0, 512, to_guest=True),
            CopySegment(good, 0, 0, 512, to_guest=True),
            CopySegment(locked, 0, 0, 512, to_guest=True),
            CopySegment(good, 1024, 0, 512, to_guest=True),
        ],
    )

    assert [False, True, False, True] == [status == GRANT_OK for status in statuses]
    assert bytes(PAGE) == bytes(locked_page)
    assert b"n" * 512 + bytes(512) + b"n" * 512 + bytes(PAGE - 1536) == bytes(page)


@pytest.mark.parametrize("to_guest", [True, False])
def test_copy_across_a_page_refuses_the_whole_call(far, host, grants, *, to_guest: bool) -> None:
    """A segment that leaves its granted page is the caller's mistake, so the call copies nothing at all."""
    gref, page = far.grant()
    page[:] = b"g" * PAGE
    arena = host.allocate(2 * PAGE)
    arena.view[:] = b"n" * len(arena.view)
    segments = [
        CopySegment(gref, 0, 0, 512, to_guest=to_guest),
        CopySegment(gref, PAGE - 512, 512, 1024, to_guest=to_guest),
    ]
    with pytest.raises(KernelError) as caught:
        grants.copy(arena, segments)

    assert errno.EINVAL == caught.value.errno
    assert (b"g" * PAGE, b"n" * 2 * PAGE) == (bytes(page), bytes(arena.view))


def test_copy_from_a_read_only_grant(far, host, grants) -> None:
    """A page granted for reading can be read by a copy."""
    gref, page = far.grant(read_only=True)
    page[:4] = b"read"
    arena = host.allocate(PAGE)

    assert [GRANT_OK] == list(grants.copy(arena, [CopySegment(gref, 0, 0, 4, to_guest=False)]))
    assert b"read" == bytes(arena.view[:4])


def test_arena_is_aligned(host) -> None:
    """An arena is aligned to a page, holds zeros, and has the size asked for."""
    arena = host.allocate(3 * PAGE)

    assert 0 == arena.address % PAGE
    assert bytes(3 * PAGE) == bytes(arena.view)


def test_bind_is_pending_at_once(far, events) -> None:
    """A port is pending as soon as it is bound, so that a worker that takes over a ring looks at it."""
    port = events.bind(far.allocate_port())

    assert [port] == wait_pending(events)


def test_port_is_masked_until_unmask(far, events) -> None:
    """A port that was pending stays silent until it is unmasked. It is then pending if it was notified meanwhile."""
    port = bound(events, far)
    far.notify()
    assert [port] == wait_pending(events)
    far.notify()

    assert [] == list(events.pending())
    events.unmask(port)
    assert [port] == wait_pending(events)
    events.unmask(port)
    assert [] == list(events.pending())


def test_notify_reaches_the_guest(far, events) -> None:
    """A notification arrives on the other side."""
    port = bound(events, far)
    events.notify(port)

    assert far.was_notified()


def test_bound_port_is_taken(far, events) -> None:
    """A port that somebody has bound cannot be bound again."""
    remote = far.allocate_port()
    events.bind(remote)
    with pytest.raises(KernelError):
        events.bind(remote)


def test_unknown_port_is_refused(events) -> None:
    """A port that the domain did not offer cannot be bound."""
    with pytest.raises(KernelError):
        events.bind(4000)


def test_rebind_after_unbind(far, events) -> None:
    """Once our end is closed, the guest may still notify it without harm. A new bind is pending at once."""
    remote = far.allocate_port()
    events.unbind(events.bind(remote))
    far.notify()
    port = events.bind(remote)

    assert {port} == set(wait_pending(events))  # the real device may still report the port's former life


def test_notify_to_nobody_is_silent(far, events) -> None:
    """It is no error to notify a guest that has closed its end."""
    port = bound(events, far)
    far.close_port()

    events.notify(port)


def test_unbind_of_nothing_is_refused(events) -> None:
    """Closing a port that is not ours is an error."""
    with pytest.raises(KernelError):
        events.unbind(4000)


HOLDER = """
import sys
from xenbackend.kernel.ports import open_host
text, domid, remote, *grefs = sys.argv[1:]
host = open_host(text)
mapping = host.open_grants(int(domid)).map([int(gref) for gref in grefs], writable=True)
events = host.open_events(int(domid))
events.bind(int(remote))
print("holding", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_death_releases_everything(far, grants, events) -> None:
    """As soon as a process is seen to be dead, even by SIGKILL, everything that it mapped and bound is free again."""
    grefs = [far.grant()[0] for _ in range(3)]
    remote = far.allocate_port()
    arguments = [far.host, far.domid, remote, *grefs]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert b"holding\n" == holder.stdout.readline()
        with pytest.raises(KernelError):
            events.bind(remote)
        if isinstance(far, RigGuest):
            assert {"mappings": 1, "pins": 3, "ports": 1} == far.xen.held(far.domid)
        holder.send_signal(signal.SIGKILL)
        holder.wait()

    port = events.bind(remote)
    assert [port] == wait_pending(events)
    grants.map(grefs, writable=True).release()
    if isinstance(far, RigGuest):
        assert {"mappings": 0, "pins": 0, "ports": 1} == far.xen.held(far.domid)
