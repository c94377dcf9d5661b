"""The control socket as its clients see it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import places
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.service.server import (
    IDLE_S,
    MAX_CLIENTS,
    MAX_DEPTH,
    MAX_LINE,
    RETRY_S,
    SPARE,
    SPARE_WAIT_S,
    Peer,
    Reply,
    Server,
)

DEEP = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH  # one level too many, with the object around it


def _ok(data: Any) -> bytes:
    return json.dumps(Answer(Code.OK, data).as_json()).encode() + b"\n"


class Loop:
    """A server that echoes requests, and its loop, whose clock stands still."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.time = 100.0
        self.held: list[Reply] = []
        self.peers: list[Peer] = []
        self.bugs: list[Exception] = []
        self.reactor = Reactor(lambda: self.time, on_bug=self.bugs.append)
        self.put_off: list[Callable[[], object]] = []  # requests of the verbs that begin with "late"
        self.left: list[str] = []  # verbs whose clients have left
        gates = dict.fromkeys(("late", "late bug", "late order"), self.put_off.append)
        self.server = Server(self.path, self.reactor, self._answer, gates=gates)

    def _answer(self, request: dict[str, Any], peer: Peer, reply: Reply) -> None:
        self.peers.append(peer)
        match request.get("verb"):
            case "hold":
                self.held.append(reply)
            case "order":
                reply.order = 17
                self.held.append(reply)
            case "late order":
                reply.left = partial(self.left.append, "late order")
            case "big":
                reply(Answer(Code.OK, "x" * 2_000_000))
            case "bug" | "late bug":
                raise TypeError("a bug of ours")
            case _:
                reply(Answer(Code.OK, request))

    def settle(self, seconds: float = 0.0) -> None:
        """Let some time pass, and do everything that is due."""
        self.time += seconds
        for _ in range(40):
            self.reactor.call_soon(self.reactor.stop)
            self.reactor.run()

    def ask(self, client: socket.socket, line: bytes) -> dict[str, Any]:
        """Return the answer to a line that one client sends."""
        client.sendall(line)
        self.settle()
        return dict(json.loads(client.recv(100_000)))

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
    loop.reactor.close()


@contextlib.contextmanager
def listening_for_everybody() -> Iterator[Loop]:
    """Return a server whose socket any user can reach, because somebody has changed its mode."""
    with places.directory(places.MEMORY) as place:
        place.chmod(0o755)
        loop = Loop(place / "control.sock")
        Path(loop.path).chmod(0o666)
        yield loop
        loop.server.close()
        loop.reactor.close()


def as_user(uid: int, loop: Loop) -> socket.socket:
    """Return a socket that another user has connected."""
    os.seteuid(uid)
    try:
        return loop.connect()
    finally:
        os.seteuid(0)


def test_a_request_gets_its_answer(loop: Loop) -> None:
    """A request is one line, and so is its answer. An answer that is larger than any socket buffer arrives whole."""
    with loop.connect() as client:
        assert {"version": 1, "code": "ok", "data": {"verb": "ping"}} == loop.ask(client, b'{"verb": "ping"}\n')
        client.sendall(b'{"verb": "big"}\n{"verb": "after"}\n')
        answer = b""
        while answer.count(b"\n") < 2:
            loop.settle()
            answer += client.recv(1 << 20)

    assert _ok("x" * 2_000_000) + _ok({"verb": "after"}) == answer
    assert [] == loop.bugs


def test_a_client_waits_while_there_is_no_descriptor_for_it(loop: Loop) -> None:
    """If there is no descriptor for a client, it is accepted a while later, and the loop sleeps meanwhile."""
    loop.settle()
    with loop.connect() as client:
        client.sendall(b'{"verb": "ping"}\n')
        former = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, former[1]))
        try:
            loop.settle()
            waits = not select.select([loop.reactor.fileno()], [], [], 0)[0]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, former)
        loop.settle(RETRY_S)

        assert (True, []) == (waits, loop.bugs)
        assert _ok({"verb": "ping"}) == client.recv(1000)


def test_the_handler_is_told_who_asks(loop: Loop) -> None:
    """The handler gets the client's process and user as the kernel reports them, and the program's name."""
    with loop.connect() as client:
        loop.ask(client, b"{}\n")
    command = Path("/proc/self/comm").read_text().rstrip()

    assert [Peer(os.getpid(), os.getuid(), command)] == loop.peers


def test_the_socket_is_for_its_owner_only(loop: Loop) -> None:
    """R22: the socket has mode 0600 from the moment that it exists."""
    assert 0o600 == Path(loop.path).stat().st_mode & 0o777


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("uid", [1, 1000, 65534])
@pytest.mark.rows("R22")
def test_other_users_are_sent_away(uid: int) -> None:
    """R22: a client that is neither root nor our own user is hung up on, whatever the socket's mode has become."""
    with listening_for_everybody() as loop, as_user(uid, loop) as client, loop.connect() as own:
        client.sendall(b'{"verb": "ping"}\n')
        loop.settle()

        with contextlib.suppress(ConnectionResetError):  # what it sent was never read
            assert b"" == client.recv(1)
        assert ("ok", 1) == (loop.ask(own, b"{}\n")["code"], len(loop.peers))


@pytest.mark.rows("C3")
def test_idle_clients_keep_nobody_out(loop: Loop) -> None:
    """C3: if 400 clients are idle, a new one is still answered: the one that was idle for longest makes room."""
    with contextlib.ExitStack() as clients:
        first = clients.enter_context(loop.connect())
        waiting = clients.enter_context(loop.connect())
        waiting.sendall(b'{"verb": "hold"}\n')
        for _ in range(400):
            clients.enter_context(loop.connect())
            loop.settle(0.001)
        with loop.connect() as late:
            answer = loop.ask(late, b'{"verb": "ping"}\n')
        loop.held[0](Answer(Code.OK))
        loop.settle()

        assert "ok" == answer["code"]
        assert b"" == first.recv(1)
        assert _ok(None) == waiting.recv(1000)
        assert len(loop.server._clients) <= MAX_CLIENTS


@pytest.mark.rows("C3", "R22")
def test_clients_that_wait_are_bounded_and_leave_places(loop: Loop) -> None:
    """C3, R22: when all clients wait for an answer, a few spare places are left for short questions: whoever waits
    there is soon told that its order is still under way. When those are taken too, a new connection is closed at once.
    """
    with contextlib.ExitStack() as clients:
        waiting = [clients.enter_context(loop.connect()) for _ in range(MAX_CLIENTS)]
        for client in waiting:
            client.sendall(b'{"verb": "hold"}\n')
            loop.settle()
        answers = []
        for _ in range(SPARE):
            spare = clients.enter_context(loop.connect())
            answers.append(loop.ask(spare, b'{"verb": "ping"}\n')["code"])
            spare.sendall(b'{"verb": "hold", "wait": 1000}\n')
            loop.settle()
        late = clients.enter_context(loop.connect())
        loop.settle()
        assert (b"", ["ok"] * SPARE) == (late.recv(1), answers)
        loop.settle(SPARE_WAIT_S)
        assert "under-way" == json.loads(spare.recv(1000))["code"]
        for reply in loop.held:
            reply(Answer(Code.OK))
        loop.settle()
        assert [_ok(None)] * MAX_CLIENTS == [client.recv(1000) for client in waiting]


@pytest.mark.rows("R22")
def test_idle_clients_are_sent_away(loop: Loop) -> None:
    """R22: a client that says nothing for too long, or does not read its answer, loses the connection; one that waits
    for an answer does not.
    """
    with loop.connect() as client, loop.connect() as slow, loop.connect() as waiting:
        slow.sendall(b'{"verb": "big"}\n')
        waiting.sendall(b'{"verb": "hold"}\n')
        loop.settle()
        loop.settle(IDLE_S - 1)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        loop.settle(1)
        assert b"" == client.recv(1)
        loop.settle(10_000)
        while piece := slow.recv(1 << 20):
            assert b"\n" not in piece
        loop.held[0](Answer(Code.OK))
        loop.settle()
        assert _ok(None) == waiting.recv(1000)


@pytest.mark.rows("R22")
def test_a_line_is_bounded(loop: Loop) -> None:
    """R22: a line that is longer than a request may be ends the connection."""
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


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense", b"[1]", b"\xff\xfe", b"", b"[" * 30_000, b'{"a": ' * 9_000, b'{"a": NaN}', b'{"a": "\\ud800"}',
        b'{"a": 1%s}' % (b"0" * 5000), b'{"a": 36893488147419103232}', b'{"a": %s}' % DEEP,
    ],
    ids=["text", "list", "bytes", "empty", "deep", "deep object", "number", "surrogate", "long", "large", "too deep"],
)  # fmt: skip
def test_nonsense_is_answered(loop: Loop, line: bytes) -> None:
    """A line that is not a JSON object of plain values is answered with a code and a sentence, and the connection stays
    open.
    """
    with loop.connect() as client:
        answer = loop.ask(client, line + b"\n")
        assert ("invalid", "the request is not a JSON object in one line") == (answer["code"], answer["error"])
        assert {} == loop.ask(client, b"{}\n")["data"]


def test_values_may_lie_in_each_other(loop: Loop) -> None:
    """Values in a request may be nested, and a file name need not be UTF-8."""
    with loop.connect() as client:
        request = {"arguments": ["a", "\udcff", 1.5, None, [[]]]}

        assert request == loop.ask(client, json.dumps(request).encode() + b"\n")["data"]


@pytest.mark.parametrize("wait", ["true", '"1"', "-1", "1e300", "[]"])
def test_a_wait_is_a_number_of_seconds(loop: Loop, wait: str) -> None:
    """A value of `wait` that is not a number of seconds is refused before the request is handed on."""
    with loop.connect() as client:
        answer = loop.ask(client, b'{"wait": %s}\n' % wait.encode())

    assert ("invalid", "wait must be a number of seconds", []) == (answer["code"], answer["error"], loop.peers)


def test_who_has_waited_for_long_enough_is_told(loop: Loop) -> None:
    """A client whose `wait` is over is told which order is under way, and what is known so far. The order's own answer
    is dropped, and the client may send other requests.
    """
    with loop.connect() as client:
        client.sendall(b'{"verb": "order", "wait": 40}\n')
        loop.settle()
        loop.held[0].known = lambda: {"chain": "x"}
        client.setblocking(False)
        loop.settle(39)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        loop.settle(1)
        answer = json.loads(client.recv(1000))
        loop.held[0](Answer(Code.OK, "at last", order=17))
        loop.settle()
        after = loop.ask(client, b"{}\n")

    assert Answer(Code.UNDER_WAY, {"chain": "x"}, "it is still under way", 17) == Answer.from_json(answer)
    assert {} == after["data"]
    assert [] == loop.bugs


def test_who_gives_no_time_waits_as_long_as_it_takes(loop: Loop) -> None:
    """A client that gives no `wait` gets its answer however long that takes."""
    with loop.connect() as client:
        client.sendall(b'{"verb": "order"}\n')
        loop.settle()
        loop.settle(1e6)
        loop.held[0](Answer(Code.BUSY, {"order": 16}, "a set is under way", 17))
        loop.settle()
        answer = json.loads(client.recv(1000))

    busy = {"version": 1, "code": "busy", "order": 17, "error": "a set is under way", "data": {"order": 16}}
    assert busy == answer


def test_a_second_answer_is_a_bug_of_ours(loop: Loop) -> None:
    """A second answer to a request is not sent, and is reported as a bug."""
    with loop.connect() as client:
        client.sendall(b'{"verb": "hold"}\n')
        loop.settle()
        loop.held[0](Answer(Code.OK, 1))
        loop.held[0](Answer(Code.OK, 2))
        loop.settle()
        answer = client.recv(1000)

    assert _ok(1) == answer
    assert ["a second answer to 'hold'"] == [str(bug)[:25] for bug in loop.bugs]


def test_a_bug_over_a_request_is_answered(loop: Loop) -> None:
    """If a request raises an exception, the client gets that as its answer, and the exception is reported; service and
    connection go on.
    """
    with loop.connect() as client:
        answer = loop.ask(client, b'{"verb": "bug"}\n')
        after = loop.ask(client, b"{}\n")

    assert ("bug", True, {}) == (answer["code"], "TypeError: a bug of ours" in answer["error"], after["data"])
    assert [TypeError] == [type(bug) for bug in loop.bugs]


def test_requests_are_answered_in_order_one_at_a_time(loop: Loop) -> None:
    """A client's second request waits until the first one is answered, however long that takes."""
    with loop.connect() as client:
        client.sendall(b'{"verb": "hold"}\n{"n": 2}\n')
        loop.settle()
        client.sendall(b'{"n": 3}\n')
        loop.settle()
        loop.held[0](Answer(Code.OK, 1))
        loop.settle()

        assert _ok(1) + _ok({"n": 2}) + _ok({"n": 3}) == client.recv(1000)


def test_many_requests_at_once_make_no_deeper_stack(loop: Loop) -> None:
    """Thousands of requests in one piece are answered one after the other, without recursion."""
    with loop.connect() as client:
        client.sendall(b"{}\n" * 2000)
        answers = b""
        while answers.count(b"\n") < 2000:
            loop.settle()
            answers += client.recv(1 << 20)

    assert [] == loop.bugs


@pytest.mark.parametrize("end", ["goes", "has waited", "is answered"])
def test_it_is_told_once_nobody_waits_any_more(loop: Loop, end: str) -> None:
    """`left` is called when a request's client has gone or its `wait` is over, but not when it has been answered."""
    left: list[str] = []
    with loop.connect() as client:
        client.sendall(b'{"verb": "hold", "wait": 5}\n')
        loop.settle()
        loop.held[0].left = lambda: left.append(end)
        if end == "is answered":
            loop.held[0](Answer(Code.OK, 1))
        if end == "has waited":
            loop.settle(5)
        loop.settle()
        waited = list(left)
    loop.settle()

    assert (["has waited"] if end == "has waited" else []) == waited
    assert ([] if end == "is answered" else [end]) == left


@pytest.mark.parametrize("waits", [False, True])
def test_it_is_told_if_nobody_waits_any_more_once_it_passes_the_gate(loop: Loop, *, waits: bool) -> None:
    """A request whose client had waited for long enough before it was handled is handled, and has no client."""
    with loop.connect() as client:
        client.sendall(b'{"verb": "late order", "wait": 5}\n')
        loop.settle()
        loop.settle(0 if waits else 5)
        loop.put_off.pop()()

        assert ([] if waits else ["late order"]) == loop.left


@pytest.mark.parametrize("says_more", [False, True])
def test_a_client_that_goes_away_ends_nothing(loop: Loop, *, says_more: bool) -> None:
    """If a client hangs up while its request is under way, its answer is dropped, and its further requests are not
    carried out.
    """
    client = loop.connect()
    client.sendall(b'{"verb": "hold", "wait": 5}\n' + b"{}\n" * says_more)
    loop.settle()
    client.close()
    loop.settle(10)
    loop.held[0](Answer(Code.OK, 1))
    loop.settle()

    assert (1, []) == (len(loop.peers), loop.bugs)
    assert not loop.server._clients


@pytest.mark.rows("C3")
def test_a_client_that_has_said_all_is_answered(loop: Loop) -> None:
    """C3: a client that shuts down its sending direction gets the answers to all its requests, however long that takes,
    and the loop sleeps meanwhile. Then the connection ends, and its place is free.
    """
    with loop.connect() as client:
        client.sendall(b'{"verb": "hold"}\n{"verb": "hold"}\n{"verb": "big"}\n{"cut": ')
        client.shutdown(socket.SHUT_WR)
        loop.settle()
        for n in (0, 1):
            loop.settle(1000)
            assert not select.select([loop.reactor.fileno()], [], [], 0)[0]
            loop.held[n](Answer(Code.OK, n))
            loop.settle()
        answers = b""
        while piece := client.recv(1 << 20):
            answers += piece
            loop.settle()

    assert _ok(0) + _ok(1) + _ok("x" * 2_000_000) == answers
    assert ({}, []) == (loop.server._clients, loop.bugs)


@pytest.mark.rows("C3")
def test_a_client_that_has_said_all_may_still_go(loop: Loop) -> None:
    """C3: if such a client closes the connection, its place is free, and `left` of its request is called."""
    left: list[str] = []
    with loop.connect() as client:
        client.sendall(b'{"verb": "hold"}\n{}\n')
        client.shutdown(socket.SHUT_WR)
        loop.settle()
        loop.held[0].left = lambda: left.append("gone")
        loop.settle(1000)
        stayed = (len(loop.server._clients), list(left))
    loop.settle()

    assert (1, []) == stayed
    assert ({}, ["gone"], 1) == (loop.server._clients, left, len(loop.peers))


def test_the_next_service_listens_on(tmp_path: Path) -> None:
    """A client that connects between two services is served by the second one, on the socket of the first."""
    path = str(tmp_path / "x")
    with closing(Reactor()) as reactor, socket.socket(socket.AF_UNIX) as client:
        first = Server(path, reactor, lambda *_: None)
        kept = os.dup(first.fileno())
        os.set_blocking(kept, True)  # as the keeper might have left it
        first.close(leaves=True)
        client.connect(path)
        client.sendall(b'{"verb": "x"}\n')
        second = Server(path, reactor, lambda _, __, reply: reply(Answer(Code.OK, "y")), kept)
        assert not os.get_blocking(second.fileno())
        for _ in range(10):
            reactor.call_soon(reactor.stop)
            reactor.run()
        client.setblocking(False)
        answer = client.recv(100)
        second.close()

    assert _ok("y") == answer
    assert not Path(path).exists()


def test_the_last_answer_goes_out(loop: Loop) -> None:
    """The answer to the request that stops the service is sent, although the service ends at once."""
    with loop.connect() as client:
        client.sendall(b'{"verb": "hold"}\n')
        loop.settle()
        loop.held[0](Answer(Code.OK, "stopped"))
        loop.server.close()
        answer = client.recv(1000)
        loop.server = Server(loop.path, loop.reactor, lambda *_: None)
        loop.settle()  # nothing is left of former clients

    assert (_ok("stopped"), []) == (answer, loop.bugs)


def test_requests_that_are_put_off(loop: Loop) -> None:
    """A request that is put off is handled later like any other: other requests are answered meanwhile, and an
    exception is its answer. The request of a client that has gone by then is dropped.
    """
    clients = [loop.connect() for _ in range(4)]
    for client, verb in zip(clients, (b"late", b"late bug", b"late", b"early"), strict=True):
        client.sendall(b'{"verb": "%s"}\n' % verb)
    loop.settle()
    assert _ok({"verb": "early"}) == clients[3].recv(1000)
    assert 1 == len(loop.peers)
    clients[2].close()
    loop.settle(IDLE_S + 1)
    for handle in loop.put_off:
        handle()
    loop.settle()

    assert _ok({"verb": "late"}) == clients[0].recv(1000)
    assert Code.BUG.value == json.loads(clients[1].recv(1000))["code"]
    assert (3, 1) == (len(loop.peers), len(loop.bugs))
    for client in clients:
        client.close()


@pytest.mark.parametrize("stays", [True, False])
def test_whoever_is_put_off_waits_no_longer_than_said(loop: Loop, *, stays: bool) -> None:
    """A client whose request is put off beyond its `wait` is told that the order is under way, and the order is carried
    out.
    """
    with closing(loop.connect()) as client:
        client.sendall(b'{"verb": "late", "wait": 3}\n')
        loop.settle()
        loop.settle(3)

        assert Code.UNDER_WAY.value == json.loads(client.recv(1000))["code"]
        if not stays:
            client.close()
            loop.settle()
        [handle] = loop.put_off
        handle()
        assert (1, []) == (len(loop.peers), loop.bugs)
