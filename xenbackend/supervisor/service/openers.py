"""All openers of a service: one that was started in advance, those at work, and those that wait for their turn.

Must not let many work at once, even if many workers die together: they would only take CPU time from each other, and
from the rest of the host. One that waits for storage does not count, so that it holds up no other one.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from socket import socket

from xenbackend.errors import KernelError
from xenbackend.kernel.process import boost, unboost
from xenbackend.log import Logger
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import jobs
from xenbackend.supervisor.service import process
from xenbackend.supervisor.service.opener import PATIENCE_S, Assignment, OnEnd, OnFound, OnWaits, Opener
from xenbackend.supervisor.service.process import Process
from xenbackend.supervisor.service.turns import Turn, Turns

# Openers at work at once. An opener and its worker wait for each other in turn, so two openers keep one CPU busy.
MOST = min(16, max(4, 2 * len(os.sched_getaffinity(0))))
TURN_S = 0.25  # for which one counts as working; only one that waits, for storage or the guest, takes longer


class Openers:
    """The openers of one service.

    spare    one that was started in advance, together with a worker; None if there is none
    """

    def __init__(self, loop: Reactor, start: Callable[[], Process], log: Logger) -> None:
        """`start` starts an opener that has no job yet. Raises: KernelError."""
        self.spare: Process | None = None
        self._loop = loop
        self._start = start
        self._log = log
        self._complaint = ""
        self._turns = Turns(loop, MOST, TURN_S, _hurry)
        self._all: dict[Opener, Turn] = {}  # that have not ended

    @property
    def want_spare(self) -> bool:
        """Return whether the next opener is better started together with its worker, in one step."""
        return self.spare is None and self._turns.is_free

    def open(
        self, job: jobs.Job, kept: Sequence[int], on_found: OnFound, on_end: OnEnd, on_waits: OnWaits
    ) -> tuple[Opener, socket]:
        """See `Fleet.open`."""
        near, far = process.pair()
        with ExitStack() as undo:
            undo.callback(near.close)
            assignment = undo.enter_context(closing(Assignment(job, far, kept)))
            opener = Opener(self._loop, assignment, on_found, partial(self._has_ended, on_end), on_waits)
            if self._turns.is_free:
                turn = self._turns.want(partial(self._begin, opener))
            else:
                try:
                    assignment.keep()
                except OSError as error:
                    raise KernelError("keep the descriptors for an opener", error.errno or errno.EIO) from None
                turn = self._turns.want(partial(self._begin_late, opener))
            self._all[opener] = turn
            undo.pop_all()
        return opener, near

    def drop_spare(self) -> None:
        """End the opener that was started in advance."""
        spare, self.spare = self.spare, None
        if spare is not None:
            spare.kill()
            spare.wait()

    def close(self) -> None:
        """End all openers that are left; no worker of ours is. Those that hang are waited for together."""
        self.drop_spare()
        for opener in list(self._all):
            opener.kill()
        give_up = time.monotonic() + PATIENCE_S
        for opener in list(self._all):
            opener.end(max(0.0, give_up - time.monotonic()))
        self._all.clear()

    def _begin(self, opener: Opener) -> None:
        """Have an opener become a process. Raises: KernelError."""
        problem = KernelError("give an opener its job", errno.EIO)
        for started in self._candidates():
            try:
                opener.begin(started)
            except OSError as error:  # the one that was started in advance may have ended
                started.kill()
                started.wait()
                problem = KernelError("give an opener its job", error.errno or errno.EIO)
            else:
                return
        raise problem

    def _begin_late(self, opener: Opener) -> None:
        """Have an opener that has waited become a process. A failure is reported as its end."""
        try:
            self._begin(opener)
        except KernelError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                self._log.warning(str(error))
            opener.kill()

    def _candidates(self) -> Iterator[Process]:
        """Yield the opener that was started in advance, if there is one, then a new one."""
        spare, self.spare = self.spare, None
        if spare is not None:
            yield spare
        yield self._start()

    def _has_ended(self, on_end: OnEnd, opener: Opener, breach: str) -> None:
        turn = self._all.pop(opener, None)
        if turn is not None:
            self._turns.end(turn)
        on_end(opener, breach)


def _hurry(crowd: int) -> None:
    """Give this service priority over the rest of the host while openers wait for their turn.

    Else it would come after those that have begun, which are boosted if a guest waits for them.
    """
    if crowd:
        boost(os.getpid())
    else:
        unboost(os.getpid())
