"""A guest that is saved, restored, and migrated to its own host while it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.xen.tools.command import run, until, xenbackend, xl
from tests.xen.tools.disks import blank, line
from tests.xen.tools.guest import Guest, names
from tests.xen.tools.load import Load
from tests.xen.tools.migration import INCOMING, Receiver
from tests.xen.tools.service import Service

SLOW = "delay:write=50ms|"  # a request is in flight whenever the guest is stopped


def put(guest: Guest, vdev: str, word: str) -> None:
    """Write a word to the disk, beyond the load's area."""
    guest.run(f"echo {word} | dd of=/dev/{vdev} bs=512 seek=30000 conv=sync,fsync 2>/dev/null")


def get(guest: Guest, vdev: str) -> str:
    """Read that word back from the disk."""
    return guest.run(f"dd if=/dev/{vdev} bs=512 skip=30000 count=1 iflag=direct 2>/dev/null | tr -d '\\0'").strip()


@pytest.fixture
def guest(new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service) -> Iterator[Guest]:
    """A guest with two disks, the first of them slow; no copy of it is left under another name."""
    disks = [
        line(f"log:|{SLOW}aio:{blank(on_ext4 / 'a.raw', 16)}", "xvda"),
        line(f"log:|aio:{blank(on_ext4 / 'b.raw', 16)}", "xvdb"),
    ]
    guest = new_guest(disks=disks).create().wait_until_ready()
    yield guest
    for other in set(names()) - {guest.name}:
        xl("destroy", other)


def test_save_and_restore(guest: Guest, on_ext4: Path, on_tmpfs: Path, the_service: Service) -> None:
    """A guest goes on after `xl save -c`, and after `xl save` with `xl restore`; fio, which verifies all the time,
    finds every block right.

    A disk that only `xenbackend attach` knows of is lost with the saved domain.
    """
    file = on_tmpfs / "saved"
    load = Load(guest, "xvda")
    load.wait_until_it_writes(the_service)
    put(guest, "xvdb", "kept")
    xl("save", "-c", guest.domid, file)
    load.wait_until_it_writes(the_service)
    assert ["Connected", "Connected"] == [disk["state"] for disk in the_service.disks()]

    xenbackend("attach", guest.domid, "xvdc", f"aio:{blank(on_tmpfs / 'c.raw', 1)}", "--wait")
    xl("save", guest.domid, file)
    until("the service has let go", lambda: not the_service.disks())
    for image in ("a.raw", "b.raw"):
        run("flock", "-n", on_ext4 / image, "true")
    former = guest.domid
    xl("restore", file)
    guest.look_up()
    load.wait_until_it_writes(the_service)
    load.stop()

    assert former != guest.domid
    assert ["xvda", "xvdb"] == sorted(disk["device"] for disk in the_service.disks())
    assert "kept" == get(guest, "xvdb")


def test_a_save_without_room(guest: Guest, on_tmpfs: Path, the_service: Service) -> None:
    """If a save fails for lack of room, the same workers go on with the same rings, and fio sees no error.

    The guest's suspend is cancelled.
    """
    load = Load(guest, "xvda")
    load.wait_until_it_writes(the_service)
    put(guest, "xvdb", "kept")
    domid, before = guest.domid, workers(the_service)
    with small(on_tmpfs / "small") as place:
        for _ in range(2):
            failed = xl("save", guest.domid, place / "saved", check=False)
            assert (True, True) == (failed.status != 0, "No space left on device" in failed.err), failed
            load.wait_until_it_writes(the_service)
    load.stop()
    guest.look_up()

    assert (domid, before) == (guest.domid, workers(the_service))
    assert ["Connected", "Connected"] == [disk["state"] for disk in the_service.disks()]
    assert [0, 0] == [disk["counters"]["errors"] for disk in the_service.disks()]
    assert "kept" == get(guest, "xvdb")


@contextmanager
def small(place: Path) -> Iterator[Path]:
    """Mount a file system that has room only for the beginning of a saved guest, while the block lasts."""
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=8m", "small", place)
    try:
        yield place
    finally:
        run("umount", place)


def workers(service: Service) -> dict[str, int]:
    """Return the process that serves each disk."""
    return {disk["device"]: disk["worker"] for disk in service.disks()}


def states(service: Service) -> dict[tuple[int, str], str]:
    """Return the states of our disks."""
    return {(each["domid"], each["device"]): each["state"] for each in service.disks()}


def test_migrate(guest: Guest, on_tmpfs: Path, the_service: Service) -> None:
    """A guest that migrates to its own host goes on with its disks, which the former domain holds until it is
    destroyed; fio finds every block right.

    If the connection breaks when everything has arrived, the guest stays as it was and nothing else is left.
    """
    load = Load(guest, "xvda")
    load.wait_until_it_writes(the_service)
    put(guest, "xvdb", "kept")
    former = guest.domid
    with Receiver() as receiver:
        receiver.send(guest, on_tmpfs / "guest")
        assert [guest.name, f"{guest.name}{INCOMING}"] == names()
        receiver.hang_up()
    until("the copy's disks are gone", lambda: 2 == len(the_service.disks()))
    assert [guest.name] == names()
    guest.unpause()
    load.wait_until_it_writes(the_service)

    with Receiver() as receiver:
        receiver.send(guest, on_tmpfs / "guest")
        xl("rename", guest.domid, f"{guest.name}--migratedaway")
        new = int(xl("domid", f"{guest.name}{INCOMING}").out)
        assert {
            (former, "xvda"): "Connected",
            (former, "xvdb"): "Connected",
            (new, "xvda"): "InitWait",
            (new, "xvdb"): "InitWait",
        } == states(the_service)
        receiver.let_it_run()
        destroyed = xl("destroy", former)
    guest.look_up()
    load.wait_until_it_writes(the_service)
    load.stop()

    assert (new, [guest.name]) == (guest.domid, names())
    assert not destroyed.has_waited
    assert "kept" == get(guest, "xvdb")


def test_the_receiver_is_killed(guest: Guest, on_tmpfs: Path, the_service: Service) -> None:
    """If the receiving xl is killed, its domain keeps our disks until it is destroyed; the guest is not affected."""
    load = Load(guest, "xvda")
    load.wait_until_it_writes(the_service)
    with Receiver() as receiver:
        receiver.send(guest, on_tmpfs / "guest")
        receiver.kill()
    guest.unpause()
    load.wait_until_it_writes(the_service)
    destroyed = xl("destroy", f"{guest.name}{INCOMING}")
    until("the copy's disks are gone", lambda: 2 == len(the_service.disks()))
    load.wait_until_it_writes(the_service)
    load.stop()

    assert not destroyed.has_waited
