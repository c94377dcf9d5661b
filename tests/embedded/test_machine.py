"""The embedded host: it boots, serves disks, and leaves nothing behind."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.until import until
from xenbackend.embedded.machine import Machine
from xenbackend.errors import ChainError, XenbackendError
from xenbackend.rig.frontend import Wishes
from xenbackend.supervisor.xenstore import toolstack


@pytest.mark.slow
def test_a_guest_reads_what_it_wrote_and_nothing_is_left(tmp_path: Path) -> None:
    """A disk is attached, used and detached; the file holds what the guest wrote; directory and service are gone."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine:
        pid, directory = machine.service_pid, machine.directory
        guest = machine.create_guest(3)
        path = machine.attach(3, "xvdb", f"log:|aio:{image}")
        frontend = guest.connect(path, Wishes())
        frontend.write(8, b"x" * 4096)
        read = frontend.read(8, 8)
        frontend.flush()
        ranges = machine.written_ranges("3/xvdb")
        frontend.close()
        machine.detach(path)
        guest.close()

        assert read == b"x" * 4096
        assert ranges == [(8, 8)]
        assert machine.xen.held() == {"mappings": 0, "pins": 0, "ports": 0}
    assert image.read_bytes()[4096:8192] == b"x" * 4096
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_mistakes_are_told_in_sentences() -> None:
    """An invalid chain and a missing image are refused with a sentence, and nothing of them is left."""
    with Machine() as machine:
        guest = machine.create_guest(1)
        with pytest.raises(ChainError, match="unknown driver"):
            machine.attach(1, "xvda", "nosuch:x")
        with pytest.raises(XenbackendError, match="there is no file or device /nonexistent"):
            machine.attach(1, "xvda", "aio:/nonexistent")
        guest.close()
        give_up = time.monotonic() + 10
        while "/51712" in str(machine.xenstored.dump()) and time.monotonic() < give_up:
            machine.ask({"verb": "ping"})  # the service cleans up after it has answered the toolstack

        assert "/51712" not in str(machine.xenstored.dump())


@pytest.mark.slow
def test_a_disk_that_is_made_anew_while_its_worker_ends(tmp_path: Path) -> None:
    """A disk may be attached anew before the service has seen that its former worker ended.

    The service sees both in one turn. The script gets its answer, one worker has the image, and after the detach nobody
    has it.
    """
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine:
        guest = machine.create_guest(5)
        path = machine.attach(5, "xvda", f"aio:{image}")
        guest.connect(path, Wishes()).write(0, b"x" * 4096)
        [known] = machine.ask({"verb": "status"})["data"]
        worker, service = known["worker"], machine.service_pid
        end = os.pidfd_open(worker)
        os.kill(worker, signal.SIGSTOP)  # so that it keeps its image open for now
        machine.store.transact(lambda nodes: toolstack._remove(nodes, path))
        until(lambda: machine.ask({"verb": "status"})["data"][0]["phase"] != known["phase"])
        os.kill(service, signal.SIGSTOP)
        os.kill(worker, signal.SIGCONT)
        assert select.select([end], [], [], 20)[0]
        os.close(end)
        wanted = toolstack.Attachment(path, f"aio:{image}")
        machine.store.transact(lambda nodes: toolstack._write_backend(nodes, wanted))
        answers: list[dict[str, Any]] = []
        request = {"verb": "hotplug", "action": "add", "path": path.backend}
        thread = threading.Thread(target=lambda: answers.append(machine.ask(request)))
        thread.start()
        os.kill(service, signal.SIGCONT)
        thread.join(20)
        [after] = machine.ask({"verb": "status"})["data"]
        holders = _who_has(image)
        toolstack.detach(machine.store, path, 20, force=True)
        until(lambda: not machine.ask({"verb": "status"})["data"])
        left = _who_has(image)
        guest.close()

    assert ["connected"] == [each["data"] for each in answers]
    assert ([after["worker"]], []) == (holders, left)
    assert worker != after["worker"]


def _who_has(file: Path) -> list[int]:
    """Return the processes that have a file open for I/O; descriptors with O_PATH do not count."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if link.readlink() == file:
                facts = (link.parents[1] / "fdinfo" / link.name).read_text()
                flags = next(line.split()[1] for line in facts.splitlines() if line.startswith("flags:"))
                if not int(flags, 8) & os.O_PATH:
                    found.add(int(link.parts[2]))
    return sorted(found)


def test_a_service_that_does_not_start_says_why(tmp_path: Path) -> None:
    """The error quotes the last line of a service that does not start."""
    machine = Machine(log=tmp_path / "log")
    machine.control = str(tmp_path / ("x" * 200))
    with pytest.raises(XenbackendError, match="the service did not start: "), machine:
        pass

    assert not machine.directory.exists()
