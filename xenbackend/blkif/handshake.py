"""The states of both ends of a vbd, and the table that says what a backend does for each pair of states.

Must not keep the state of a vbd or talk to xenstore.

Sources: io/xenbus.h for the numbers; Linux xen-blkback `frontend_changed` for the moves. This table differs from it in
two points: it waits for a frontend directory that does not exist yet (a toolstack may write it last), and it offers the
vbd again to a frontend that starts again while we are connected (kexec after a crash). As in Linux, a frontend that is
back in Initialised is served although we are Closed: it may have been in Initialising between two looks.
"""

from __future__ import annotations

from enum import Enum, IntEnum


class XenbusState(IntEnum):
    """The state of one end; the node ``state`` holds it as a decimal number. UNKNOWN also means a missing node."""

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
    """What the backend should do. Steps are idempotent: taking one twice has the effect of taking it once."""

    WAIT = "wait"  # the next move is the frontend's
    OFFER = "offer"  # publish our features, then switch to InitWait
    SERVE = "serve"  # serve the frontend's rings, then switch to Connected
    FOLLOW = "follow"  # switch to Closing; the frontend may still finish its requests
    CLOSE = "close"  # finish the requests in flight, unmap the rings, then switch to Closed
    RESTART = "restart"  # unmap the rings from before the frontend's restart, then as OFFER


_STATES = {str(state.value): state for state in XenbusState}


def parse_state(text: str | None) -> XenbusState:
    """Return the state that a node's text stands for; UNKNOWN for a missing node and for any other text."""
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
