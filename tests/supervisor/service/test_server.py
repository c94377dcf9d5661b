"""The control socket from a client's side."""

from __future__ import annotations

import contextlib
import io
import os
import selectors
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xenbackend.errors import ConfigError, XenbackendError
from xenbackend.protocol.client import call
from xenbackend.supervisor.service import server as server_module
from xenbackend.supervisor.service.server import IDLE_S, MAX_CLIENTS, MAX_LINE, Reply, Server, check_place


class Loop:
    """A server that echoes, and its loop."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.time = 0.0
        self.held: list[Reply] = []
        self.selector = selectors.DefaultSelector()
        self.server = Server(self.path, self.selector, self._answer, lambda: self.time)

    def _answer(self, request: dict[str, Any], reply: Reply) -> None:
        if request.get("verb") == "hold":
            self.held.append(reply)
        elif request.get("verb") == "big":
            reply({"data": "x" * 2_000_000})
        elif request.get("verb") == "bug":
            raise TypeError("a bug of ours")
        else:
            reply({"data": request})

    def turn(self, timeout_s: float = 0.0) -> None:
        """Do what descriptors are ready for."""
        for key, _ in self.selector.select(timeout_s):
            key.data()

    def settle(self) -> None:
        """Do everything that follows from what clients did so far."""
        for _ in range(40):
            self.turn()

    def connect(self) -> socket.socket:
        """Return a new client's socket."""
        near = socket.socket(socket.AF_UNIX)
        near.settimeout(5)
        near.connect(self.path)
        return near


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    """A server in a directory of its own."""
    loop = Loop(tmp_path / "control.sock")
    yield loop
    loop.server.close()
    loop.selector.close()


def _ask(loop: Loop, request: dict[str, Any]) -> dict[str, Any]:
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(call(loop.path, request)))
    thread.start()
    while thread.is_alive():
        loop.turn(0.01)
    thread.join()
    return answers[0]


def test_a_request_gets_its_answer(loop: Loop) -> None:
    """One line in, one line out; an answer larger than any socket buffer arrives whole."""
    assert {"data": {"verb": "ping"}} == _ask(loop, {"verb": "ping"})
    assert 2_000_000 == len(_ask(loop, {"verb": "big"})["data"])


def test_the_socket_is_for_its_owner_only(loop: Loop) -> None:
    """R22: the socket's mode is 0600 from its birth."""
    assert 0o600 == Path(loop.path).stat().st_mode & 0o777


def test_other_users_are_sent_away(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """R22: a peer that is neither root nor our own user is hung up on, whatever the socket's mode is by now."""
    monkeypatch.setattr(server_module, "_may_use", lambda _: False)
    with loop.connect() as client:
        loop.settle()

        assert b"" == client.recv(1)


def test_clients_are_bounded(loop: Loop) -> None:
    """R22: a connection beyond the limit is closed at once, and those before it are served."""
    clients = []
    for _ in range(MAX_CLIENTS):
        clients.append(loop.connect())
        loop.settle()
    with loop.connect() as late:
        loop.settle()
        assert b"" == late.recv(1)
    clients[0].sendall(b'{"verb": "ping"}\n')
    loop.settle()
    assert b'{"data": {"verb": "ping"}}\n' == clients[0].recv(1000)
    for client in clients:
        client.close()


def test_idle_clients_are_sent_away(loop: Loop) -> None:
    """R22: who says nothing for too long loses the connection."""
    with loop.connect() as client:
        loop.settle()
        assert IDLE_S == loop.server.next_deadline()
        loop.time = IDLE_S
        loop.server.turn()
        assert b"" == client.recv(1)
    assert loop.server.next_deadline() is None


def test_a_line_is_bounded(loop: Loop) -> None:
    """R22: more bytes than a request may have, without an end of line, end the connection."""
    with loop.connect() as client:
        client.setblocking(False)
        sent = 0
        while sent <= 2 * MAX_LINE:
            try:
                sent += client.send(b"x" * 4096)
            except BlockingIOError:
                pass
            except OSError:
                break
            loop.settle()

        assert sent <= 2 * MAX_LINE


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b"\xff\xfe\n", b"\n", b"[" * 30_000 + b"\n"])
def test_nonsense_is_answered(loop: Loop, line: bytes) -> None:
    """What is no JSON object gets a sentence, and the connection lives on."""
    with loop.connect() as client:
        client.sendall(line)
        loop.settle()
        assert b"not a JSON object" in client.recv(1000)
        client.sendall(b"{}\n")
        loop.settle()
        assert b'{"data": {}}\n' == client.recv(1000)


def test_a_bug_over_a_request_is_answered(loop: Loop, lines: io.StringIO) -> None:
    """One request that meets a bug of ours is answered and logged; the service and the connection live on."""
    with loop.connect() as client:
        client.sendall(b'{"verb": "bug"}\n{}\n')
        loop.settle()
        answers = client.recv(1000).splitlines()

    assert b"TypeError: a bug of ours" in answers[0]
    assert b'{"data": {}}' == answers[1]
    assert lines.getvalue().startswith("<3>server: a request could not be answered")
    assert "Traceback" in lines.getvalue()


def test_requests_are_answered_in_order_one_at_a_time(loop: Loop) -> None:
    """A second request waits until the first is answered, however long that takes."""
    with loop.connect() as client:
        client.sendall(b'{"verb": "hold"}\n{"n": 2}\n')
        loop.settle()
        client.sendall(b'{"n": 3}\n')
        loop.settle()
        loop.held[0]({"data": 1})
        loop.settle()

        assert b'{"data": 1}\n{"data": {"n": 2}}\n{"data": {"n": 3}}\n' == client.recv(1000)


def test_an_answer_for_a_client_that_has_gone_is_dropped(loop: Loop) -> None:
    """A client may hang up while its request is under way."""
    client = loop.connect()
    client.sendall(b'{"verb": "hold"}\n')
    loop.settle()
    client.close()
    loop.settle()
    loop.held[0]({"data": 1})
    loop.settle()

    assert loop.server.next_deadline() is None


def test_only_one_service_listens(loop: Loop, tmp_path: Path) -> None:
    """A second service is refused while the first lives, and a socket left behind by a dead one is replaced."""
    with pytest.raises(ConfigError, match="listens there already"):
        Server(loop.path, loop.selector, lambda *_: None, lambda: 0.0)
    left_behind = tmp_path / "old.sock"
    with socket.socket(socket.AF_UNIX) as near:
        near.bind(str(left_behind))
    server = Server(str(left_behind), loop.selector, lambda *_: None, lambda: 0.0)
    server.close()

    assert not left_behind.exists()


def test_missing_directory_is_named(tmp_path: Path) -> None:
    """The operator is told which directory to make."""
    with pytest.raises(ConfigError, match=r"make the directory .*/none"):
        Server(str(tmp_path / "none" / "x"), selectors.DefaultSelector(), lambda *_: None, lambda: 0.0)


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """A typing error must not cost a file: only a socket is replaced."""
    file = tmp_path / "precious"
    file.write_text("x")
    with (
        contextlib.closing(selectors.DefaultSelector()) as selector,
        pytest.raises(ConfigError, match="it is no socket"),
    ):
        Server(str(file), selector, lambda *_: None, lambda: 0.0)

    assert "x" == file.read_text()


def test_a_place_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    """To ask whether a service could listen leaves no file; one that was left listening there already may."""
    place, other = tmp_path / "x", tmp_path / "y"
    check_place(str(place))
    assert [] == [*tmp_path.iterdir()]
    first = Server(str(place), selectors.DefaultSelector(), lambda *_: None, lambda: 0.0)
    check_place(str(place), first.fileno())
    check_place(str(other), first.fileno())
    with pytest.raises(ConfigError, match="listens there already"):
        check_place(str(place))
    assert [place] == [*tmp_path.iterdir()]
    first.close()


def test_our_own_directory_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the unit's runtime directory is missing, because nobody used the unit, it is made, for us alone."""
    own = tmp_path / "xenbackend"
    monkeypatch.setattr(server_module, "OWN_DIRECTORY", own)
    with contextlib.closing(selectors.DefaultSelector()) as selector:
        listening = Server(str(own / "x"), selector, lambda *_: None, lambda: 0.0)
        listening.close()

    assert 0o700 == own.stat().st_mode & 0o777


def test_an_error_reaches_the_caller_as_an_exception(tmp_path: Path) -> None:
    """A service that is not there is told with how to start it."""
    with pytest.raises(XenbackendError, match="systemctl start xenbackend"):
        call(str(tmp_path / "none"), {})


def test_the_next_service_listens_on(tmp_path: Path) -> None:
    """A client that connects between two services is served by the second one, on the socket of the first."""
    path = str(tmp_path / "x")
    first = Server(path, selectors.DefaultSelector(), lambda *_: None, lambda: 0.0)
    kept = os.dup(first.fileno())
    os.set_blocking(kept, True)  # whoever kept it may have done anything to it
    first.close(leaves=True)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(b'{"verb": "x"}\n')
        selector = selectors.DefaultSelector()
        second = Server(path, selector, lambda _, reply: reply({"data": "y"}), lambda: 0.0, kept)
        assert not os.get_blocking(second.fileno())
        client.setblocking(False)
        answer = b""
        while not answer:
            for key, _ in selector.select(1):
                key.data()
            with contextlib.suppress(BlockingIOError):
                answer = client.recv(100)
        second.close()

    assert b'{"data": "y"}\n' == answer
    assert not Path(path).exists()


def test_a_socket_that_nobody_can_reach_is_not_taken_over(tmp_path: Path) -> None:
    """Where the socket's file has gone, or another one is wanted, the service listens anew."""
    path = tmp_path / "x"
    for wanted in (path, tmp_path / "y"):
        first = Server(str(path), selectors.DefaultSelector(), lambda *_: None, lambda: 0.0)
        kept = os.dup(first.fileno())
        first.close(leaves=True)
        if wanted == path:
            path.unlink()
        else:
            os.mknod(wanted, 0o600 | stat.S_IFSOCK)  # left by somebody else
        second = Server(str(wanted), selectors.DefaultSelector(), lambda *_: None, lambda: 0.0, kept)

        with socket.socket(socket.AF_UNIX) as client:
            assert 0 == client.connect_ex(str(wanted))
        second.close()
