"""Endings out of turn, of a worker, the service, or the host below them: no process keeps a disk that nobody serves."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.until import until
from xenbackend.blkif.abi import BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_READ, BLKIF_OP_WRITE
from xenbackend.embedded.machine import Machine
from xenbackend.errors import XenbackendError
from xenbackend.rig.frontend import Frontend, Wishes

PATIENCE_S = 20.0  # limit for events that must happen; only a failing test takes this long
_PAGE = 4096
_DYING_HOST = """
import os, signal
from pathlib import Path
from xenbackend.embedded.machine import Machine
from xenbackend.errors import XenbackendError
from xenbackend.rig.frontend import Wishes

machine = Machine().__enter__()
guest = machine.create_guest(5)
for number, vdev in enumerate(("xvda", "xvdb")):
    frontend = guest.connect(machine.attach(5, vdev, "ram:1M"), Wishes(persistent=bool(number)))
    frontend.write(0, bytes(4096))
workers = [each["worker"] for each in machine.ask({"verb": "status"})["data"]]
print(machine.directory, machine.service.pid, machine.service_pid, *workers, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def _known(machine: Machine) -> dict[str, Any]:
    return dict(machine.ask({"verb": "status"})["data"][0])


def _until_ended(pid: int) -> None:
    try:
        end = os.pidfd_open(pid)
    except ProcessLookupError:  # the process that adopted it has already reaped it
        return
    assert select.select([end], [], [], PATIENCE_S)[0]
    os.close(end)


def _kill_service(machine: Machine) -> None:
    """Kill the service, and return when the next one answers."""
    former = machine.service_pid
    os.kill(former, signal.SIGKILL)

    def is_another() -> bool:
        with suppress(XenbackendError):
            return machine.service_pid != former
        return False

    until(is_another)


@pytest.mark.slow
def test_a_second_kernel_may_have_fewer_rings() -> None:
    """A kernel started after a crash with fewer rings than the one before is served by its own ring.

    It writes only the keys that it needs, so keys of the former kernel are still in xenstore, as after kdump.
    """
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", "ram:1M")
        first = guest.connect(path, Wishes(queues=2, ring_order=1))
        first.write(0, b"1" * _PAGE)
        first.crash()
        second = guest.connect(path, Wishes())
        found = second.read(0, 8)
        second.write(8, b"2" * _PAGE)
        second.close()
        third = guest.connect(path, Wishes(queues=2))
        after = third.read(0, 16)
        third.close()

    assert b"1" * _PAGE == found
    assert b"1" * _PAGE + b"2" * _PAGE == after


@pytest.mark.slow
def test_a_second_kernel_may_begin_while_no_service_runs() -> None:
    """A kernel that is started by kexec while no service runs finds the backend Connected, and connects to it. The next
    service has its rings served, whose keys are others than the former kernel's.
    """
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", "ram:1M")
        first = guest.connect(path, Wishes())
        first.write(0, b"1" * _PAGE)
        worker = _known(machine)["worker"]
        service = machine.service_pid
        assert machine.service is not None
        machine.service.send_signal(signal.SIGSTOP)  # so that no other service follows
        os.kill(service, signal.SIGKILL)
        first.crash()
        second = Frontend(guest.memory, guest.store, path.frontend, Wishes())
        second.announce()
        state = second.backend_state()
        second.read_facts()
        guest.store.write(f"{path.frontend}/state", "4")
        machine.service.send_signal(signal.SIGCONT)
        found = second.read(0, 8)
        known = _known(machine)
        second.close()

    assert (4, b"1" * _PAGE) == (state, found)
    assert (True, "Connected", "") == (worker != known["worker"], known["state"], known["error"])


def test_a_worker_that_dies_is_no_more_than_a_pause(tmp_path: Path) -> None:
    """If a worker is killed under load the guest sees a pause only: each request is answered, its data are there, and
    our state stays Connected.
    """
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", f"aio:{image}")
        frontend = guest.connect(path, Wishes(persistent=True))
        frontend.write(0, b"a" * _PAGE)
        requests = [frontend.submit(BLKIF_OP_WRITE, 8 + 8 * number, data=b"b" * _PAGE) for number in range(16)]
        worker = _known(machine)["worker"]
        os.kill(worker, signal.SIGKILL)
        requests += [frontend.submit(BLKIF_OP_WRITE, 136 + 8 * number, data=b"c" * _PAGE) for number in range(8)]
        frontend.wait(requests, PATIENCE_S)
        known = _known(machine)

        assert {0} == {request.status for request in requests}
        assert [b"a"] + [b"b"] * 16 + [b"c"] * 8 == [frontend.read(8 * number, 8)[:1] for number in range(25)]
        assert ("Connected", "") == (known["state"], known["error"])
        assert worker != known["worker"]
        frontend.close()
        machine.detach(path)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["worker", "service", "both"])
def test_the_dirty_map_outlives_everybody(tmp_path: Path, who: str) -> None:
    """After a worker, the service or both are killed, `log:` still knows all ranges that were written."""
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", f"log:|aio:{image}")
        frontend = guest.connect(path, Wishes())
        frontend.write(8, b"a" * _PAGE)
        worker = _known(machine)["worker"]
        if who != "service":
            os.kill(worker, signal.SIGKILL)
        if who != "worker":
            _kill_service(machine)
        frontend.write(64, b"b" * _PAGE)

        assert b"a" * _PAGE == frontend.read(8, 8)
        assert [(8, 8), (64, 8)] == machine.written_ranges("5/xvda")
        assert (who == "service") == (worker == _known(machine)["worker"])
        frontend.close()
        machine.detach(path)


@pytest.mark.slow
def test_a_service_that_is_replaced_is_no_pause_at_all(tmp_path: Path) -> None:
    """While one service takes over from another the same worker serves on, and requests are answered."""
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", f"aio:{image}")
        frontend = guest.connect(path, Wishes())
        worker, former = _known(machine)["worker"], machine.service_pid
        machine.replace_service()
        _until_ended(former)
        frontend.write(0, b"a" * _PAGE)

        def has_successor() -> bool:
            with suppress(XenbackendError, IndexError):
                return bool(_known(machine)["phase"] == "serving")
            return False

        until(has_successor)
        assert (worker, True) == (_known(machine)["worker"], machine.service_pid != former)
        assert b"a" * _PAGE == frontend.read(0, 8)
        frontend.close()
        machine.detach(path)


@pytest.mark.slow
def test_another_process_takes_over_what_is_held_back(tmp_path: Path) -> None:
    """A request held after a failed flush is not answered with an error by an upgrade; the successor completes it."""
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", f"fault:op=flush,limit=1|aio:{image}")
        frontend = guest.connect(path, Wishes())
        flush = frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
        until(lambda: _known(machine)["error"])
        worker = _known(machine)["worker"]
        machine.ask({"verb": "upgrade", "vbd": "5/xvda"})
        frontend.poll()
        held, known = flush.status, _known(machine)
        machine.ask({"verb": "set", "vbd": "5/xvda", "chain": f"aio:{image}"})
        machine.ask({"verb": "resume", "vbd": "5/xvda"})
        frontend.wait([flush], PATIENCE_S)

        assert (None, True) == (held, "a flush failed" in known["error"])
        assert worker != known["worker"]
        assert (0, "") == (flush.status, _known(machine)["error"])
        frontend.close()
        machine.detach(path)


@pytest.mark.slow
def test_a_map_that_is_lost_says_that_all_is_dirty(tmp_path: Path) -> None:
    """If the next service has lost the dirty map of a disk in use, all of the disk counts as dirty."""
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", f"log:|aio:{image}")
        fresh = machine.written_ranges("5/xvda")
        frontend = guest.connect(path, Wishes())
        frontend.write(8, b"a" * _PAGE)
        machine.stop_service()
        machine.start_service()
        frontend.write(64, b"b" * _PAGE)

        assert [] == fresh
        assert [(0, 2048)] == machine.written_ranges("5/xvda")
        frontend.close()
        machine.detach(path)


@pytest.mark.slow
@pytest.mark.parametrize("is_killed", [False, True])
def test_the_next_service_goes_on_with_the_same_rings(is_killed: bool, tmp_path: Path) -> None:
    """After the service was stopped, or killed with its keeper, the next one answers the requests made meanwhile."""
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        frontend = guest.connect(machine.attach(5, "xvda", f"aio:{image}"), Wishes(queues=2, persistent=True))
        frontend.write(0, b"a" * _PAGE)
        if is_killed:
            assert machine.service is not None
            ends = [machine.service_pid, _known(machine)["worker"]]
            machine.service.kill()
            machine.service.wait()
            os.kill(ends[0], signal.SIGKILL)
            for pid in ends:
                _until_ended(pid)
        else:
            machine.stop_service()
        requests = [frontend.submit(BLKIF_OP_WRITE, 8 * n, data=bytes([n]) * _PAGE) for n in range(32)]
        machine.start_service()
        frontend.wait(requests, PATIENCE_S)

        assert {0} == {request.status for request in requests}
        assert [bytes([n]) * _PAGE for n in range(32)] == [frontend.read(8 * n, 8) for n in range(32)]
        frontend.close()


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["paused, before the stop", "while it is drained"])
def test_a_stop_ends_no_request_that_a_dead_worker_had_taken(tmp_path: Path, dies: str) -> None:
    """Requests in flight at a dead worker survive a stop of the service.

    Responses that were given out of order lie in the ring where requests still in flight stood. Only the journal tells
    them apart, and the next service does not have it.
    """
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        frontend = guest.connect(machine.attach(5, "xvda", f"delay:write=1s|aio:{image}"), Wishes())
        writes = [frontend.submit(BLKIF_OP_WRITE, 8 * n, data=bytes([n + 1]) * _PAGE) for n in range(8)]
        frontend.wait([frontend.submit(BLKIF_OP_READ, 128, 8) for _ in range(8)], PATIENCE_S)
        worker = _known(machine)["worker"]
        assert machine.service is not None
        if dies == "while it is drained":
            machine.service.terminate()
        os.kill(worker, signal.SIGKILL)
        if dies == "paused, before the stop":
            machine.ask({"verb": "pause", "vbd": "5/xvda"})
        machine.stop_service()
        machine.start_service()
        reads = [frontend.submit(BLKIF_OP_READ, 8 * n, 8) for n in range(8)]
        frontend.wait([*writes, *reads], PATIENCE_S)

        assert {0} == {request.status for request in [*writes, *reads]}
        assert [bytes([n + 1]) * _PAGE for n in range(8)] == [frontend.read(8 * n, 8) for n in range(8)]
        frontend.close()


@pytest.mark.slow
def test_the_next_service_pauses_a_paused_disk_again(tmp_path: Path) -> None:
    """A disk that is paused after a failed flush is paused again by the next service, which learns of it from xenstore;
    `resume` continues it. The flush that failed is not answered before it has succeeded.
    """
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", f"fault:op=flush|aio:{image}")
        frontend = guest.connect(path, Wishes())
        flush = frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
        until(lambda: _known(machine)["error"])
        paused = _known(machine)
        machine.stop_service()
        left = machine.store.read_optional(f"{path.backend}/flush-failed")
        machine.store.write(f"{path.backend}/params", f"aio:{image}")
        machine.start_service()
        until(lambda: _known(machine)["phase"] == "serving")
        again = _known(machine)
        read = frontend.submit(BLKIF_OP_READ, 0, 8)
        frontend.poll()
        before = flush.status
        machine.ask({"verb": "resume", "vbd": "5/xvda"})
        frontend.wait([flush, read], PATIENCE_S)

        assert (None, 0) == (before, flush.status)
        assert "a flush failed (EIO); the disk is paused" == paused["error"] == left == again["error"]
        assert ("Connected", "Connected") == (paused["state"], again["state"])
        assert (0, "") == (read.status, _known(machine)["error"])
        assert machine.store.read_optional(f"{path.backend}/flush-failed") is None
        frontend.crash()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["by order", "in order", "keeper and service are killed"])
def test_requests_that_are_held_back_outlive_the_service(tmp_path: Path, how: str) -> None:
    """Requests that the disk could not do, and tries again, are not answered when the service ends: the next one does
    them. The guest sees no error, only a pause.
    """
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", f"fault:op=write,errno=ENOSPC|aio:{image}")
        frontend = guest.connect(path, Wishes())
        writes = [frontend.submit(BLKIF_OP_WRITE, 8 * n, data=bytes([n + 1]) * _PAGE) for n in range(8)]
        frontend.wait([frontend.submit(BLKIF_OP_READ, 128, 8) for _ in range(8)], PATIENCE_S)
        until(lambda: "make space" in _known(machine)["error"])
        worker, service = _known(machine)["worker"], machine.service_pid
        if how == "by order":
            machine.ask({"verb": "stop"})
        elif how != "in order":
            assert machine.service is not None
            machine.service.kill()
            os.kill(service, signal.SIGKILL)
        machine.stop_service()
        _until_ended(worker)
        frontend.poll()
        held = {request.status for request in writes}
        machine.store.write(f"{path.backend}/params", f"aio:{image}")
        machine.start_service()
        frontend.wait(writes, PATIENCE_S)

        assert ({None}, {0}) == (held, {request.status for request in writes})
        assert [bytes([n + 1]) * _PAGE for n in range(8)] == [frontend.read(8 * n, 8) for n in range(8)]
        frontend.close()


@pytest.mark.slow
def test_a_last_flush_that_fails_is_not_forgotten(tmp_path: Path) -> None:
    """If the last flush fails when the service is stopped below a guest, the next service pauses the disk: the guest's
    next flush is not answered before `resume`.
    """
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", f"fault:op=flush,limit=1|aio:{image}")
        frontend = guest.connect(path, Wishes())
        frontend.write(0, b"a" * _PAGE)
        machine.stop_service()
        machine.store.write(f"{path.backend}/params", f"aio:{image}")
        flush = frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
        machine.start_service()
        until(lambda: _known(machine)["error"])
        frontend.poll()
        answered, error = flush.status, _known(machine)["error"]
        machine.ask({"verb": "resume", "vbd": "5/xvda"})
        frontend.wait([flush])
        frontend.close()

    assert answered is None
    assert "a flush failed" in error
    assert 0 == flush.status


@pytest.mark.slow
def test_no_worker_outlives_its_service_although_the_host_refuses() -> None:
    """When a service is killed and neither grants nor ports can be given back, its workers still end."""
    host = subprocess.run([sys.executable, "-c", _DYING_HOST], capture_output=True, text=True, check=False)
    directory, keeper, service, *workers = host.stdout.split()
    shutil.rmtree(directory)
    os.kill(int(keeper), signal.SIGKILL)
    ends = [os.pidfd_open(int(worker)) for worker in workers]
    os.kill(int(service), signal.SIGKILL)
    ended = [end for end in ends if select.select([end], [], [], PATIENCE_S)[0]]
    for end in set(ends) - set(ended):
        signal.pidfd_send_signal(end, signal.SIGKILL)
    for end in ends:
        os.close(end)

    assert (2, 2) == (len(workers), len(ended))
