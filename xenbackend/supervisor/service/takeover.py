"""What an earlier service has left of each vbd, until there is a vbd that goes on with it.

Must not look into what was left.

A worker of a former version is ended first, and its place stays occupied for as long as that takes. If the host is
short of something, the takeover is tried again, and everything stays as it is meanwhile: a running worker goes on
serving. If what was left leads to a bug of ours, the worker is killed, nothing of it is used, and the place is looked
at as a new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial

from xenbackend.errors import KernelError
from xenbackend.kernel.process import kill
from xenbackend.log import get_logger
from xenbackend.loop.reactor import Timer
from xenbackend.protocol.answers import Reply
from xenbackend.supervisor.vbd.context import Context
from xenbackend.supervisor.vbd.inheritance import What, end_predecessor, name_of, sort_inherited
from xenbackend.supervisor.xenstore.paths import VbdPath

RETRY_S = 1.0  # after the host was short of something


class Taken(Enum):
    """Whether what was left could be taken over."""

    DONE = auto()
    LATER = auto()  # the host is short of something
    NEVER = auto()  # it leads to a bug of ours


Take = Callable[[VbdPath, Mapping[What, int]], Taken]


@dataclass
class _Occupant:
    """What occupies a place: a worker that is about to end, by its pidfd; or what was left, until the next try.

    then      called once the worker has ended, or for the next try
    scripts   that wait for the place
    """

    then: Callable[[], None]
    pidfd: int = -1
    timer: Timer | None = None
    scripts: list[Reply] = field(default_factory=list)


class Takeover:
    """All that an earlier service has left; `paths` are those of its vbds."""

    def __init__(self, context: Context, domid: int, take: Take, free: Callable[[VbdPath, list[Reply]], None]) -> None:
        """`take` makes a vbd that goes on with these descriptors, if it can; else it closes them.

        `free` gets a place that may be looked at again, with the scripts that have waited for it.
        """
        self._keeper = context.keeper
        self._loop = context.loop
        self._take = take
        self._free = free
        self._found = sort_inherited(context.keeper, domid)
        for path in context.last_chains.paths():  # vbds of which the keeper has nothing
            if path.backend_domid == domid:
                self._found.setdefault(path, {})
        self._occupants: dict[VbdPath, _Occupant] = {}
        self._log = get_logger("supervisor")
        self.paths = list(self._found)

    def start(self) -> None:
        """Take over everything, also from vbds whose node has gone meanwhile, which are then closed."""
        if self.paths:
            self._log.info("taking over from an earlier service", vbds=len(self.paths))
        for path in self.paths:
            pidfd = end_predecessor(self._keeper, path, self._found[path])
            if pidfd < 0:
                self._take_over(path)
            else:
                self._occupy(path, pidfd, partial(self._take_over, path))

    @property
    def is_over(self) -> bool:
        """True once everything has been taken over or dropped."""
        return not self._found

    def occupies(self, path: VbdPath) -> bool:
        """Return whether a place is still occupied by what was left."""
        return path in self._occupants

    def wait(self, path: VbdPath, script: Reply) -> None:
        """Let a script wait until an occupied place is free."""
        self._occupants[path].scripts.append(script)

    def close(self) -> list[Reply]:
        """Leave what has not been taken over to the next service, and return the scripts that wait."""
        waiting = [script for each in self._occupants.values() for script in each.scripts]
        for path in list(self._occupants):
            self._vacate(path)
        for found in self._found.values():
            for fd in found.values():
                os.close(fd)
        self._found.clear()
        return waiting

    def _take_over(self, path: VbdPath) -> None:
        """Have a vbd go on with copies of the descriptors, so that all of them are still there if it cannot now."""
        found = self._found[path]
        try:
            copies = _copies(found)
        except OSError as error:
            self._log.error(f"take over what an earlier service left: {error.strerror}", vbd=str(path))
            self._rest(path)
            return
        taken = self._take(path, copies)
        if taken is Taken.LATER:
            self._rest(path)
            return
        if taken is Taken.NEVER:
            self._log.error("what an earlier service left cannot be used; its worker is killed", vbd=str(path))
            self._end_worker(path)
        else:
            self._let_go(path)

    def _end_worker(self, path: VbdPath) -> None:
        """Have the keeper forget what cannot be used, kill the worker, and close everything once it has ended."""
        found = self._found[path]
        for what in found:
            with suppress(KernelError):
                self._keeper.forget(name_of(path, what))
        pidfds = [fd for (kind, _), fd in found.items() if kind == "pidfd"]
        for pidfd in pidfds:
            kill(pidfd)
        if pidfds:
            self._occupy(path, max(pidfds), partial(self._let_go, path))
        else:
            self._let_go(path)

    def _let_go(self, path: VbdPath) -> None:
        for fd in self._found.pop(path).values():
            os.close(fd)

    def _occupy(self, path: VbdPath, pidfd: int, then: Callable[[], None]) -> None:
        self._occupants[path] = _Occupant(then, pidfd=pidfd)
        self._loop.add(pidfd, partial(self._end, path))

    def _rest(self, path: VbdPath) -> None:
        timer = self._loop.timer(partial(self._end, path))
        self._occupants[path] = _Occupant(partial(self._take_over, path), timer=timer)
        timer.set(self._loop.now() + RETRY_S)

    def _end(self, path: VbdPath) -> None:
        occupant = self._vacate(path)
        occupant.then()
        if path in self._occupants:
            self._occupants[path].scripts.extend(occupant.scripts)
        else:
            self._free(path, occupant.scripts)

    def _vacate(self, path: VbdPath) -> _Occupant:
        occupant = self._occupants.pop(path)
        if occupant.pidfd >= 0:
            self._loop.remove(occupant.pidfd)
        if occupant.timer is not None:
            occupant.timer.set(None)
        return occupant


def _copies(found: Mapping[What, int]) -> dict[What, int]:
    """Return copies of descriptors, all or none. Raises: OSError."""
    copies: dict[What, int] = {}
    try:
        for what, fd in found.items():
            copies[what] = os.dup(fd)
    except OSError:
        for fd in copies.values():
            os.close(fd)
        raise
    return copies
