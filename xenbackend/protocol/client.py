"""Asks a running service: one request, one answer over its control socket.

Must not print.

A question (`call`) is answered at once, unless the service does not work. An order (`give_order`) takes as long as it
needs: a caller that limits the time waits no longer than that, and the order goes on.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from xenbackend.errors import XenbackendError
from xenbackend.protocol import plain
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code

DEFAULT_SOCKET = "/run/xenbackend/control.sock"
SOCKET_VARIABLE = "XENBACKEND_SOCKET"  # environment variable with another default, as for a simulated host
TIMEOUT_S = 10.0  # for the answer to a question; for that to an order, beyond its own time limit
TICK_S = 0.25  # between two calls of `waiting`
_START = "start it with: systemctl start xenbackend (or: xenbackend run)"

Waiting = Callable[[float], None]  # called now and then with the seconds waited so far


class ServiceError(XenbackendError):
    """The service refused, failed, or did not answer; raised as the subclass that belongs to its code.

    answer   the whole answer: code, sentence, data
    """

    def __new__(cls, answer: Answer) -> ServiceError:
        """Make an error of the class that belongs to the code, as `OSError` does by its errno."""
        return super().__new__(_KINDS.get(answer.code, cls) if cls is ServiceError else cls, answer)

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.sentence)
        self.answer = answer

    def __reduce__(self) -> tuple[type[ServiceError], tuple[Answer]]:
        """Support pickling, to pass errors between processes."""
        return type(self), (self.answer,)

    @property
    def code(self) -> Code:
        """How the request ended, for scripts."""
        return self.answer.code

    @property
    def sentence(self) -> str:
        """Why it ended so, for people."""
        return self.answer.sentence

    @property
    def order(self) -> int | None:
        """The order's number; None if there is none."""
        return self.answer.order

    @property
    def chain(self) -> str:
        """The chain that is in service all the same; empty if that is not known."""
        data = self.answer.data
        return str(data.get("chain") or "") if isinstance(data, dict) else ""


class Invalid(ServiceError):
    """The request is a mistake of the caller's; nothing was changed."""


class Busy(ServiceError):
    """Another order that excludes this one is under way; nothing was changed."""


class Failed(ServiceError):
    """The request was tried and failed; the sentence says what holds now."""


class Gone(ServiceError):
    """The disk, or the service, went away before the request was done."""


class UnderWay(ServiceError):
    """The wait for an order is over, and it may still be done; `order` is its number, None if that is not known."""


class Unreachable(ServiceError):
    """No service answers."""


class Bug(ServiceError):
    """A fault of the program; the service's log has more."""


class _NoAnswer(ServiceError):
    """The request was sent, and it is not known what became of it."""


_KINDS: dict[Code, type[ServiceError]] = {
    Code.INVALID: Invalid,
    Code.BUSY: Busy,
    Code.FAILED: Failed,
    Code.GONE: Gone,
    Code.UNDER_WAY: UnderWay,
    Code.UNREACHABLE: Unreachable,
    Code.BUG: Bug,
}


def default_socket() -> str:
    """Return the socket of a caller that names none: the one in the environment, or the package's."""
    return os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET


def no_service(path: str) -> ServiceError:
    """Return the error for an answer that no service of ours gives."""
    problem = (
        f"the program that answers at {path} is not a service of this version; restart it with: systemctl restart "
        "xenbackend"
    )
    return ServiceError(Answer(Code.FAILED, sentence=problem))


def call(
    path: str, request: dict[str, Any], timeout_s: float | None = TIMEOUT_S, waiting: Waiting | None = None
) -> Answer:
    """Send a request such as ``{"verb": "ping"}``, and return the answer, if its code is OK.

    Raises: ServiceError, with the service's own sentence or one that says why it did not answer.
    """
    try:
        return _ask(path, request, timeout_s, waiting)
    except _NoAnswer as problem:
        raise ServiceError(problem.answer) from None


def give_order(
    path: str,
    request: dict[str, Any],
    what: str,
    wait_s: float | None = None,
    waiting: Waiting | None = None,
    answer_s: float | None = None,
) -> Answer:
    """Send an order and return its answer, however long that takes; with `wait_s` wait only so many seconds.

    `what` names the order for people: ``5/xvda: set``. After `wait_s` the service has `answer_s` more, by default
    TIMEOUT_S, to answer that the order is under way. Raises: ServiceError; its code is UNDER_WAY if the order may still
    be done.
    """
    answer_s = TIMEOUT_S if answer_s is None else answer_s
    try:
        if wait_s is None:
            return _ask(path, request, None, waiting)
        return _ask(path, {**request, "wait": wait_s}, wait_s + answer_s, waiting)
    except _NoAnswer as problem:
        sentence = f"{what} may be under way: {problem}; to see what became of it: xenbackend orders"
        raise ServiceError(Answer(Code.UNDER_WAY, sentence=sentence)) from None
    except ServiceError as problem:
        answer = problem.answer
        if answer.code is not Code.UNDER_WAY:
            raise
        number = answer.order
        where = "see: xenbackend status" if number is None else f"order {number}; see: xenbackend orders {number}"
        sentence = f"{what} is still under way, {where}"
        raise ServiceError(Answer(Code.UNDER_WAY, answer.data, sentence, number)) from None


def _ask(path: str, request: dict[str, Any], timeout_s: float | None, waiting: Waiting | None) -> Answer:
    """Do what `call` does. Raises: _NoAnswer, too."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as near:
        try:
            near.settimeout(timeout_s)
            near.connect(path)
            near.sendall(json.dumps(request).encode() + b"\n")
            line = _read_line(near, timeout_s, waiting or _nothing)
        except TimeoutError:
            problem = f"the service at {path} did not answer within {timeout_s:g} s"
            raise _NoAnswer(Answer(Code.UNREACHABLE, sentence=problem)) from None
        except ConnectionResetError:
            line = b""
        except OSError as error:
            problem = f"the service at {path} cannot be asked: {error.strerror or error}"
            if isinstance(error, FileNotFoundError | ConnectionRefusedError):
                problem = f"no service answers at {path}; {_START}"
            raise ServiceError(Answer(Code.UNREACHABLE, sentence=problem)) from None
    if not line.endswith(b"\n"):
        raise _NoAnswer(Answer(Code.GONE, sentence=f"the service at {path} closed the connection before it answered"))
    try:
        answer = Answer.from_json(json.loads(line))
    except (ValueError, KeyError, RecursionError):
        raise no_service(path) from None
    if answer.code is not Code.OK:
        raise ServiceError(answer)
    try:
        return replace(answer, data=plain.completed(request.get("verb"), answer.data))
    except (TypeError, AttributeError):
        raise no_service(path) from None


def _read_line(near: socket.socket, timeout_s: float | None, waiting: Waiting) -> bytes:
    """Return what the service sends, up to the end of a line or of the connection. Raises: TimeoutError, OSError."""
    begun = time.monotonic()
    line = b""
    near.settimeout(TICK_S if timeout_s is None else min(TICK_S, timeout_s))
    while not line.endswith(b"\n"):
        try:
            piece = near.recv(1 << 16)
        except TimeoutError:
            waited_s = time.monotonic() - begun
            if timeout_s is not None and waited_s >= timeout_s:
                raise
            waiting(waited_s)
            continue
        if not piece:
            break
        line += piece
    return line


def _nothing(_waited_s: float) -> None:
    """Do nothing: nobody wants to know."""
