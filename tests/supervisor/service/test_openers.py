"""All openers of a service: real processes, of which a few work at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.supervisor.helpers import FAKE_OPENER, PATIENCE_S, settle
from xenbackend.errors import KernelError
from xenbackend.kernel.identity import identify, to_text
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.jobs import Job, KeptFile
from xenbackend.supervisor.service import openers as module
from xenbackend.supervisor.service.fleet import OPENER, Fleet
from xenbackend.supervisor.service.opener import Opener
from xenbackend.worker.opener import OpenerGone, RemoteOpener

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("descriptors")]
MOST, TURN_S = 2, 1000.0


class Service:
    """A fleet whose openers have long turns, on a clock that the test may set ahead."""

    def __init__(self, command: tuple[str, ...] = FAKE_OPENER) -> None:
        self.ahead_s = 0.0
        self.bugs: list[Exception] = []
        self.loop = Reactor(lambda: time.monotonic() + self.ahead_s, on_bug=self.bugs.append)
        self.fleet = Fleet(self.loop, opener=command)
        self.ends: list[int] = []  # the numbers of those that have ended
        self.openers: list[Opener] = []
        self.remotes: list[RemoteOpener] = []

    def begin(self, chain: str = "null:1G", kept: dict[str, int] | None = None) -> RemoteOpener:
        """Ask for an opener, and return its worker's side."""
        kept = kept or {}
        files = [KeptFile(name, to_text(identify(fd))) for name, fd in kept.items()]
        job = Job("vbd/5/51712", [chain], read_only=False, kept=files)
        number = len(self.openers)
        opener, near = self.fleet.open(job, [*kept.values()], lambda *_: "", lambda *_: self.ends.append(number))
        self.openers.append(opener)
        self.remotes.append(RemoteOpener(near, patience_s=PATIENCE_S))
        return self.remotes[-1]

    def working(self) -> list[int]:
        """Return the numbers of the openers that have a process."""
        settle(self.loop)
        ours = self.fleet.openers._all
        return [number for number, each in enumerate(self.openers) if each in ours and not each.waits]

    def until_ended(self, *numbers: int) -> None:
        """Let the loop run until these have ended."""
        wake = self.loop.timer(self.loop.stop)
        give_up = time.monotonic() + PATIENCE_S
        while not set(numbers) <= set(self.ends):
            assert time.monotonic() < give_up, "they never end"
            wake.set(self.loop.now() + 0.01)
            self.loop.run()
        wake.set(None)

    def close(self) -> None:
        self.fleet.close()
        for each in self.remotes:
            each.close()
        self.loop.close()
        assert [] == self.bugs


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Service]]:
    """A list for services, which are closed after the test; there are turns for MOST openers."""
    monkeypatch.setattr(module, "MOST", MOST)
    monkeypatch.setattr(module, "TURN_S", TURN_S)
    made: list[Service] = []
    yield made
    for each in made:
        each.close()


@pytest.fixture
def service(services: list[Service]) -> Service:
    """Return a service whose openers do nothing until their sockets are closed."""
    services.append(Service())
    return services[-1]


def test_few_work_at_once(service: Service) -> None:
    """A few openers work at a time, however many are wanted; each of the others begins when one has ended."""
    for _ in range(6):
        service.begin()
    assert [0, 1] == service.working()
    service.openers[1].kill()
    service.until_ended(1)
    assert [0, 2] == service.working()
    for number in range(6):
        service.openers[number].kill()
        service.until_ended(number)
    assert [] == service.working()


def test_those_that_hang_hold_up_nobody(service: Service) -> None:
    """An opener that takes longer than its turn is taken to wait for its storage: the next one begins, so that all
    begin in the end.
    """
    for _ in range(6):
        service.begin()
    for working in ([0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]):
        assert working == service.working()
        service.ahead_s += TURN_S


def test_a_worker_that_ends_gives_up_its_place(service: Service) -> None:
    """If a worker ends while its opener is queued, that opener never begins, nothing more is heard of it, and its
    socket is closed.
    """
    for _ in range(4):
        service.begin()
    service.openers[2].kill()
    assert [2] == service.ends
    service.openers[0].kill()
    service.until_ended(0)
    assert [1, 3] == service.working()
    with pytest.raises(OpenerGone):
        service.remotes[2].look("/img")


def test_what_is_not_needed_any_more_does_not_begin(service: Service) -> None:
    """A queued opener does not begin if its question has been answered, or if the service leaves: its successor starts
    another worker.
    """
    for _ in range(4):
        service.begin()
    service.openers[2].note_over()
    service.openers[3].leave()
    assert [2, 3] == service.ends
    assert [0, 1] == service.working()


def test_what_is_lent_may_be_closed_meanwhile(services: list[Service], tmp_path: Path) -> None:
    """A queued opener has its own descriptors of the files kept for its job, and opens what they lead to."""
    service = Service(OPENER)
    services.append(service)
    image = tmp_path / "image"
    image.write_bytes(b"x" * 512)
    for _ in range(MOST):
        service.begin()
    kept = os.open(image, os.O_PATH)
    remote = service.begin(f"aio:{image}", {str(image): kept})
    os.close(kept)
    image.unlink()
    for each in service.remotes[:MOST]:
        each.close()
    sizes: list[int] = []
    service.loop.run_in_thread(lambda: sizes.append(remote.look(str(image)).size), service.loop.stop)
    service.loop.call_later(PATIENCE_S, service.loop.stop)
    service.loop.run()

    assert [512] == sizes
    remote.close()
    service.until_ended(*range(MOST + 1))


def test_one_that_cannot_be_started_in_its_turn_has_ended(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """If an opener cannot be started in its turn, its worker finds the socket closed, and the next one begins."""
    for _ in range(MOST + 2):
        service.begin()
    starts = [service.fleet.start_opener]

    def fail() -> None:
        service.fleet.openers._start = starts[0]
        raise KernelError("start a worker process", 11)

    monkeypatch.setattr(service.fleet.openers, "_start", fail)
    service.openers[0].kill()
    service.until_ended(0, 2)

    assert [1, 3] == service.working()
    with pytest.raises(OpenerGone):
        service.remotes[2].look("/img")


def test_a_worker_brings_no_opener_that_would_wait(service: Service) -> None:
    """A spare opener is started with a worker only if there is a free turn."""
    for _ in range(MOST):
        service.begin()
    worker = service.fleet.start(lambda *_: None, lambda _: service.loop.stop())
    assert service.fleet.openers.spare is None
    worker.kill("the test wants it")
    service.loop.run()


def test_a_service_that_ends_ends_those_that_wait(service: Service) -> None:
    """When the service ends, queued openers end without having begun."""
    for _ in range(MOST + 2):
        service.begin()
    service.fleet.close()

    assert [2, 3] == service.ends
    with pytest.raises(OpenerGone):
        service.remotes[3].look("/img")


def test_the_service_comes_first_while_some_wait(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service has a higher priority while openers are queued: those at work may be boosted, and would keep it from
    giving out the next turn.
    """
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(module, "boost", lambda pid: said.append(("boost", pid)))
    monkeypatch.setattr(module, "unboost", lambda pid: said.append(("unboost", pid)))
    for _ in range(MOST):
        service.begin()
    assert [] == said
    for _ in range(2):
        service.begin()
    assert [("boost", os.getpid())] == said
    service.openers[2].kill()
    service.openers[3].kill()
    assert [("boost", os.getpid()), ("unboost", os.getpid())] == said
