"""How many work at once: the others wait for their turn, first come, first served.

Must not know what is done in a turn, nor wait for its end: whoever takes longer keeps nobody from beginning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from xenbackend.loop.reactor import Reactor


@dataclass(eq=False, slots=True)
class Turn:
    """One turn, from when it was wanted; `due` is when it counts no longer, by the loop's clock."""

    begin: Callable[[], None]
    due: float = 0.0


class Turns:
    """All that are under way or wanted; `begin` of each is called once, from the loop or within `want`.

    most        that count at once
    turn_s      for how long one counts
    on_crowd    gets 1 when somebody has to wait, and 0 when nobody has to any more
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
        """Return whether whoever wants a turn has it at once."""
        return not self._waiting and len(self._begun) < self.most

    def want(self, begin: Callable[[], None]) -> Turn:
        """Call `begin` now, where it is free, else when others have ended. Raises: what `begin` raises now."""
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
        """Let the next one have its turn; nothing where it has ended, and one that has not begun never does."""
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
        """Have the next ones begin: from the loop, as whoever has ended is not done yet."""
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
            except Exception as bug:  # over this one; the next one is another matter
                self._loop.bug(bug)
                self.end(turn)

    def _look_at_crowd(self) -> None:
        if not self._waiting:
            self._on_crowd(0)
