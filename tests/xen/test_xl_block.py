"""Disks of a running guest with xl: block-attach, block-list, block-detach, and how they fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.xen.tools import xenstore
from tests.xen.tools.command import Result, run, until, xenbackend, xl
from tests.xen.tools.disks import KIND, UNSERVED, backend, blank, check, line, read_file
from tests.xen.tools.guest import Guest, unbind
from tests.xen.tools.load import verify
from tests.xen.tools.service import Service

GONE = "until ! [ -b /dev/{} ]; do sleep 0.1; done"
THERE = "until [ -b /dev/{} ]; do sleep 0.1; done"
XVDB = 51728
LIVES = 8


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    """A running guest with two CPUs, so that its blkfront asks for two queues."""
    guest = Guest(vcpus=2).create().wait_until_ready()
    yield guest
    guest.destroy()
    until(f"{guest.name} is gone", lambda: not guest.is_there())


def attach(guest: Guest, chain: str, *, kind: str = KIND, check: bool = True) -> Result:
    """Attach a disk as xvdb."""
    return xl("block-attach", guest.domid, line(chain, "xvdb", kind=kind), check=check)


def detach(guest: Guest, *options: str, check: bool = True) -> Result:
    """Detach it."""
    return xl("block-detach", *options, guest.domid, "xvdb", check=check)


def test_attach_list_detach(guest: Guest, on_ext4: Path, the_service: Service) -> None:
    """A running guest gets a disk with a ring for each of its CPUs; xl lists it and detaches it."""
    image = blank(on_ext4 / "disk.raw", 32)
    attach(guest, f"log:|aio:{image}")
    guest.run(THERE.format("xvdb"))
    guest.run(verify("/dev/xvdb"))
    listed = xl("block-list", guest.domid).out.splitlines()[-1].split()
    queues = xenstore.read(f"/local/domain/{guest.domid}/device/vbd/51728/multi-queue-num-queues")
    counters = the_service.disk(guest.domid, "xvdb")["counters"]
    detached = detach(guest)
    guest.run(GONE.format("xvdb"))

    assert ("51728", "4", backend(guest.domid, 51728)) == (listed[0], listed[3], listed[-1])
    assert ("2", 0) == (queues, counters["errors"])
    assert not detached.has_waited
    run("flock", "-n", image, "true")


def test_detach_while_mounted(guest: Guest, on_ext4: Path, the_service: Service) -> None:
    """A mounted disk is detached at once, as Linux's blkfront allows; the image has what was flushed before."""
    image = blank(on_ext4 / "disk.raw", 32)
    attach(guest, f"log:|aio:{image}")
    guest.run(THERE.format("xvdb"))
    guest.run("/bin/mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/xvdb")
    guest.run("mount -t ext4 /dev/xvdb /mnt && echo kept >/mnt/file && sync")
    detached = detach(guest)
    guest.run(GONE.format("xvdb") + "; umount /mnt")
    run("e2fsck", "-p", image, check=False)  # replays the journal

    assert not detached.has_waited
    assert "kept\n" == read_file(image, "/file")
    check(image)


def test_detach_by_force(guest: Guest, on_ext4: Path, the_service: Service) -> None:
    """A disk is detached by force: its image is free, and the guest no longer has it."""
    image = blank(on_ext4 / "disk.raw", 32)
    attach(guest, f"log:|aio:{image}")
    guest.run(THERE.format("xvdb"))
    guest.run("dd if=/dev/urandom of=/dev/xvdb bs=1M count=4 conv=fsync")
    detached = detach(guest, "--force")
    guest.run(GONE.format("xvdb"))

    assert not detached.has_waited
    until("the image is free", lambda: run("flock", "-n", image, "true", check=False).status == 0)


@pytest.mark.parametrize("by", ["xl", "xenbackend"])
def test_detach_by_force_while_mounted(guest: Guest, on_ext4: Path, the_service: Service, by: str) -> None:
    """A mounted disk that is detached by force is served until the guest has written its data.

    The image is sound and free, the guest's umount ends, and other disks can be attached.
    """
    image, other = blank(on_ext4 / "disk.raw", 32), blank(on_ext4 / "other.raw", 32)
    attach(guest, f"log:|aio:{image}")
    guest.run(THERE.format("xvdb"))
    guest.run("/bin/mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/xvdb")
    guest.run("mount -t ext4 /dev/xvdb /mnt && echo kept >/mnt/file")
    if by == "xl":
        assert not detach(guest, "--force").has_waited
    else:
        xenbackend("detach", guest.domid, "xvdb", "--force")
    guest.run(GONE.format("xvdb") + "; umount /mnt")
    until("the image is free", lambda: run("flock", "-n", image, "true", check=False).status == 0)
    attach(guest, f"aio:{other}")
    guest.run(f"{THERE.format('xvdb')}; {verify('/dev/xvdb', '1m')}")
    detach(guest)

    run("e2fsck", "-p", image, check=False)  # replays the journal
    assert "kept\n" == read_file(image, "/file")
    check(image)


def test_the_driver_lets_go_meanwhile(guest: Guest, on_ext4: Path, the_service: Service) -> None:
    """A guest's driver may let go just before or while xl detaches the disk and attaches it again at once.

    Each time the disk is served and has the data of all times before.
    """
    image = blank(on_ext4 / "disk.raw", 32)
    for number in range(LIVES):
        attach(guest, f"log:|aio:{image}")
        guest.run(f"{THERE.format('xvdb')}; echo life {number} | dd of=/dev/xvdb bs=512 seek={number} conv=sync,fsync")
        lets_go = guest.start(unbind(XVDB))
        if number % 2:
            lets_go.wait()
        assert not detach(guest).has_waited
    attach(guest, f"log:|aio:{image}")
    seen = guest.run(f"{THERE.format('xvdb')}; dd if=/dev/xvdb bs=512 count={LIVES} 2>/dev/null | tr -d '\\0'")
    detach(guest)

    assert [f"life {number}" for number in range(LIVES)] == seen.splitlines()


@pytest.mark.parametrize(
    ("chain", "sentence"),
    [("lgo:|aio:{}", "lgo"), ("log:|aio:{}.missing", "there is no file")],
    ids=["wrong chain", "missing image"],
)
def test_attach_what_cannot_be(guest: Guest, on_ext4: Path, the_service: Service, chain: str, sentence: str) -> None:
    """If a disk cannot be opened, our reason is printed at once; block-detach frees the place again."""
    image = blank(on_ext4 / "disk.raw", 32)
    failed = attach(guest, chain.format(image), check=False)
    detached = detach(guest)
    attach(guest, f"log:|aio:{image}")
    guest.run(THERE.format("xvdb"))
    detach(guest)

    assert (True, True) == (failed.status != 0, sentence in failed.err), failed
    assert [False, False] == [each.has_waited for each in (failed, detached)]


@pytest.mark.xl_waits
@pytest.mark.parametrize("kind", UNSERVED)
def test_no_service(guest: Guest, on_ext4: Path, the_service: Service, kind: str) -> None:
    """Without a service xl reports that, for kind `vbd` at once; later a detach removes what was left."""
    image = blank(on_ext4 / "disk.raw", 32)
    the_service.stop()
    failed = attach(guest, f"log:|aio:{image}", kind=kind, check=False)
    the_service.start()
    detached = detach(guest)

    assert (True, True) == (failed.status != 0, UNSERVED[kind] in failed.err), failed
    assert (False, False) == (failed.has_waited and kind == "vbd", detached.has_waited)


@pytest.mark.xl_waits
def test_detach_without_a_service(guest: Guest, on_ext4: Path, the_service: Service) -> None:
    """Without a service xl gives a detach up; the next service releases the disk, and another detach completes it."""
    image = blank(on_ext4 / "disk.raw", 32)
    attach(guest, f"log:|aio:{image}")
    guest.run(THERE.format("xvdb"))
    the_service.stop()
    failed = detach(guest, check=False)
    the_service.start()
    until("the service lets go", lambda: not the_service.disks() or the_service.disks()[0]["state"] == "Closed")
    detached = detach(guest)

    assert 0 != failed.status
    assert (True, False) == (failed.has_waited, detached.has_waited)
