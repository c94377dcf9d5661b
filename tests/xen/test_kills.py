"""Processes that serve a guest's disk are killed under load on a real Xen: no error, and every block is verified."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.xen.tools.command import run, until, xenbackend
from tests.xen.tools.disks import blank, memory_disk
from tests.xen.tools.guest import Guest
from tests.xen.tools.kills import complaints, deaths, kill, wait_until_served
from tests.xen.tools.load import Load
from tests.xen.tools.service import Service, attached

KILLS, RESTARTS = 50, 5


def test_workers_and_services_die_under_load(linux: Guest, on_ext4: Path, the_service: Service) -> None:
    """Fifty workers are killed and five services restarted while fio verifies: no error for the guest or for fio."""
    image, since = blank(on_ext4 / "disk.raw", 64), len(linux.log)
    restarts = Random(1).sample(range(KILLS), RESTARTS)
    with attached(linux.domid, "xvdb", f"log:|aio:{image}", "--wait"):
        load = Load(linux, "xvdb")
        load.wait_until_it_writes(the_service)
        for number, worker in enumerate(deaths(load, the_service, KILLS)):
            if number in restarts:
                the_service.restart()
                assert worker == wait_until_served(linux)
        load.stop()

        assert [] == complaints(linux, since)
        assert 0 == the_service.disk(linux.domid, "xvdb")["counters"]["errors"]


def test_a_worker_dies_while_its_disk_is_slow(linux: Guest, the_service: Service) -> None:
    """A worker is killed while its disk has I/O on the guest's own pages: the successor can use them.

    Dom0's kernel reports nothing meanwhile.
    """
    with memory_disk(milliseconds=300) as disk, attached(linux.domid, "xvdb", f"aio:{disk}", "--wait"):
        since = len(linux.log)
        load = Load(linux, "xvdb")
        for _ in range(3):
            load.wait_until_it_writes(the_service)
            worker = wait_until_served(linux)
            kill(worker)
            wait_until_served(linux, but_not_by=worker)
        load.stop()

        assert [] == complaints(linux, since)


def test_both_die_at_once(linux: Guest, on_ext4: Path, the_service: Service) -> None:
    """Worker and service are killed together: systemd starts another service, which finds journal and memories."""
    image, since = blank(on_ext4 / "disk.raw", 64), len(linux.log)
    with attached(linux.domid, "xvdb", f"log:|aio:{image}", "--wait"):
        load = Load(linux, "xvdb")
        load.wait_until_it_writes(the_service)
        service, worker = the_service.pid, wait_until_served(linux)
        kill(service, worker)
        until("systemd starts another service", lambda: the_service.is_active() and the_service.pid not in (0, service))
        wait_until_served(linux, but_not_by=worker)
        load.wait_until_it_writes(the_service)
        load.stop()

        assert [] == complaints(linux, since)
        ranges = xenbackend("log", "get", f"{linux.domid}/xvdb").out
        assert "" != ranges
        assert f"0 {64 << 11}" not in ranges  # the dirty map was kept, else all of the disk would be dirty


def test_a_stopped_service_is_a_pause(linux: Guest, on_ext4: Path, the_service: Service) -> None:
    """A stop ends the worker in order; after a start the guest's requests are answered."""
    image, since = blank(on_ext4 / "disk.raw", 64), len(linux.log)
    with attached(linux.domid, "xvdb", f"log:|aio:{image}", "--wait"):
        load = Load(linux, "xvdb")
        load.wait_until_it_writes(the_service)
        worker = wait_until_served(linux)
        the_service.stop()
        until("the worker has ended", lambda: run("kill", "-0", worker, check=False).status != 0)
        the_service.start()
        wait_until_served(linux)
        load.stop()

        assert [] == complaints(linux, since)


def test_a_disk_is_changed_below_a_guest(linux: Guest, on_ext4: Path, the_service: Service) -> None:
    """While fio verifies, a filter is added, the worker replaced, a snapshot made, and the disk paused and grown."""
    image, since = blank(on_ext4 / "disk.raw", 64), len(linux.log)
    vbd, leaf = f"{linux.domid}/xvdb", on_ext4 / "leaf.qcow2"
    with attached(linux.domid, "xvdb", f"aio:{image}", "--wait"):
        load = Load(linux, "xvdb")
        load.wait_until_it_writes(the_service)
        xenbackend("set", vbd, f"log:|aio:{image}")
        xenbackend("upgrade", vbd)
        run("truncate", "-s", "96M", image)
        xenbackend("resize", vbd)
        xenbackend("pause", vbd)
        xenbackend("resume", vbd)
        xenbackend("snapshot", vbd, leaf)
        load.stop()
        size = linux.run("cat /sys/block/xvdb/size")

        assert str(96 << 11) == size.strip()
        assert [] == complaints(linux, since)
        assert f"log:|qcow2:{leaf}" == the_service.disk(linux.domid, "xvdb")["chain"]
