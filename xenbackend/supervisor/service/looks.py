"""Looks up for `status` what names mean now, in a process of its own, so that no storage can hold up the service.

Must not wait for that process: the answer has what is known after LOOK_S. A name that has hung until then is left out
of every look until the process that hangs on it has ended, so that it hides no other name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from xenbackend.errors import KernelError
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import codec, datagrams, opening
from xenbackend.supervisor.service.fleet import Fleet
from xenbackend.supervisor.service.process import Process

LOOK_S = 1.0
_AT_ONCE = 16  # names of one message, each of up to 4096 bytes

Then = Callable[[Mapping[str, opening.Meaning]], None]


class Looks:
    """All looks that are under way."""

    def __init__(self, fleet: Fleet, loop: Reactor) -> None:
        self._fleet = fleet
        self._loop = loop
        self._looks: set[_Look] = set()

    def look(self, names: Iterable[str], then: Then) -> None:
        """Look up names, and call `then` once, after LOOK_S at the latest, with what is known of them."""
        hanging = {each.name for each in self._looks if each.is_over}
        wanted = [name for name in dict.fromkeys(names) if name not in hanging]
        if not wanted:
            then({})
            return
        try:
            process = self._fleet.start_opener()
        except KernelError:  # `status` must not fail because of this
            then({})
            return
        self._looks.add(_Look(self._loop, process, wanted, then, self._looks.discard))

    def close(self) -> None:
        """End all looks."""
        for each in list(self._looks):
            each.close()


class _Look:
    """One process, and the names that it looks up.

    is_over   the answer has been given; the process, if it has not ended, hangs on `name`
    """

    def __init__(
        self, loop: Reactor, process: Process, names: list[str], then: Then, on_end: Callable[[_Look], None]
    ) -> None:
        self.is_over = False
        self._loop = loop
        self._process = process
        self._left = names[::-1]  # the next one last
        self._unasked = names
        self._known: dict[str, opening.Meaning] = {}
        self._then = then
        self._on_end = on_end
        self._limit = loop.timer(self._answer)
        self._limit.set(loop.now() + LOOK_S)
        loop.add(process.socket.fileno(), self._receive)
        process.watch(loop, self._reap)
        self._ask()

    @property
    def name(self) -> str:
        """The name that is being looked up; empty if none is."""
        return self._left[-1] if self._left else ""

    def close(self) -> None:
        """Answer, and leave the process, which ends as soon as it can."""
        self._answer()
        self._process.leave()
        self._on_end(self)

    def _reap(self) -> None:
        self._answer()
        self._process.wait()
        self._on_end(self)

    def _ask(self) -> None:
        asked, self._unasked = self._unasked[:_AT_ONCE], self._unasked[_AT_ONCE:]
        try:
            self._process.socket.send(opening.encode(opening.Look(asked)))
        except OSError:
            self._answer()

    def _receive(self) -> None:
        try:
            data, _, _ = datagrams.receive(self._process.socket, opening.MAX_MESSAGE, 1)
            meaning = opening.from_opener(data) if data else None
        except BlockingIOError:
            return
        except (OSError, codec.NotAMessage):
            meaning = None
        if not isinstance(meaning, opening.Meaning) or meaning.name != self.name:
            self._answer()
            return
        self._known[self._left.pop()] = meaning
        if not self._left:
            self._answer()
        elif len(self._left) == len(self._unasked):
            self._ask()

    def _answer(self) -> None:
        """Call `then` with what is known, once, and kill the process."""
        if self.is_over:
            return
        self.is_over = True
        self._limit.set(None)
        self._loop.remove(self._process.socket.fileno())
        self._process.kill()
        self._then(self._known)
