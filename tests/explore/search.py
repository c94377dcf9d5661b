"""All interleavings of what a guest, a disk and kills do to one ring, and what goes wrong in them.

Must not know how a worker works: it moves it by whole steps, and stops it before each access to memory.

A state is the memory, the guest's state, what the disk has done, and what the worker knows. In the middle of a step it
is instead what the worker knew at the step's beginning, how far it has come, and what it has read of the guest's memory
since. The worker is deterministic, so a state in the middle is reached by doing the step again with the guest's moves
at the same places.

The guest moves before each access of the worker to the ring, and between steps. It need not move elsewhere: nobody
could tell such a move from one that comes later, or after a kill. `everywhere` lets it move there too.

Only 64 bits of each state are kept: of a million states, two coincide with a probability of 1 in 37 million.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, NamedTuple

from tests.explore.essence import of_journal, of_ring
from tests.explore.guest import State, Violation
from tests.explore.memory import RING, STORE
from tests.explore.worker import Memory, Mind, Step, Worker


@dataclass(frozen=True)
class Bounds:
    """How much may happen.

    slots, requests, kills   of the ring, of the guest, of the worker
    limits                   how many requests may be taken together
    together                 how many requests the disk may give back together, in any order; or a batch as it was lent
    everywhere               whether the guest also moves before each store to the journal
    start                    the first value of the ring's indices
    forgets                  whether states that differ only in leftovers count as one
    """

    slots: int
    requests: int
    kills: int
    limits: tuple[int, ...] = (16,)
    together: int = 2
    everywhere: bool = False
    start: int = 0
    forgets: bool = False


@dataclass
class Found:
    """What was found. `ends` counts the states in which everything was answered."""

    states: int = 0
    ends: int = 0
    violations: Counter[str] = field(default_factory=Counter)
    path: list[Any] = field(default_factory=list)  # to the first violation


class Place(NamedTuple):
    """A state. `base` and the fields after it are set for a state in the middle of a step."""

    memory: Memory
    guest: State
    done: int
    kills: int
    mind: Mind | None  # None: the worker is dead, or in the middle
    base: Any = None  # (Place, Step)
    moves: tuple[tuple[str, ...], ...] = ()  # of the guest, before each access so far
    access: int = 0  # the kind of the next access
    reads: tuple[int, ...] = ()


class Search:
    """One search, which `run` does."""

    def __init__(self, bounds: Bounds, *, stops: bool = False) -> None:
        """Prepare a search that stops at the first violation if `stops`."""
        self.bounds = bounds
        self.found = Found()
        self._stops = stops
        self._seen: set[int] = set()
        self._todo: list[Place] = []
        self._worker = Worker(bounds.slots, bounds.requests, bounds.start, self._before)
        self._running: Place | None = None

    def run(self) -> Found:
        """Visit all states."""
        memory, mind = self._worker.start()
        self._meet(Place(memory, self._worker.guest.state, 0, 0, mind))
        while self._todo and not (self._stops and self.found.violations):
            self._go_on_from(self._todo.pop())
        self.found.states = len(self._seen)
        return self.found

    def _meet(self, place: Place) -> bool:
        """Record a state, and return whether it is new."""
        base = place.base and (self._journal_of(place.base[0]), place.base[0].mind, place.base[1], len(place.moves))
        memory = (self._ring_of(place), self._journal_of(place))
        key = hash((memory, place.guest, place.done, place.kills, place.mind, base, place.reads))
        if key in self._seen:
            return False
        self._seen.add(key)
        self._todo.append(place)
        return True

    def _journal_of(self, place: Place) -> Any:
        return of_journal(place.memory, self.bounds.slots) if self.bounds.forgets else place.memory[3:]

    def _ring_of(self, place: Place) -> Any:
        taken = self.bounds.start + place.guest.taken
        return of_ring(place.memory, taken, self.bounds.slots) if self.bounds.forgets else place.memory[:3]

    def _go_on_from(self, place: Place) -> None:
        if place.base is None or place.access & RING or self.bounds.everywhere:
            has_next = self._move_guest(place)
        else:
            has_next = True
        if place.base is None:
            for step in self._steps(place):
                has_next = True
                self._do(place, step)
            if self._worker.guest.requests == place.guest.taken:
                self.found.ends += 1
            elif not has_next:
                self._blame(place, "a request was lost: nothing can happen any more")
        is_alive = place.mind is not None or place.access & STORE
        if is_alive and place.kills < self.bounds.kills:
            self._meet(Place(place.memory, place.guest, place.done, place.kills + 1, None))

    def _stand_at(self, place: Place) -> None:
        worker = self._worker
        worker.load(place.memory)
        worker.guest.load(place.guest)
        worker.done = place.done

    def _move_guest(self, place: Place) -> bool:
        self._stand_at(place)
        guest = self._worker.guest
        moves = guest.moves()
        for move in moves:
            self._stand_at(place)
            try:
                guest.move(move)
            except Violation as problem:
                self._blame(place, str(problem), move)
                continue
            after = place._replace(memory=self._worker.memory(), guest=guest.state)
            if place.base is not None:
                after = after._replace(moves=(*place.moves[:-1], (*place.moves[-1], move)))
            if self._meet(after) and place.base is not None:
                self._do(*after.base, after)
        return bool(moves)

    def _steps(self, place: Place) -> list[Step]:
        """Return the steps that the worker, or its successor, can do next."""
        if place.mind is None:
            return [("go on",)]
        self._stand_at(place)
        worker = self._worker
        worker.think(place.mind)
        steps: list[Step] = []
        waiting = place.memory.req_prod - worker.queue.ring.consumed & 0xFFFF_FFFF
        if waiting > 0:
            steps += [
                ("take", limit) for limit in self.bounds.limits if limit == self.bounds.limits[-1] or limit < waiting
            ]
        entries = worker.in_flight()
        batches = {each for size in range(1, self.bounds.together + 1) for each in permutations(entries, size)}
        return steps + [("answer", batch) for batch in sorted(batches | set(worker.whole_batches()))]

    def _do(self, base: Place, step: Step, place: Place | None = None) -> None:
        """Do a step, or continue it from `place`, and record every state on the way."""
        worker = self._worker
        self._stand_at(base)
        if base.mind is not None:
            worker.think(base.mind)
        self._running = Place(base.memory, base.guest, base.done, base.kills, None, (base, step))
        self._script = place.moves if place else ()
        self._reached: tuple[tuple[str, ...], ...] = ()
        try:
            worker.do(step)
        except Violation as problem:
            self._blame(self._now(), str(problem))
            return
        except Exception as problem:
            self._blame(self._now(), f"{type(problem).__name__}: {problem}")
            return
        finally:
            self._running = None
        self._meet(Place(worker.memory(), worker.guest.state, worker.done, base.kills, worker.mind()))

    def _now(self) -> Place:
        worker, running = self._worker, self._running
        assert running is not None
        return running._replace(memory=worker.memory(), guest=worker.guest.state, done=worker.done, moves=self._reached)

    def _before(self, access: int) -> None:
        """Called before each access of the worker: let the guest make the moves that are due, and record the state."""
        if self._running is None:
            return
        turn = len(self._reached)
        if turn < len(self._script):
            for move in self._script[turn]:
                self._worker.guest.move(move)
            self._reached += (self._script[turn],)
            return
        self._reached += ((),)
        self._meet(self._now()._replace(access=access, reads=self._worker.reads))

    def _blame(self, place: Place, why: str, *more: Any) -> None:
        if not self.found.violations:
            self.found.path = [place, *more]
        self.found.violations[why] += 1
