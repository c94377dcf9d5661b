"""Limits how many turns are under way at once: the others wait, first come, first served.

Must not know what is done in a turn, nor wait for its end: one that takes longer keeps no other one from beginning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from xenbackend.loop.reactor import Reactor


@dataclass(eq=False, slots=True)
class Turn:
    """One turn, from when it was wanted; `due` is when it no longer counts, by the loop's clock."""

    begin: Callable[[], None]
    due: float = 0.0


class Turns:
    """All turns that are under way or wanted; `begin` of each is called once, from the loop or within `want`.

    most        how many count at once
    turn_s      for how long a turn counts
    on_crowd    gets 1 when a turn has to wait, and 0 when none has to any more
    """

    def __init__(self, loop: Reactor, most: int, turn_s: float, on_crowd: Callable[[int], None]) -> None:
        self.most, self.turn_s = most, turn_s
        self._on_crowd = on_crowd
        self._loop = loop
        self._begun: deque[Turn] = deque()  # the oldest first
        self._waiting: deque[Turn] = deque()
        self._timer = loop.timer(self._overdue)
        self._is_called = False

    @property
    def is_free(self) -> bool:
        """Return whether a turn that is wanted now begins at once."""
        return not self._waiting and len(self._begun) < self.most

    def want(self, begin: Callable[[], None]) -> Turn:
        """Call `begin` now, if a turn is free, else when others have ended. Raises: what `begin` raises now."""
        turn = Turn(begin)
        if not self.is_free:
            self._waiting.append(turn)
            if len(self._waiting) == 1:
                self._on_crowd(1)
            return turn
        self._count(turn)
        try:
            begin()
        except BaseException:
            self.end(turn)
            raise
        return turn

    def _count(self, turn: Turn) -> None:
        turn.due = self._loop.now() + self.turn_s
        self._begun.append(turn)
        if self._timer.due is None:
            self._timer.set(turn.due)

    def end(self, turn: Turn) -> None:
        """End a turn, so that the next one begins. One that has not begun never does."""
        with suppress(ValueError):
            self._begun.remove(turn)
        with suppress(ValueError):
            self._waiting.remove(turn)
            self._look_at_crowd()
        self._go_on()

    def _overdue(self) -> None:
        while self._begun and self._begun[0].due <= self._loop.now():
            self._begun.popleft()
        self._timer.set(self._begun[0].due if self._begun else None)
        self._go_on()

    def _go_on(self) -> None:
        """Have the next ones begin, from the loop: the caller, whose turn has ended, may not be done yet."""
        if self._waiting and len(self._begun) < self.most and not self._is_called:
            self._is_called = True
            self._loop.call_soon(self._begin_next)

    def _begin_next(self) -> None:
        self._is_called = False
        while self._waiting and len(self._begun) < self.most:
            turn = self._waiting.popleft()
            self._look_at_crowd()
            self._count(turn)
            try:
                turn.begin()
            except Exception as bug:  # this turn alone fails; the next one begins
                self._loop.bug(bug)
                self.end(turn)

    def _look_at_crowd(self) -> None:
        if not self._waiting:
            self._on_crowd(0)
