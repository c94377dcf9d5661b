"""One opener as the service holds it: real processes, from their job to their end."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.supervisor.helpers import FAKE_OPENER, settle
from xenbackend.errors import DriverError, KernelError
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.jobs import Job
from xenbackend.protocol.opening import Found, Opened
from xenbackend.supervisor.service.fleet import OPENER, Fleet
from xenbackend.supervisor.service.opener import GRACE_S, Opener
from xenbackend.worker.opener import OpenerGone, RemoteOpener

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("descriptors")]


class Service:
    """A fleet, and what its openers have said."""

    def __init__(self, command: tuple[str, ...] = OPENER) -> None:
        self.bugs: list[Exception] = []
        self.ahead_s = 0.0  # how far the loop's clock is ahead
        self.loop = Reactor(lambda: time.monotonic() + self.ahead_s, on_bug=self.bugs.append)
        self.fleet = Fleet(self.loop, opener=command)
        self.opened: list[Opened] = []
        self.ends: list[str] = []
        self.refusal = ""

    def begin(self, chain: str) -> tuple[Opener, RemoteOpener]:
        """Start an opener for a chain."""
        opener, near = self.fleet.open(Job("vbd/5/51712", [chain], read_only=False), [], self._keep, self._end)
        return opener, RemoteOpener(near)

    def _keep(self, found: Found, fds: list[int]) -> str:
        assert isinstance(found, Opened)
        self.opened.append(found)
        os.close(fds[0])
        return self.refusal

    def _end(self, _opener: Opener, breach: str) -> None:
        self.ends.append(breach)
        self.loop.stop()

    def until_end(self) -> None:
        """Let the loop run until an opener has ended."""
        self.loop.call_later(20, self.loop.stop)
        self.loop.run()

    def close(self) -> None:
        self.fleet.close()
        self.loop.close()
        assert [] == self.bugs


@pytest.fixture
def service() -> Iterator[Service]:
    """Return a fleet whose openers are real."""
    service = Service()
    yield service
    service.close()


def until_begun(service: Service, opener: Opener) -> None:
    """Let the loop run until an opener has its process."""
    while opener.waits:
        service.loop.call_later(0.01, service.loop.stop)
        service.loop.run()


def ask(service: Service, remote: RemoteOpener, path: Path) -> None:
    """Have a file looked at while the loop runs."""
    service.loop.run_in_thread(lambda: remote.look(str(path)) and None, service.loop.stop)
    service.loop.run()


def test_one_that_was_killed_hangs_only_in_a_call(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed opener counts as hanging in storage at once if it is in an uninterruptible call, otherwise only if it
    takes very long to end.
    """
    opener, remote = service.begin("null:1G")
    assert not opener.hangs()
    until_begun(service, opener)
    assert opener._process is not None
    states = {opener._process.pid: "D"}  # no other process is looked up
    opener.kill()
    is_slow = opener.hangs()
    with monkeypatch.context() as patched:
        patched.setattr("xenbackend.supervisor.service.opener.state_of", states.__getitem__)
        is_in_call = opener.hangs()
    with monkeypatch.context() as patched:
        patched.setattr(service.loop, "now", lambda: time.monotonic() + 60)
        takes_long = opener.hangs()
    service.until_end()
    remote.close()

    assert (False, True, True) == (is_slow, is_in_call, takes_long)


def test_it_ends_when_its_worker_lets_go(service: Service, tmp_path: Path) -> None:
    """An opener ends when its worker closes the socket. The service keeps each file on its first opening."""
    (tmp_path / "image").write_bytes(b"x" * 512)
    _, remote = service.begin(f"aio:{tmp_path}/image")
    ask(service, remote, tmp_path / "image")
    remote.close()
    service.until_end()

    assert [str(tmp_path / "image")] == [each.name for each in service.opened]
    assert [""] == service.ends


def test_what_it_has_said_is_heard_without_the_loop() -> None:
    """What an opener has said can be handled before the loop comes to it, as when a time limit is over."""
    text = (
        "import socket, sys\n"
        "from xenbackend.protocol import opening\n"
        "near = socket.socket(fileno=int(sys.argv[2]))\n"
        "near.recv(1 << 18)\n"
        "for name in ('/one', '/other'): near.send(opening.encode(opening.Waits(name, False)))\n"
        "while near.recv(1 << 18): pass"
    )
    service = Service((sys.executable, "-c", text))
    waits: list[str] = []
    job = Job("vbd/5/51712", ["null:1G"], read_only=False)
    opener, near = service.fleet.open(job, [], service._keep, service._end, lambda each: waits.append(each.name))
    opener.hear()
    until_begun(service, opener)
    while len(waits) < 2:
        assert opener._process is not None
        assert select.select([opener._process.socket], [], [], 20)[0]
        opener.hear()
    opener.kill()
    opener.hear()
    service.until_end()
    near.close()
    service.close()

    assert ["/one", "/other"] == waits


def test_what_is_not_kept_is_not_given(service: Service, tmp_path: Path) -> None:
    """If the supervisor refuses to keep a file, the worker does not get it, but the reason."""
    (tmp_path / "image").write_bytes(b"x" * 512)
    service.refusal = "it is another file"
    _, remote = service.begin(f"aio:{tmp_path}/image")
    said: list[str] = []

    def look() -> None:
        with pytest.raises(DriverError) as caught:
            remote.look(str(tmp_path / "image"))
        said.append(caught.value.problem)

    service.loop.run_in_thread(look, service.loop.stop)
    service.loop.run()
    remote.close()
    service.until_end()

    assert ["it is another file"] == said


def test_what_it_finds_too_late_is_not_kept(service: Service, tmp_path: Path) -> None:
    """After the worker has replied to the question that the opener was for, no file is kept any more: it would belong
    to no chain, and stay for good.
    """
    (tmp_path / "image").write_bytes(b"x" * 512)
    opener, remote = service.begin(f"aio:{tmp_path}/image")
    until_begun(service, opener)
    opener.note_over()
    ends: list[type[DriverError] | None] = []

    def look() -> None:
        try:
            remote.look(str(tmp_path / "image"))
        except DriverError as problem:
            ends.append(type(problem))
        else:
            ends.append(None)

    service.loop.run_in_thread(look, service.loop.stop)
    while not ends:
        service.loop.run()
    remote.close()
    while not service.ends:
        service.loop.run()

    assert [] == service.opened
    assert [OpenerGone] == ends


def test_one_that_its_worker_does_not_let_go_is_killed(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the worker has replied to the question that the opener was for, the opener has GRACE_S to end, and is
    killed if its worker keeps it. One that waits for storage is not killed before the storage has answered.
    """
    opener, remote = service.begin("null:1G")
    until_begun(service, opener)
    assert opener._process is not None
    opener.note_over()
    settle(service.loop)
    assert [] == service.ends
    with monkeypatch.context() as patched:
        patched.setattr("xenbackend.supervisor.service.opener.state_of", lambda _: "D")
        service.ahead_s += GRACE_S
        settle(service.loop)
        assert opener._is_heard
        assert opener.hangs()
    service.ahead_s += GRACE_S
    service.until_end()
    with pytest.raises(OpenerGone):
        remote.look("/img")
    remote.close()

    assert [""] == service.ends


def test_a_worker_that_asks_nonsense_is_told_of(service: Service) -> None:
    """If a worker sends an opener nonsense, which no sound worker does, the opener ends, and its owner is told of the
    breach.
    """
    _, remote = service.begin("null:1G")
    remote._socket.send(b"nonsense")
    service.until_end()
    remote.close()

    assert ["it sent a question that no worker asks an opener"] == service.ends


def test_one_that_is_killed_says_nothing_more(service: Service) -> None:
    """A killed opener says nothing more; its worker finds the socket closed."""
    opener, remote = service.begin("null:1G")
    opener.kill()
    service.until_end()
    with pytest.raises(OpenerGone):
        remote.look("/img")
    remote.close()

    assert [""] == service.ends


def test_one_that_was_made_in_advance_and_has_ended_is_in_nobodys_way(tmp_path: Path) -> None:
    """If the spare opener has ended, another one gets the job. If none can be started, that is an error."""
    marker = tmp_path / "marker"
    text = (
        "import pathlib, socket, sys\n"
        f"marker = pathlib.Path({str(marker)!r})\n"
        "if not marker.exists(): marker.touch(); sys.exit()\n"
        "near = socket.socket(fileno=int(sys.argv[2]))\n"
        "while near.recv(1 << 18): pass"
    )
    service = Service((sys.executable, "-I", "-S", "-c", text))
    worker = service.fleet.start(lambda *_: None, lambda _: service.loop.stop())
    spare = service.fleet.openers.spare
    assert spare is not None
    select.select([spare.pidfd], [], [], 20)
    _, remote = service.begin("null:1G")
    worker.kill("the test wants it")
    service.until_end()
    remote.close()
    service.close()

    broken = Service(("/nonexistent/opener",))
    with pytest.raises(KernelError):
        broken.begin("null:1G")
    broken.close()


def test_a_service_that_ends_leaves_none() -> None:
    """When the service ends, its openers end with it, whether they still wait for a job or serve a worker."""
    service = Service(FAKE_OPENER)
    _, remote = service.begin("null:1G")
    service.close()
    with pytest.raises(OpenerGone):
        remote.look("/img")
    remote.close()

    assert [] == service.ends
