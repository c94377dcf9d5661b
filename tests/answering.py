"""A control socket that answers as a test wants: the peer of a client, without a service."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from xenbackend import counters
from xenbackend.client import Disk, Service, results
from xenbackend.protocol import plain
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code

Request = dict[str, Any]
Answering = Callable[[Request], Answer | bytes | None]  # None: it hangs until the client gives up; bytes: as they are


class Control:
    """The socket's path, and what was asked there."""

    def __init__(self, path: Path, answer: Answering) -> None:
        self.path = str(path)
        self.asked: list[Request] = []  # but for the tokens of orders, which are others each time
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        self._socket.listen()
        self._clients: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """Stop answering, and wait for all threads."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in self._clients:
            each.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._socket.accept()
            except OSError:
                return
            client = threading.Thread(target=self._serve_one, args=(near,))
            client.start()  # before anybody joins it
            self._clients.append(client)

    def _serve_one(self, near: socket.socket) -> None:
        with near, near.makefile("rb") as stream:
            line = stream.readline()
            if not line:
                return  # the test has ended the client before it asked
            request = json.loads(line)
            self.asked.append({key: value for key, value in request.items() if key != "token"})
            try:
                answer = self._answer(request)
            except Exception as bug:
                answer = Answer(Code.BUG, sentence=f"{type(bug).__name__}: {bug}")
            if isinstance(answer, Answer):
                near.sendall(json.dumps(answer.as_json()).encode() + b"\n")
            elif answer is not None:
                near.sendall(answer)
            else:
                stream.readline()


@contextmanager
def answering(path: Path, answer: Answering) -> Iterator[Control]:
    """Give a control socket."""
    control = Control(path, answer)
    try:
        yield control
    finally:
        control.close()


DISK = {
    "vbd": "5/xvda", "node": "vbd/5/51712", "kind": "vbd", "domid": 5, "guest": "mail", "device": "xvda",
    "chain": "log:|aio:/img", "read_only": False, "state": "Connected", "frontend_state": "Connected",
    "phase": "serving", "since": 0.0, "braked_s": 0.0, "paused": False, "paused_by": "", "reason": "", "error": "",
    "under_way": [], "waits_s": None, "waits_for": "",
    "worker": 12, "worker_since": 0.0, "worker_version": "0.1.0", "needs_upgrade": False, "restarts": 0, "layers": [],
    "walls": ["user", "calls"], "no_walls": {}, "needs": [],
    "files": [{"file": "/img", "now": "same", "difference": ""}],
    "counters": {**dict.fromkeys(counters.NAMES, 0), "reads": 7, "errors": 3},
    "latency_histogram": [0] * 48,
    "latency_by_operation": {each: {"sum_ns": 0, "buckets": [0] * 48} for each in counters.OPERATIONS},
}  # fmt: skip
LAYER = {
    "text": "aio:/img", "size": 1 << 30, "sector_size": 512, "read_only": False, "can_flush": True,
    "can_discard": True, "discard_granularity": 4096, "discard_alignment": 0, "physical_sector_size": 4096,
    "parent_of": "", "facts": {"file": "/img"}, "figures": [],
}  # fmt: skip
CHAIN = {"chain": "log:|aio:/img", "layers": [LAYER]}
ENTRY = {
    "number": 17, "verb": "set", "vbd": "5/xvda", "who": {"uid": 0, "pid": 33, "command": "xenbackend"},
    "from": "aio:/img", "to": "log:|aio:/img", "began": 1e9, "ended": 1e9 + 2.5, "code": "ok", "error": "", "token": "",
}  # fmt: skip
_DONE: dict[str, Any] = {
    "ping": {
        "pid": 11,
        "version": "0.1.0",
        "since": 0.0,
        "bugs": 0,
        "breaches": 0,
        "host": "xenbackend.rig.host:/x",
        "store": "/run/xenstored/socket",
        "store_error": "",
        "waits": [{"vbd": "5/xvda", "for": "its chain"}],
    },
    "status": [DISK],
    "orders": [ENTRY],
    "set": CHAIN,
    "snapshot": CHAIN,
    "resize": CHAIN,
    "keep": CHAIN,
    "drop": CHAIN,
    "pause": {"paused": True},
    "resume": {"paused": False},
    "policy": {"policy": "enospc=pause"},
    "upgrade": {"worker": 13},
    "stop": {"pid": 11, "untold": [{"vbd": "5/xvda", "chain": "aio:/img", "next_chain": ""}]},
    "measure": {
        "chain": "log:|aio:/img",
        "seconds": 1.0,
        "layers": [
            {
                "layer": "log:",
                "operations": {"read": {"bytes": 8192, "sum_ns": 300_000, "buckets": {"17": 1, "18": 1}}},
            },
            {"layer": "aio:/img", "operations": {}},
        ],
    },
    "end_measure": {},
    "command": "8 3\nend\n",
}


def working(request: Request) -> Answer:
    """Answer as a healthy service does; each order has the number 17."""
    verb = str(request["verb"])
    data = _DONE[verb]
    if request.get("dry_run"):
        data = {**CHAIN, "before": ["aio:/img"], "after": ["log:", "aio:/img"]}
    if request.get("command") not in (None, "get", "peek"):
        data = "tracking on\ngranularity 512\nsize 1048576\n"
    return Answer(Code.OK, data, order=None if verb in ("ping", "status", "orders") else 17)


def typed_disk(said: Mapping[str, Any] = DISK, **changes: Any) -> Disk:
    """Return a description of a disk, with some of it changed, as a client returns it."""
    [completed] = plain.completed("status", [{**deepcopy(said), **changes}])
    return results.disk(completed)


def typed_service(**changes: Any) -> Service:
    """Return that service's description of itself, as a client returns it."""
    return results.service({**_DONE["ping"], **changes})


def moved(known: dict[str, Any], **counts: int) -> dict[str, Any]:
    """Return a description as it is once so much more has been counted."""
    later = deepcopy(known)
    later["latency_histogram"][17] += counts.get("latency_samples", 0)
    for name, count in counts.items():
        later["counters"][name] += count
    return later
