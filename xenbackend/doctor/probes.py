"""Runs looks in parallel, each in its own process with a time limit.

Must not be used while a second thread runs. A process that waits for dead storage or a stopped daemon may be in an
uninterruptible call. Then it is killed and not waited for: it ends when the storage answers.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from xenbackend.doctor.finding import Finding, Verdict, unknown
from xenbackend.kernel.process import end_with, state_of

LIMIT_S = 4.0  # for one look
ALL_S = 15.0  # for all together
_AT_ONCE = 32
_REAP_S = 0.05
_IN_CALL = 4  # times in a row that a process is seen in an uninterruptible call before it is left alone
_PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a look: findings, and plain values for the looks that follow."""

    findings: list[Finding] = field(default_factory=list)
    data: Any = None


@dataclass(frozen=True, slots=True)
class Probe:
    """One look. `check` and `what` name its subject in the finding if it does not return."""

    check: str
    what: str
    look: Callable[[], Result]
    disk: str = ""


class _Child:
    """A running look."""

    def __init__(self, probe: Probe, others: Sequence[_Child]) -> None:
        self.begun = time.monotonic()
        self.probe = probe
        self.said = b""
        self.fd, far = os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(probe, parent, far, [self.fd, *(each.fd for each in others)])
        os.close(far)
        with suppress(OSError):  # the child may have done so already
            os.setpgid(self.pid, self.pid)

    def hear(self) -> bool:
        """Receive output of the process. Return whether that was all."""
        piece = os.read(self.fd, _PIECE)
        self.said += piece
        return not piece or self.said.endswith(b"\n")

    def end(self) -> Result:
        """End the process, and return what it has found."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # with its children; its number is its own until it is reaped
        _reap(self.pid)
        os.close(self.fd)
        took_s = round(time.monotonic() - self.begun, 3)
        if not self.said.endswith(b"\n"):
            return _nothing(self.probe, f"did not answer within {took_s:.1f} s", took_s)
        values = json.loads(self.said)
        if "bug" in values:
            return _nothing(self.probe, f"could not be examined: {values['bug']}", took_s)
        found = [Finding(**{**each, "verdict": Verdict(each["verdict"])}) for each in values["findings"]]
        return Result([replace(each, took_s=took_s) for each in found], values["data"])


def run(probes: Sequence[Probe], *, limit_s: float = LIMIT_S, all_s: float = ALL_S) -> list[Result]:
    """Return the result of each look, in order; one that takes too long has the verdict UNKNOWN."""
    results: dict[int, Result] = {}
    left = list(enumerate(probes))[::-1]
    children: dict[int, _Child] = {}
    give_up = time.monotonic() + all_s
    try:
        while left or children:
            now = time.monotonic()
            while left and len(children) < _AT_ONCE and now < give_up:
                place, probe = left.pop()
                children[place] = _Child(probe, list(children.values()))
            if now >= give_up:
                for place, probe in left:
                    results[place] = _nothing(probe, f"was not examined: all checks together took {all_s:g} s", 0.0)
                left = []
            for place in _over(children, limit_s, give_up):
                results[place] = children.pop(place).end()
    finally:
        for each in children.values():
            each.end()
    return [results[place] for place in range(len(probes))]


def _over(children: dict[int, _Child], limit_s: float, give_up: float) -> list[int]:
    """Wait until some looks are complete, or their time is up, and return the places of these."""
    poll = select.poll()
    places = {each.fd: place for place, each in children.items()}
    for fd in places:
        poll.register(fd, select.POLLIN)
    soonest = min((each.begun for each in children.values()), default=time.monotonic()) + limit_s
    wait_s = max(0.0, min(soonest, give_up) - time.monotonic())
    over = [places[fd] for fd, _ in poll.poll(wait_s * 1000) if children[places[fd]].hear()]
    now = time.monotonic()
    return over + [
        place
        for place, each in children.items()
        if place not in over and (now >= each.begun + limit_s or now >= give_up)
    ]


def _reap(pid: int) -> None:
    """Wait for the end of a killed process, unless it is in an uninterruptible call."""
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    in_call = 0
    while not poll.poll(_REAP_S * 1000) and in_call < _IN_CALL:
        in_call = in_call + 1 if state_of(pid) == "D" else 0
    os.close(pidfd)
    os.waitpid(pid, os.WNOHANG)


def _nothing(probe: Probe, why: str, took_s: float) -> Result:
    return Result([replace(unknown(probe.check, f"{probe.what} {why}", disk=probe.disk), took_s=took_s)])


def _be_child(probe: Probe, parent: int, far: int, others: Sequence[int]) -> None:
    """Look, report the result, and end, whatever happens: no code of the parent may run a second time here."""
    try:
        os.setpgid(0, 0)
        end_with(parent, signal.SIGKILL)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):  # a reader of our own output must not wait for a child that hangs
            os.dup2(nowhere, standard)
        for fd in others:
            os.close(fd)
        try:
            result = probe.look()
            values: dict[str, Any] = {"findings": [asdict(each) for each in result.findings], "data": result.data}
        except Exception as bug:
            values = {"bug": f"{type(bug).__name__}: {bug}"}
        text = json.dumps(values).encode() + b"\n"
        while text:
            text = text[os.write(far, text) :]
    finally:
        os._exit(0)
