"""The control socket: JSON lines over a Unix socket; `access` says who may use it.

Must not know what a verb does.

A request is one line, ``{"verb": "status"}``, and so is its answer, as `protocol.answers` has it. An order may take as
long as it needs: a client that says how many seconds it waits, ``{"verb": …, "wait": 10}``, is told after that time
that its order is still under way, and its number. A client that goes away ends nothing but a measurement. One that only
shuts down its own direction, as ``nc -N`` does, still gets its answers.

What clients can take up is bounded: their number, the length of a line, the depth of nested values, the time that a
client may idle. They cannot keep others out: if all places are taken, a new client gets the place of the one that has
idled for longest; if all wait for answers, it gets one of a few spare places, in which no client waits for long.
Readers have a few places of their own, and take no others.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from operator import itemgetter
from pathlib import Path
from struct import Struct
from typing import Any

from xenbackend.errors import ConfigError
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.answers import Answer, of_bug
from xenbackend.protocol.codec import is_storable
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.service import access, listening

MAX_CLIENTS = 256  # enough for the hotplug script of each disk that is being attached
SPARE = 16  # places beside those, for people who look for the cause when all clients wait
SPARE_WAIT_S = 5.0  # longest wait of a client in one of these
MAX_LINE = 64 * 1024  # bytes of a request
MAX_DEPTH = 4  # of nested values in it: the deepest that a verb takes is a list of texts
MAX_WAIT_S = 1e9
IDLE_S = 30.0
RETRY_S = 1.0  # after there was no descriptor for a client
_UCRED = Struct("iii")  # pid, uid, gid: unix(7), SO_PEERCRED


@dataclass(frozen=True, slots=True)
class Peer:
    """A client: the process that made the connection, and its program's name, empty once it has gone."""

    pid: int
    uid: int
    command: str

    def __str__(self) -> str:
        return f"uid {self.uid}, pid {self.pid}" + (f", {self.command}" if self.command else "")


class Reply:
    """Takes the one answer to a request, at once or later.

    order   the number of the order that the request began
    known   returns what is known before the order has its answer
    left    called when the client waits for the answer no longer
    """

    def __init__(self, loop: Reactor, send: Callable[[Answer], None]) -> None:
        self.order: int | None = None
        self.known: Callable[[], Any] = lambda: None
        self.left: Callable[[], None] = lambda: None
        self.verb = ""
        self._loop = loop
        self._send: Callable[[Answer], None] | None = send
        self._is_given = False

    def __call__(self, answer: Answer) -> None:
        """Give the answer; a client that has gone, or waits no longer, does not get it."""
        if self._is_given:
            self._loop.bug(RuntimeError(f"a second answer to {self.verb!r}: {answer}"))
            return
        self._is_given = True
        self._deliver(answer)

    def give_up(self) -> None:
        """Tell the client that it has waited for long enough."""
        self._deliver(Answer(Code.UNDER_WAY, self.known(), "it is still under way", self.order))
        self.left()

    def _deliver(self, answer: Answer) -> None:
        send, self._send = self._send, None
        if send is not None:
            send(answer)


Handler = Callable[[dict[str, Any], Peer, Reply], None]
Gate = Callable[[Callable[[], object]], object]  # calls a function, now or later


class Server:
    """Listens, reads requests, writes answers. `handler` gets each request with its peer and its reply."""

    def __init__(
        self,
        path: str,
        loop: Reactor,
        handler: Handler,
        inherited: int = -1,
        group: int = access.NOBODY,
        gates: Mapping[str, Gate] | None = None,
    ) -> None:
        """Listen at `path`; `inherited` is a descriptor on which a former service listened there, or -1.

        Members of `group` may connect, too; `handler` decides what they may ask. `gates` has a gate for each verb whose
        requests may have to wait before they are handled.

        Raises: XenbackendError, if the socket cannot be made; a ConfigError if another service listens already.
        """
        self._path = Path(path)
        self._loop = loop
        self._handler = handler
        self._gates = gates or {}
        self._group = group
        self._clients: dict[_Client, None] = {}
        self._timer = loop.timer(self._look_at_the_clock)
        self._socket = listening.take_over(self._path, inherited) or listening.listen(self._path)
        try:
            access.open_to(self._path, group, directory=self._path.parent == listening.OWN_DIRECTORY)
            self._place = listening.identity_of(self._path)
        except ConfigError:
            self._socket.close()
            raise
        self._listening = loop.timer(self._listen_again)
        loop.add(self._socket.fileno(), self._accept)

    def fileno(self) -> int:
        """Return the descriptor on which the next service may go on listening."""
        return self._socket.fileno()

    def close(self, *, leaves: bool = False) -> None:
        """Drop all clients and stop listening; with `leaves` the next service listens on, and new clients wait."""
        for client in list(self._clients):
            with suppress(OSError):  # the last answer is for the client that ended us
                client.write()
            self._drop(client)
        if self._listening.due is None:
            self._loop.remove(self._socket.fileno())
        self._listening.set(None)
        if not leaves and listening.identity_of(self._path) == self._place:  # else another service has taken the path
            self._path.unlink(missing_ok=True)  # before the close: from then on, another service may take it
        self._socket.close()

    def _accept(self) -> None:
        try:
            near, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:  # no descriptor is available: clients have to wait
            self._loop.remove(self._socket.fileno())
            self._listening.set(self._loop.now() + RETRY_S)
            return
        peer = _peer_of(near)
        if not self._may_use(near, peer) or not self._make_room(peer):
            near.close()
            return
        client = _Client(near, peer, is_spare=len(self._alike(peer)) >= MAX_CLIENTS)
        self._clients[client] = None
        self._set_deadline(client, IDLE_S)
        self._watch(client)

    def _may_use(self, near: socket.socket, peer: Peer) -> bool:
        return access.is_ours(peer.uid) or access.is_member(near, self._group)

    def _make_room(self, peer: Peer) -> bool:
        """Drop the client that has idled for longest, if one has to go; return False if there is no place.

        A reader takes only readers' places, so root always finds one.
        """
        alike = self._alike(peer)
        most, spare = (MAX_CLIENTS, SPARE) if access.is_ours(peer.uid) else (access.MAX_READERS, 0)
        if len(alike) < most:
            return True
        idle = [(each.deadline, each) for each in alike if each.reply is None and each.deadline is not None]
        if idle:
            self._drop(min(idle, key=itemgetter(0))[1])
            return True
        return len(alike) < most + spare

    def _alike(self, peer: Peer) -> list[_Client]:
        """Return the clients with the same rights as this one."""
        return [each for each in self._clients if access.is_ours(each.peer.uid) == access.is_ours(peer.uid)]

    def _listen_again(self) -> None:
        self._loop.add(self._socket.fileno(), self._accept)

    def _guarded(self, client: _Client, move: Callable[[], bool]) -> None:
        """Read or write what is possible now, then go on with the client, or drop it if it has gone."""
        if client not in self._clients:
            return  # it has gone meanwhile
        try:
            is_there = move()
        except BlockingIOError:
            is_there = True
        except OSError:
            is_there = False
        if is_there:
            self._go_on(client)
        else:
            self._drop(client)

    def _go_on(self, client: _Client) -> None:
        """Wait until the rest of an answer can be written, or hand over the next request once the last is answered."""
        self._watch(client)
        if client.reply is not None:
            return
        self._set_deadline(client, IDLE_S)
        if client.outgoing:
            return
        line = client.take_line()
        if line is not None:
            self._handle(client, line)
        elif client.has_said_all:
            self._drop(client)

    def _watch(self, client: _Client) -> None:
        """Have the loop call when the client can be read from or written to, or has gone, whichever is awaited now."""
        awaited = _Await.ROOM if client.outgoing else _Await.END if client.has_said_all else _Await.REQUEST
        if awaited is client.awaited:
            return
        fd = client.socket.fileno()
        if client.awaited is not None:
            self._loop.remove(fd)
        client.awaited = awaited
        match awaited:
            case _Await.REQUEST:
                self._loop.add(fd, partial(self._guarded, client, client.read))
            case _Await.ROOM:
                self._loop.add(fd, partial(self._guarded, client, client.write), writable=True)
            case _Await.END:
                self._loop.add_for_end(fd, partial(self._drop, client))

    def _handle(self, client: _Client, line: bytes) -> None:
        client.reply = reply = Reply(self._loop, partial(self._send, client))
        self._set_deadline(client, None)
        request = _parse(line)
        wait_s = request.get("wait") if request is not None else None
        if request is None or not _is_wait(wait_s):
            what = (
                "the request is not a JSON object in one line"
                if request is None
                else "wait must be a number of seconds"
            )
            reply(Answer(Code.INVALID, None, what))
            return
        reply.verb = str(request.get("verb", ""))
        self._gates.get(reply.verb, _now)(partial(self._hand_over, request, client, reply))
        if client.is_spare:
            wait_s = SPARE_WAIT_S if wait_s is None else min(wait_s, SPARE_WAIT_S)
        if wait_s is not None and client.reply is reply:
            self._set_deadline(client, wait_s)

    def _hand_over(self, request: dict[str, Any], client: _Client, reply: Reply) -> None:
        """Have a request handled, unless its client went away, unanswered, while the request waited at its gate."""
        has_waited = client.reply is not reply  # at the gate, for as long as it wanted
        if client not in self._clients and not has_waited:
            return
        try:
            self._handler(request, client.peer, reply)
        except Exception as bug:  # one odd request must not end the service of every disk
            if client.reply is reply:
                reply(replace(of_bug(bug), order=reply.order))
            self._loop.bug(bug)
        if has_waited:
            reply.left()

    def _send(self, client: _Client, answer: Answer) -> None:
        """Have an answer sent in the loop's next pass; after that the client may send another request."""
        if client not in self._clients:
            return
        client.reply = None
        client.outgoing = json.dumps(answer.as_json()).encode() + b"\n"
        self._set_deadline(client, IDLE_S)
        self._loop.call_soon(partial(self._guarded, client, client.write))

    def _set_deadline(self, client: _Client, seconds: float | None) -> None:
        """Give a client so many seconds to send or read something, or to wait for its answer; None: no limit."""
        client.deadline = None if seconds is None else self._loop.now() + seconds
        if client.deadline is not None and (self._timer.due is None or client.deadline < self._timer.due):
            self._timer.set(client.deadline)

    def _look_at_the_clock(self) -> None:
        """Drop the clients that have idled for too long, and tell those that have waited for long enough."""
        now = self._loop.now()
        for client in [each for each in self._clients if each.deadline is not None and now >= each.deadline]:
            if client.reply is not None:
                client.reply.give_up()
            else:
                self._drop(client)
        self._timer.set(min((each.deadline for each in self._clients if each.deadline is not None), default=None))

    def _drop(self, client: _Client) -> None:
        del self._clients[client]
        self._loop.remove(client.socket.fileno())
        client.socket.close()
        if client.reply is not None:
            client.reply.left()


class _Await(Enum):
    """What the loop awaits of a client."""

    REQUEST = "it says something"
    ROOM = "more of an answer can be written"
    END = "it goes away"


class _Client:
    """One connection: at most one request being handled, at most one line more in the buffer."""

    def __init__(self, near: socket.socket, peer: Peer, *, is_spare: bool) -> None:
        near.setblocking(False)
        self.socket = near
        self.peer = peer
        self.is_spare = is_spare  # in a place in which it may not wait for long
        self.deadline: float | None = None
        self.outgoing = b""
        self.awaited: _Await | None = None  # as the loop was told last
        self.has_said_all = False  # it has shut down its direction, or has gone
        self.reply: Reply | None = None  # to the request that is being handled
        self._incoming = bytearray()

    def read(self) -> bool:
        """Take in what came; return False if the client sends more than a line may hold."""
        data = self.socket.recv(MAX_LINE)
        self._incoming += data
        self.has_said_all = not data
        return len(self._incoming) <= MAX_LINE

    def write(self) -> bool:
        """Send what can be sent."""
        if self.outgoing:
            self.outgoing = self.outgoing[self.socket.send(self.outgoing) :]
        return True

    def take_line(self) -> bytes | None:
        """Return the next request, None while there is none."""
        if b"\n" not in self._incoming:
            return None
        line, _, rest = bytes(self._incoming).partition(b"\n")
        self._incoming[:] = rest
        return line


def _now(function: Callable[[], object]) -> None:
    function()


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the request in a line, None if there is no valid one."""
    try:
        request = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return request if isinstance(request, dict) and _is_plain(request, MAX_DEPTH) else None


def _refuse(name: str) -> None:
    raise ValueError(name)


def _is_plain(value: Any, depth: int) -> bool:
    """Return whether a value is not nested too deeply, and everything in it can be stored wherever it may go."""
    if isinstance(value, dict | list):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(each, depth - 1) for each in inner)
    return is_storable(value)


def _is_wait(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= MAX_WAIT_S)


def _peer_of(near: socket.socket) -> Peer:
    pid, uid, _ = _UCRED.unpack(near.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        command = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n")
    except OSError:  # it has gone, or is in another namespace
        command = ""
    return Peer(pid, uid, command)
