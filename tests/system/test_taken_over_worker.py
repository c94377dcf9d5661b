"""Whatever a worker that was taken over says or writes, its service keeps serving the others.

The messages themselves are tested in tests/protocol and tests/supervisor; here the whole service has to survive them.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests import taken_over
from tests.until import until
from xenbackend.embedded.machine import Machine
from xenbackend.errors import XenbackendError
from xenbackend.rig.frontend import Wishes

pytestmark = pytest.mark.slow
CHAIN = "evil:|ram:1M"
FOREIGN = "aio:/etc/hostname"
MESSAGES = {
    "a field of another type": 'say("Log", level=7, event="x")',
    "a field named as an argument": 'say("Log", level="info", event="x", fields={"level": "y", "self": "z"})',
    "a lone surrogate": 'stand(flush_failed="\\ud800")',
    "a lone surrogate in trouble": 'stand(trouble="\\udc00\\ud9ff")',
    "a lone surrogate in the log": 'say("Log", level="info", event="\\ud800")',
    "a number without end": "stand(errno=2**70)",
    "deep JSON": 'send(b"[" * 30000)',
    "deep JSON inside": 'send(b\'{"version": 3, "kind": "Log", "level": \' + b"[" * 30000)',
    "no JSON": 'send(b"{")',
    "nothing": 'send(b"")',
    "another chain": f'stand(chain="{FOREIGN}")',
    "a reply to nothing": 'say("Reply", id=2**63, code="ok")',
    "a descriptor": 'say("Drop", 0, name="x")',
    "a descriptor beside nothing": 'send(b"", 0)',
}
MEMORIES = {
    "a block of 255 requests": """
poke(journal.RINGS_AT + 16, words(32))
poke(journal.RINGS_AT + 4096, words(255) * 512)""",
    "a ring of 2**64 entries": "poke(journal.RINGS_AT, words(2**64 - 1) * 1000)",
    "an agreement too deep": 'agree(b"[" * 30000)',
    "an agreement of another kind": 'agree(b"[1]")',
    "an agreement of another length": 'agree(b"{}"); poke(2 * 4096, words(2**63))',
    "an agreement on another chain": f"""
connect = {{"protocol": "x86_64-abi", "rings": [], "persistent": True}}
agree(json.dumps({{"chain": "{FOREIGN}", "connect": connect}}).encode())""",
    "a journal without magic": "poke(4096, words(0, 0, 0))",
    "a flush that failed with 2**64": "poke(4096 + 24, words(2**64 - 1))",
    "a journal cut short": 'cut("xenbackend-journal", 0)',
    "a memory cut short": 'cut("xenbackend", 0)',
}


class Disk:
    """A guest with a disk, and the worker that serves it."""

    def __init__(self, machine: Machine, domid: int, chain: str) -> None:
        self._machine = machine
        self._guest = machine.create_guest(domid, 256)
        self._name = f"{domid}/xvda"
        self.frontend = self._guest.connect(machine.attach(domid, "xvda", chain), Wishes())
        self.frontend.write(0, b"x" * 4096)
        self.worker = self.status()["worker"]

    def status(self) -> dict[str, Any]:
        """Return what the service says of it."""
        [found] = self._machine.ask({"verb": "status", "vbd": self._name})["data"]
        return found

    def run(self, program: str) -> None:
        """Run a program in the worker, which may be killed because of it."""
        request = {"verb": "command", "vbd": self._name, "layer": "evil", "command": "run", "arguments": [program]}
        with suppress(XenbackendError):
            self._machine.ask(request)

    def wait_for_successor(self) -> None:
        """Wait until another worker serves the guest, through the chain that was in service."""
        until(lambda: self.status()["worker"] not in (None, self.worker) and self.status()["phase"] == "serving")

        assert CHAIN == self.status()["chain"]

    def check(self) -> None:
        """Assert that the guest reads what it wrote."""
        assert b"x" * 4096 == self.frontend.read(0, 8)

    def close(self) -> None:
        """Destroy the guest."""
        self.frontend.crash()
        self._guest.close()


class Host:
    """A machine with a neighbour that is served all the time."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._domids = count(5)
        self.neighbour = self.give_disk("ram:1M")
        self.service = machine.service_pid

    def give_disk(self, chain: str = CHAIN) -> Disk:
        """Create a guest with a disk."""
        return Disk(self.machine, next(self._domids), chain)

    def breaches(self) -> int:
        """Return how many workers were killed for a breach."""
        return int(self.machine.ask({"verb": "ping"})["data"]["breaches"])

    def check(self) -> None:
        """Assert that the same service runs, has found no bug, and serves the neighbour."""
        ping = self.machine.ask({"verb": "ping"})["data"]
        self.neighbour.frontend.write(8, b"y" * 4096)

        assert (self.service, 0) == (ping["pid"], ping["bugs"])
        assert b"y" * 4096 == self.neighbour.frontend.read(8, 8)
        assert self.neighbour.worker == self.neighbour.status()["worker"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the layer that can be taken over, for every process that is started."""
    taken_over.offer(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    """A host whose workers have the layer that can be taken over, and no walls between it and the service."""
    (place / "config").write_text('walls = "off"\n')
    with Machine(log=place / "log", config=place / "config") as machine:
        host = Host(machine)
        with closing(host.neighbour):
            yield host


@pytest.mark.rows("R24")
def test_a_worker_that_breaks_the_protocol_is_replaced(host: Host) -> None:
    """A worker that breaks the protocol is killed, counted and logged once; its successor has the same chain."""
    for what, program in MESSAGES.items():
        before = host.breaches()
        with closing(host.give_disk()) as disk:
            disk.run(program)
            disk.wait_for_successor()
            disk.check()
            host.check()
            said = [line for line in host.machine.log.read_text().splitlines() if f'"worker": "{disk.worker}"' in line]

        assert (what, 1) == (what, host.breaches() - before)
        assert (what, 1) == (what, len([line for line in said if "broke the protocol" in line]))


def test_a_worker_that_spoils_its_memories_and_dies(host: Host) -> None:
    """Whatever a dying worker leaves in its memories, the service reads it and starts another with the same chain.

    The guest may wait forever: only the journal knew its requests in flight.
    """
    for program in MEMORIES.values():
        with closing(host.give_disk()) as disk:
            disk.run(f"{program}\nos._exit(1)")
            disk.wait_for_successor()
            host.check()


def test_whatever_was_said_and_left_while_no_service_ran(host: Host, tmp_path: Path) -> None:
    """The next service copes with messages sent, and memories spoilt, while no service ran."""
    with ExitStack() as stack:
        disks = [stack.enter_context(closing(host.give_disk())) for _ in [*MESSAGES, *MEMORIES]]
        for number, (disk, program) in enumerate(zip(disks, [*MESSAGES.values(), *MEMORIES.values()], strict=True)):
            begin, done = tmp_path / f"begin{number}", tmp_path / f"done{number}"
            for fifo in (begin, done):
                os.mkfifo(fifo)
            ends = "os._exit(1)" if number % 2 else ""
            disk.run(
                f"""
def attack():
    open({str(begin)!r}).read()
    exec({program!r}, globals())
    open({str(done)!r}, "w").close()
    {ends}
threading.Thread(target=attack, daemon=True).start()"""
            )
        os.kill(host.service, signal.SIGSTOP)
        for number in range(len(disks)):
            (tmp_path / f"begin{number}").write_bytes(b"")
            assert b"" == (tmp_path / f"done{number}").read_bytes()
        end = os.pidfd_open(host.service)
        os.kill(host.service, signal.SIGKILL)
        assert select.select([end], [], [], 20)[0]
        os.close(end)
        until(lambda: find_service(host.machine))
        host.service = find_service(host.machine)
        until(lambda: all(disk.status()["phase"] == "serving" for disk in disks))
        host.check()
        for disk in disks[: len(MESSAGES)]:
            disk.check()
        assert {CHAIN} == {disk.status()["chain"] for disk in disks}
        host.check()


def find_service(machine: Machine) -> int:
    """Return the process of the service, 0 if there is none."""
    with suppress(XenbackendError):
        return machine.service_pid
    return 0
