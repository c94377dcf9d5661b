"""Asks a running service: one request, one answer over its control socket.

Must not print.

A question (`call`) is answered at once, or the service does not work. An order (`give_order`) takes as long as it
takes: only who has given a time waits no longer than that, and then the order goes on.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from xenbackend.errors import XenbackendError
from xenbackend.protocol import older
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code

DEFAULT_SOCKET = "/run/xenbackend/control.sock"
TIMEOUT_S = 10.0  # for the answer to a question; and to an order, beyond the time that it was given
TICK_S = 0.25  # how often whoever waits is told that he does
_START = "start it with: systemctl start xenbackend (or: xenbackend run)"

Waiting = Callable[[float], None]  # called now and then with the seconds that were waited


class ServiceError(XenbackendError):
    """The service said no, or did not say anything; `answer` has the code, and what is known beside it."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.sentence)
        self.answer = answer


class _NoAnswer(ServiceError):
    """The request was sent, and nobody knows what became of it."""


def call(
    path: str, request: dict[str, Any], timeout_s: float | None = TIMEOUT_S, waiting: Waiting | None = None
) -> Answer:
    """Send a request such as ``{"verb": "ping"}`` and return the answer, whose code is OK.

    Raises: ServiceError, with the service's own sentence or one that says why it did not answer.
    """
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
    except (ValueError, KeyError):
        problem = f"what answers at {path} is no service of this version; restart it with: systemctl restart xenbackend"
        raise ServiceError(Answer(Code.FAILED, sentence=problem)) from None
    if answer.code is not Code.OK:
        raise ServiceError(answer)
    return replace(answer, data=older.completed(request.get("verb"), answer.data))


def give_order(
    path: str, request: dict[str, Any], what: str, wait_s: float | None = None, waiting: Waiting | None = None
) -> Answer:
    """Send an order and return its answer, however long that takes; with `wait_s` no longer than so many seconds.

    `what` names the order for people: ``5/xvda: set``. Raises: ServiceError; its code is UNDER_WAY where the order may
    still be done.
    """
    try:
        if wait_s is None:
            return call(path, request, None, waiting)
        return call(path, {**request, "wait": wait_s}, wait_s + TIMEOUT_S, waiting)
    except _NoAnswer as problem:
        sentence = f"{what} may be under way: {problem}; what became of it: xenbackend orders"
        raise ServiceError(Answer(Code.UNDER_WAY, sentence=sentence)) from None
    except ServiceError as problem:
        answer = problem.answer
        if answer.code is not Code.UNDER_WAY:
            raise
        number = answer.order
        where = "see: xenbackend status" if number is None else f"order {number}; see: xenbackend orders {number}"
        sentence = f"{what} is still under way, {where}"
        raise ServiceError(Answer(Code.UNDER_WAY, answer.data, sentence, number)) from None


def _read_line(near: socket.socket, timeout_s: float | None, waiting: Waiting) -> bytes:
    """Return what the service says, up to the end of a line or of the connection. Raises: TimeoutError, OSError."""
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
    """Nobody looks."""
