"""Whose move it is while a disk is not connected, and what the move is.

Must not look at anything: it is given the states of both ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from xenbackend.blkif.handshake import STEPS, Step, XenbusState, name

_S = XenbusState


class Who(StrEnum):
    """Who has to move next."""

    NOBODY = "nobody"
    GUEST = "the guest"
    SERVICE = "the service"
    TOOLSTACK = "the toolstack"


@dataclass(frozen=True, slots=True)
class Move:
    """The next move; `what` is the rest of a sentence that begins with `who`."""

    who: Who
    what: str


_MOVES = {  # more specific than STEPS; in the first two pairs of states, the service's step is done
    (_S.CONNECTED, _S.CONNECTED): Move(Who.NOBODY, "has to move: the disk is connected"),
    (_S.CONNECTED, _S.INITIALISED): Move(Who.GUEST, "has to notice the disk, and to use it"),
    (_S.CLOSED, _S.CLOSED): Move(Who.NOBODY, "has to move: the guest has given the disk back"),
    (_S.INIT_WAIT, _S.UNKNOWN): Move(
        Who.TOOLSTACK, "has to make the frontend's directory, which is not there: the guest does not know of the disk"
    ),
    (_S.INIT_WAIT, _S.INITIALISING): Move(
        Who.GUEST, "has to offer its rings: its block driver (in Linux xen-blkfront) has not started"
    ),
    (_S.CLOSING, _S.CLOSING): Move(Who.GUEST, "has to finish what it is doing with the disk, and to close it"),
    (_S.CONNECTED, _S.INIT_WAIT): Move(Who.GUEST, "has to continue connecting: it has started over"),
    (_S.CLOSED, _S.CLOSING): Move(Who.GUEST, "has to close its end; ours is closed"),
}
_STEPS = {
    Step.OFFER: "has to open the chain, and to offer the disk",
    Step.SERVE: "has to take the rings that the guest offers",
    Step.FOLLOW: "has to answer the guest, which closes the disk",
    Step.CLOSE: "has to close its end, as the guest has closed its own",
    Step.RESTART: "has to unmap the rings and offer the disk again: the guest has started over",
}


def next_move(ours: XenbusState, theirs: XenbusState, *, script_has_come: bool = True) -> Move:
    """Return the next move, by the table that the service uses (`blkif.handshake.STEPS`).

    `script_has_come`: whether the toolstack's hotplug script has asked for the disk; before that, no rings are mapped.
    """
    if ours is _S.UNKNOWN:
        return Move(Who.TOOLSTACK, "has to make the backend's directory, or has removed it")
    if not script_has_come and ours in (_S.INITIALISING, _S.INIT_WAIT):
        if ours is _S.INITIALISING:
            return Move(Who.SERVICE, "has to notice the disk, and to go to InitWait")
        return Move(Who.TOOLSTACK, "has to run its hotplug script, which has not reported yet")
    if (ours, theirs) in _MOVES:
        return _MOVES[ours, theirs]
    step = STEPS[ours, theirs]
    if step is Step.WAIT:
        return Move(Who.GUEST, f"has to move on from {name(theirs)}")
    return Move(Who.SERVICE, _STEPS[step])
