"""Which file each name means now, looked up by a process of its own."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from xenbackend.kernel.identity import identify, to_text
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.opening import Meaning
from xenbackend.supervisor.service import looks as module
from xenbackend.supervisor.service.fleet import Fleet
from xenbackend.supervisor.service.looks import Looks

pytestmark = pytest.mark.slow  # each starts a process


class Asker:
    """Looks up names, as the service does."""

    def __init__(self) -> None:
        self.loop = Reactor()
        self.fleet = Fleet(self.loop)
        self.looks = Looks(self.fleet, self.loop)

    def look(self, *names: str) -> dict[str, Meaning]:
        """Return what is known about the names when the time is up."""
        found: list[Mapping[str, Meaning]] = []

        def then(meanings: Mapping[str, Meaning]) -> None:
            found.append(meanings)
            self.loop.stop()

        self.looks.look(names, then)
        if not found:
            self.loop.run()
        assert 1 == len(found)
        return dict(found[0])


@pytest.fixture
def asker() -> Iterator[Asker]:
    """An asker, closed after the test."""
    asker = Asker()
    yield asker
    asker.looks.close()
    asker.fleet.close()
    asker.loop.close()


def test_each_name_has_a_meaning(asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer for a file is its identity; for anything else, or a missing file, it is an errno. More names than one
    message holds are sent in several.
    """
    monkeypatch.setattr(module, "LOOK_S", 60.0)  # however slow the host is
    files = [tmp_path / f"f{number}" for number in range(40)]
    for each in files:
        each.write_text("x")
    found = asker.look(*map(str, files), str(tmp_path / "none"), str(tmp_path))
    wanted = {}
    for each in files:
        fd = os.open(each, os.O_PATH)
        wanted[str(each)] = to_text(identify(fd))
        os.close(fd)

    assert wanted == {name: each.identity for name, each in found.items() if each.identity}
    assert errno.ENOENT == found[str(tmp_path / "none")].errno
    assert found[str(tmp_path)].errno


def test_what_hangs_hides_nothing_twice(asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a name hangs, the answer comes in time all the same, with the names before it. The next look skips that name,
    until the process that hangs in it has ended.
    """
    monkeypatch.setattr(module, "LOOK_S", 2.0)  # for a program that is started by exec
    program = tmp_path / "hanging.py"
    program.write_text(HANGING)
    monkeypatch.setattr(asker.fleet, "_opener_command", (sys.executable, str(program)))
    first = asker.look("/before", "/hangs", "/after")
    second = asker.look("/before", "/hangs", "/after")

    assert ["/before"] == list(first)
    assert ["/before", "/after"] == list(second)


HANGING = """
import socket, sys
from xenbackend.protocol import opening
channel = socket.socket(fileno=int(sys.argv[2]))
while datagram := channel.recv(1 << 18):
    for name in opening.from_supervisor(datagram).names:
        if name == "/hangs":
            raise SystemExit(channel.recv(1))
        channel.send(opening.encode(opening.Meaning(name, errno=2)))
"""
