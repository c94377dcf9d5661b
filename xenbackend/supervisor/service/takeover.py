"""What an earlier service has left of each vbd, until there is a vbd that goes on with it.

Must not look into what was left.

A worker of a former version is ended first, and its place stays occupied for as long as that takes. Where what was left
leads to a fault of ours the worker is killed, nothing of it is used, and the place is looked at as one that is new.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from xenbackend.errors import KernelError
from xenbackend.kernel.process import kill
from xenbackend.log import get_logger
from xenbackend.protocol.answers import Reply
from xenbackend.supervisor.vbd.context import Context
from xenbackend.supervisor.vbd.inheritance import What, end_predecessor, name_of, sort_inherited
from xenbackend.supervisor.xenstore.paths import VbdPath

Take = Callable[[VbdPath, Mapping[What, int]], bool]


@dataclass
class _Occupant:
    """A worker that is about to end: its pidfd, what comes then, and the scripts that wait for it."""

    pidfd: int
    then: Callable[[], None]
    scripts: list[Reply] = field(default_factory=list)


class Takeover:
    """All of it; `paths` are those of vbds that there were."""

    def __init__(self, context: Context, domid: int, take: Take, free: Callable[[VbdPath, list[Reply]], None]) -> None:
        """`take` makes a vbd that goes on with these descriptors, and returns whether it could; else they are closed.

        `free` hears of a place that may be looked at, with the scripts that have waited for it.
        """
        self._keeper = context.keeper
        self._loop = context.loop
        self._take = take
        self._free = free
        self._found = sort_inherited(context.keeper, domid)
        for path in context.last_chains.paths():  # of which nobody has kept anything
            if path.backend_domid == domid:
                self._found.setdefault(path, {})
        self._occupants: dict[VbdPath, _Occupant] = {}
        self._log = get_logger("supervisor")
        self.paths = list(self._found)

    def start(self) -> None:
        """Go on with all of it, also with what is of vbds whose node has gone meanwhile: they are closed."""
        if self.paths:
            self._log.info("taking over from an earlier service", vbds=len(self.paths))
        for path in self.paths:
            pidfd = end_predecessor(self._found[path])
            if pidfd < 0:
                self._take_over(path)
            else:
                self._occupy(path, pidfd, partial(self._take_over, path))

    @property
    def is_over(self) -> bool:
        """True once nothing is left that nobody goes on with."""
        return not self._found

    def occupies(self, path: VbdPath) -> bool:
        """Return whether a former worker is still in a place."""
        return path in self._occupants

    def wait(self, path: VbdPath, script: Reply) -> None:
        """Let a script wait until an occupied place is free."""
        self._occupants[path].scripts.append(script)

    def close(self) -> list[Reply]:
        """Leave what is left to the next service, and return the scripts that wait."""
        waiting = [script for each in self._occupants.values() for script in each.scripts]
        for path in list(self._occupants):
            self._vacate(path)
        for found in self._found.values():
            for fd in found.values():
                os.close(fd)
        self._found.clear()
        return waiting

    def _take_over(self, path: VbdPath) -> None:
        found = self._found.pop(path)
        pidfds = [os.dup(fd) for (kind, _), fd in found.items() if kind == "pidfd"]
        if not self._take(path, found):
            self._log.error("what an earlier service has left cannot be used, and its worker is killed", vbd=str(path))
            for what in found:
                with suppress(KernelError):
                    self._keeper.forget(name_of(path, what))
            for pidfd in pidfds:
                kill(pidfd)
                self._occupy(path, pidfd, lambda: None)
        for pidfd in pidfds:
            os.close(pidfd)

    def _occupy(self, path: VbdPath, pidfd: int, then: Callable[[], None]) -> None:
        pidfd = os.dup(pidfd)
        self._occupants[path] = _Occupant(pidfd, then)
        self._loop.add(pidfd, partial(self._end, path))

    def _end(self, path: VbdPath) -> None:
        occupant = self._vacate(path)
        occupant.then()
        self._free(path, occupant.scripts)

    def _vacate(self, path: VbdPath) -> _Occupant:
        occupant = self._occupants.pop(path)
        self._loop.remove(occupant.pidfd)
        os.close(occupant.pidfd)
        return occupant
