"""The states of a vbd's two ends, and the table that says what a backend does in each pair of them.

Must not keep the state of a device or talk to xenstore.

Sources: io/xenbus.h for the numbers; Linux xen-blkback `frontend_changed` for the moves. This table differs from it in
two points: it waits for a frontend directory that does not exist yet (a toolstack may write it last), and it offers the
vbd again to a frontend that starts anew while we are connected (kexec after a crash). As in Linux, a frontend that is
back in Initialised is served although we are Closed: its Initialising may have come and gone between two looks.
"""

from __future__ import annotations

from enum import Enum, IntEnum


class XenbusState(IntEnum):
    """One end's state, as the node ``state`` holds its decimal number; UNKNOWN also means that the node is missing."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8


class Step(Enum):
    """What the backend should do. Each is a goal, not an event: doing it twice has the effect of doing it once."""

    WAIT = "wait"  # the next move is the frontend's
    OFFER = "offer"  # publish what we can do, then InitWait
    SERVE = "serve"  # serve the frontend's rings, then Connected
    FOLLOW = "follow"  # answer with Closing; the frontend may still finish its requests
    CLOSE = "close"  # finish what is in flight, let go of the rings, then Closed
    RESTART = "restart"  # let go of the rings of the frontend's former life, then offer anew


_STATES = {str(state.value): state for state in XenbusState}


def parse_state(text: str | None) -> XenbusState:
    """Return the state that a node's text names; UNKNOWN for a missing node and for any other text."""
    return _STATES.get(text or "", XenbusState.UNKNOWN)


_LETTERS = {"-": Step.WAIT, "O": Step.OFFER, "S": Step.SERVE, "F": Step.FOLLOW, "C": Step.CLOSE, "R": Step.RESTART}
_TABLE = {
    # ours                          theirs: 0 1 2 3 4 5 6 7 8
    XenbusState.UNKNOWN:                   "- - - - - - - - -",
    XenbusState.INITIALISING:              "O O O O O O O O O",
    XenbusState.INIT_WAIT:                 "- - - S S F C - -",
    XenbusState.INITIALISED:               "- - - S S F C - -",
    XenbusState.CONNECTED:                 "C R - S S F C - -",
    XenbusState.CLOSING:                   "C R - - - - C - -",
    XenbusState.CLOSED:                    "- O - S - - - - -",
    XenbusState.RECONFIGURING:             "C R - - - F C - -",
    XenbusState.RECONFIGURED:              "C R - - - F C - -",
}  # fmt: skip
STEPS = {
    (ours, theirs): _LETTERS[letter]
    for ours, row in _TABLE.items()
    for theirs, letter in zip(XenbusState, row.split(), strict=True)
}


def name(state: XenbusState) -> str:
    """Return a state's name as xenbus.h spells it: ``InitWait``."""
    return state.name.title().replace("_", "")
