"""Who may use the control socket, tested with real users: root, and members of a group, who may ask less."""

from __future__ import annotations

import grp
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.places import MEMORY, directory
from xenbackend.errors import ConfigError
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.service import access, server
from xenbackend.supervisor.service import listening as place_of_socket
from xenbackend.supervisor.service.server import Server

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")

STRANGER, READERS, OTHERS = 65533, 65532, 65531
# Connects as another user; prints the answer, or why there was none.
_CLIENT = """
import os, socket, sys
path, uid, gid, *groups = sys.argv[1:]
os.setgroups([int(each) for each in groups])
os.setresgid(*[int(gid)] * 3)
os.setresuid(*[int(uid)] * 3)
near = socket.socket(socket.AF_UNIX)
try:
    near.connect(path)
    near.sendall(b'{"verb": "status"}\\n')
    print(near.recv(1000).decode() or "hung up")
except OSError as error:
    print(error.strerror)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory through which every user can reach the socket."""
    with directory(MEMORY) as made:
        made.chmod(0o711)
        yield made


def _ask(path: Path, gid: int, *groups: int) -> str:
    """Return what a user in these groups, who is not root, hears from a service that lets READERS ask."""
    loop = Reactor()
    listening = Server(str(path), loop, lambda _, peer, reply: reply(Answer(Code.OK, peer.uid)), group=READERS)
    who = [str(each) for each in (path, STRANGER, gid, *groups)]
    client = subprocess.Popen([sys.executable, "-S", "-c", _CLIENT, *who], stdout=subprocess.PIPE, text=True)
    pidfd = os.pidfd_open(client.pid)
    loop.add(pidfd, loop.stop)
    loop.run()
    os.close(pidfd)
    said = client.communicate()[0].strip()
    listening.close()
    loop.close()
    return said


@pytest.mark.parametrize(("gid", "groups"), [(READERS, ()), (OTHERS, (OTHERS, READERS))])
def test_members_of_the_group_are_answered(place: Path, gid: int, groups: tuple[int, ...]) -> None:
    """A client gets an answer if the group is its own, or one of its supplementary groups."""
    said = _ask(place / "x", gid, *groups)

    assert STRANGER == json.loads(said)["data"]


def test_strangers_cannot_connect(place: Path) -> None:
    """The socket's mode keeps out users who are neither root nor in the group."""
    assert "Permission denied" == _ask(place / "x", OTHERS, OTHERS)


def test_strangers_are_hung_up_on_whatever_the_mode_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other users are hung up on even if somebody has changed the socket's mode: the service goes by what the kernel
    says of its peer.
    """
    monkeypatch.setattr(access, "open_to", lambda path, _, directory: path.chmod(0o666))

    said = _ask(place / "x", OTHERS, OTHERS)

    assert said in ("hung up", "Connection reset by peer", "Broken pipe")


def test_readers_do_not_take_roots_places(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of the group have a limited number of places, and are hung up on beyond that."""
    monkeypatch.setattr(access, "MAX_READERS", 0)

    said = _ask(place / "x", READERS)

    assert said in ("hung up", "Connection reset by peer", "Broken pipe")


def test_readers_take_the_places_of_readers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle member of the group makes room only for another member. However many of them connect, root's clients
    stay, and another client of root finds a place.
    """
    monkeypatch.setattr(access, "MAX_READERS", 2)
    monkeypatch.setattr(server, "MAX_CLIENTS", 2)
    loop = Reactor()
    listening = Server(str(place / "x"), loop, lambda _, peer, reply: reply(Answer(Code.OK, peer.uid)), group=READERS)
    with ExitStack() as undo:
        undo.callback(loop.close)
        undo.callback(listening.close)
        ours = [undo.enter_context(_connected(place / "x", loop)) for _ in range(2)]
        readers = [undo.enter_context(_connected(place / "x", loop, STRANGER)) for _ in range(5)]
        ours.append(undo.enter_context(_connected(place / "x", loop)))
        heard = [_heard(near, loop) for near in (*ours, *readers)]

    assert [b"", 0, 0, b"", b"", b"", STRANGER, STRANGER] == heard, "an idle one of the same kind had to go"


def _connected(path: Path, loop: Reactor, uid: int = 0) -> socket.socket:
    """Connect as somebody, and let the server see it."""
    near = socket.socket(socket.AF_UNIX)
    near.setblocking(False)
    if uid:
        os.setegid(READERS)
        os.seteuid(uid)
    try:
        near.connect(str(path))
    finally:
        os.seteuid(0)
        os.setegid(0)
    _turn(loop)
    return near


def _heard(near: socket.socket, loop: Reactor) -> object:
    """Return the answer to a question, or b"" if we were hung up on."""
    with suppress(BrokenPipeError):
        near.sendall(b'{"verb": "status"}\n')
    _turn(loop)
    said = near.recv(1000)
    return json.loads(said)["data"] if said else said


def _turn(loop: Reactor) -> None:
    """Let the server do what is due."""
    loop.call_later(0.02, loop.stop)
    loop.run()


def test_the_socket_is_the_groups_and_its_directory_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the service's own directory the group can reach the socket and see nothing else; without a group, root owns
    everything.
    """
    own = place / "own"
    own.mkdir(mode=0o700)
    monkeypatch.setattr(place_of_socket, "OWN_DIRECTORY", own)
    found = []
    for group in (READERS, access.NOBODY):
        loop = Reactor()
        listening = Server(str(own / "x"), loop, lambda *_: None, group=group)
        found.append([stat.S_IMODE(path.stat().st_mode) for path in (own, own / "x")])
        listening.close()
        loop.close()

    assert [[0o710, 0o660], [0o700, 0o600]] == found
    assert READERS == own.stat().st_gid
    assert 0 == os.getegid()


def test_a_group_that_is_not_there_is_named() -> None:
    """If the group in the settings does not exist, the error says how to make it."""
    known = grp.getgrgid(0).gr_name
    with pytest.raises(ConfigError, match="there is no group 'nonesuch'; make it with: groupadd --system nonesuch"):
        access.group_number("nonesuch")

    assert [0, access.NOBODY] == [access.group_number(known), access.group_number("")]


def test_nobody_is_in_no_group() -> None:
    """If the settings name no group, no process is a member, not even one whose group is -1 in some way."""
    near, far = socket.socketpair()
    with near, far:
        assert [False, True] == [access.is_member(near, gid) for gid in (access.NOBODY, os.getegid())]
