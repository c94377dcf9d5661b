"""What was seen of a vbd's two ends: the backend's keys, the frontend's state, and whether they are still this vbd's.

Must not know how far a worker is, nor read xenstore.

A toolstack may make a node anew in the same place while the worker has not ended yet. The new node is another vbd: this
one is over, and takes nothing from the new node. A new node is recognised by our state, which only a toolstack sets to
Initialising, or because it lacks the keys that we publish, which nobody else removes. Neither counts before our state
and keys were seen in the node or accepted by xenstore, since a write of ours may have failed. A claim (`claim.py`)
makes the directory again with our keys in it, so the vbd goes on, as long as nobody looks while the directory is away.
"""

from __future__ import annotations

from collections.abc import Mapping

from xenbackend.blkif.features import Limits, publish_at_probe
from xenbackend.blkif.handshake import XenbusState, parse_state
from xenbackend.errors import ConfigError
from xenbackend.supervisor.vbd.events import Exchanged, Seen
from xenbackend.supervisor.vbd.negotiation import STATUS
from xenbackend.supervisor.vbd.reasons import Cause
from xenbackend.supervisor.vbd.spec import Spec, in_one_line, parse_spec
from xenbackend.supervisor.xenstore.paths import VbdPath

_S = XenbusState
_OURS = frozenset(publish_at_probe(Limits()))
_OFFERING = (_S.INITIALISED, _S.CONNECTED)  # the frontend's states in which its keys name the rings that it uses


class Sight:
    """What was seen, and what was written since; the next look corrects it if a write failed.

    keys         of the backend's directory, None before the first look and once the vbd is over
    theirs       the frontend's state
    spec         what the toolstack wants, None if its keys are not valid; `problem` says why
    has_looked   whether there was a look
    is_over      whether the node is gone, or is another vbd's
    is_called    whether the toolstack's hotplug script has come to this service
    has_moved    whether the last look found that a frontend offers other rings than those that are served
    must_compare   the next look has to find that out: nobody has seen what the frontend did while no service ran
    """

    def __init__(self, path: VbdPath, *, has_past: bool) -> None:
        """Begin with nothing seen; `has_past`: an earlier service had seen the node, and written its keys."""
        self.keys: dict[str, str] | None = None
        self.theirs = _S.UNKNOWN
        self.spec: Spec | None = None
        self.problem = ""
        self.has_looked = self.is_over = self.is_called = self.has_moved = self.must_compare = False
        self.had_state = self.had_keys = has_past  # the node was seen with a state, and with keys, that only we write
        self._path = path
        self._follows: tuple[frozenset[str], str] | None = None  # texts of `params`, and the chain that replaces them

    @property
    def ours(self) -> XenbusState:
        """Our own state as the store holds it."""
        return parse_state((self.keys or {}).get("state"))

    @property
    def is_online(self) -> bool:
        """False once the toolstack wants the vbd to go away."""
        return self.keys is not None and self.keys.get("online") != "0"

    @property
    def hotplug(self) -> str:
        """What the hotplug script is told: ``connected``, ``error``, or nothing yet."""
        return (self.keys or {}).get(STATUS, "")

    @property
    def is_answered(self) -> bool:
        """True once the toolstack's script has its answer, or if there is no script."""
        return bool(self.hotplug) or not (self.keys or {}).get("script")

    @property
    def has_come(self) -> bool:
        """True once the toolstack's script has come, to this service or an earlier one, or if there is none."""
        return self.is_called or self.is_answered

    @property
    def mark(self) -> str | None:
        """A key of ours that was seen in the node, which one made anew does not have; None if none was seen yet."""
        return min(_OURS & (self.keys or {}).keys(), default=None) if self.had_keys else None

    @property
    def params(self) -> str | None:
        """The chain that the key ``params`` is to name, None if it stays as the toolstack has written it."""
        if self._follows is None or self.keys is None or self.ours is _S.INITIALISING:
            return None
        formers, chain = self._follows
        return chain if self.keys.get("params") in formers else None

    def look(self, seen: Seen) -> set[Cause]:
        """Take in a look at both ends, and return the causes by which it clears reasons."""
        self.has_looked = True
        self.has_moved, self.must_compare = seen.has_moved and seen.theirs in _OFFERING, False
        if self.is_over or seen.keys is None or self._is_anothers(seen.keys):
            self.is_over, self.keys, self.spec, self.theirs, self._follows = True, None, None, _S.UNKNOWN, None
            return {Cause.LET_GO}
        causes = {Cause.LET_GO} if seen.theirs in (_S.UNKNOWN, _S.INITIALISING, _S.CLOSED) else set()
        begins_anew = self.theirs is not _S.INITIALISING and seen.theirs is _S.INITIALISING
        begins_anew |= self.theirs is _S.CLOSED and seen.theirs is _S.INITIALISED  # the states between were not seen
        causes |= {Cause.ANEW} if begins_anew else set()
        self.theirs = seen.theirs
        if seen.keys != self.keys:
            self.keys = dict(seen.keys)
            self._read()
            causes.add(Cause.KEYS)
        if self._follows is not None and seen.keys.get("params") not in self._follows[0] - {self._follows[1]}:
            self._follows = None
        return causes

    def take_as_written(self, keys: Mapping[str, str | None]) -> None:
        """Take keys that are being written as seen; None removes a key."""
        assert self.keys is not None  # noqa: S101 - nothing is written to a node that was not seen
        for key, value in keys.items():
            if value is None:
                self.keys.pop(key, None)
            else:
                self.keys[key] = value

    def was_written(self, keys: Mapping[str, str | None]) -> None:
        """Note that keys are in the node for sure: xenstore has accepted them."""
        self._knows({key: value for key, value in keys.items() if value is not None})

    def exchange(self, exchanged: Exchanged) -> None:
        """Have ``params`` name another chain."""
        if not self.is_over:
            self._follows = frozenset(exchanged.stale_params), exchanged.chain
            self._read()

    def _is_anothers(self, keys: Mapping[str, str]) -> bool:
        state = parse_state(keys.get("state"))
        is_anothers = (self.had_state and state is _S.INITIALISING) or (self.had_keys and not keys.keys() & _OURS)
        self._knows(keys)
        return is_anothers

    def _knows(self, keys: Mapping[str, str]) -> None:
        self.had_state |= parse_state(keys.get("state")) not in (_S.UNKNOWN, _S.INITIALISING)
        self.had_keys |= bool(keys.keys() & _OURS)

    def _read(self) -> None:
        self.spec, self.problem = None, ""
        if self.keys is not None:
            try:
                self.spec = parse_spec(self._path, {**self.keys, "params": self.params or self.keys.get("params", "")})
            except ConfigError as error:
                self.problem = in_one_line(error)
