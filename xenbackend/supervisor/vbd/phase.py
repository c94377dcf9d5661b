"""Tables: how far a worker is, how far it should be, and how it gets from the one to the other.

Must not hold behaviour.
"""

from __future__ import annotations

from enum import Enum

from xenbackend.protocol.messages import Stage


class Phase(Enum):
    """How far the worker is, by what it has been told and has answered."""

    NONE = "none"
    OPENING = "opening"
    OPEN = "open"
    CONNECTING = "connecting"
    SERVING = "serving"
    DISCONNECTING = "disconnecting"
    RETIRING = "retiring"  # it hands over to a successor
    CLOSING = "closing"
    RESTING = "resting"  # the last worker has ended, and the next one is started later
    ADOPTING = "adopting"  # an earlier service started it, and it was asked where it stands


class Goal(Enum):
    """How far the worker should be."""

    NONE = "none"
    OPEN = "open"
    SERVE = "serve"
    REPLACE = "replace"  # as far as now, but with another process


class Move(Enum):
    """What is done to bring the worker nearer to its goal."""

    START = "start"
    JOIN = "join"
    LEAVE = "leave"
    CLOSE = "close"
    HAND_OVER = "hand over"


_P = Phase
MOVES: dict[tuple[Phase, Goal], tuple[Move, Phase]] = {  # for other pairs nothing is done before the next event
    (_P.NONE, Goal.OPEN): (Move.START, _P.OPENING),
    (_P.NONE, Goal.SERVE): (Move.START, _P.OPENING),
    (_P.OPEN, Goal.SERVE): (Move.JOIN, _P.CONNECTING),
    (_P.SERVING, Goal.OPEN): (Move.LEAVE, _P.DISCONNECTING),
    (_P.OPEN, Goal.REPLACE): (Move.HAND_OVER, _P.RETIRING),
    (_P.SERVING, Goal.REPLACE): (Move.HAND_OVER, _P.RETIRING),
    (_P.OPENING, Goal.NONE): (Move.CLOSE, _P.CLOSING),
    (_P.OPEN, Goal.NONE): (Move.CLOSE, _P.CLOSING),
    (_P.CONNECTING, Goal.NONE): (Move.CLOSE, _P.CLOSING),
    (_P.SERVING, Goal.NONE): (Move.CLOSE, _P.CLOSING),
    (_P.DISCONNECTING, Goal.NONE): (Move.CLOSE, _P.CLOSING),
}
STANDINGS: dict[Phase, dict[Stage, Phase]] = {  # a stage that is not here is a breach
    _P.NONE: {},
    _P.OPENING: {Stage.IDLE: _P.OPENING, Stage.OPEN: _P.OPEN},
    _P.OPEN: {Stage.OPEN: _P.OPEN, Stage.IDLE: _P.CLOSING},  # an earlier service may have told it to close
    _P.CONNECTING: {Stage.OPEN: _P.CONNECTING, Stage.CONNECTING: _P.CONNECTING, Stage.SERVING: _P.SERVING},
    _P.SERVING: {Stage.SERVING: _P.SERVING},
    _P.DISCONNECTING: {
        Stage.SERVING: _P.DISCONNECTING, Stage.LEAVING: _P.DISCONNECTING, Stage.OPEN: _P.OPEN,
        Stage.IDLE: _P.CLOSING,  # as above
    },
    _P.RETIRING: dict.fromkeys(Stage, _P.RETIRING),
    _P.CLOSING: dict.fromkeys(Stage, _P.CLOSING),
    _P.RESTING: {},
    _P.ADOPTING: {
        Stage.IDLE: _P.OPEN,  # it has not opened what is wanted, and is closed
        Stage.OPEN: _P.OPEN, Stage.CONNECTING: _P.CONNECTING, Stage.SERVING: _P.SERVING,
        Stage.LEAVING: _P.DISCONNECTING,
    },
}  # fmt: skip
FAILURES = {  # phases and stages in which a worker may say that it could not do what it was told
    (_P.OPENING, Stage.IDLE), (_P.CONNECTING, Stage.IDLE), (_P.CONNECTING, Stage.OPEN)
}  # fmt: skip
LIMIT_S = {
    _P.OPENING: 60.0, _P.CONNECTING: 60.0, _P.DISCONNECTING: 30.0, _P.RETIRING: 30.0, _P.CLOSING: 30.0,
    _P.ADOPTING: 10.0,
}  # fmt: skip
# If a frontend's directory was removed, its driver may still be flushing. A toolstack waits for 10 s.
LINGER_S = 5.0  # at most
QUIET_S = 0.5  # without a request, and with none in flight: the driver has flushed, or does not run
FORCED_LIMIT_S = 5.0  # once our node is gone: nobody waits for what is in flight, and a domain must not become a zombie
ATTACHED = (  # phases in which rings may be mapped
    _P.CONNECTING, _P.SERVING, _P.DISCONNECTING, _P.RETIRING, _P.CLOSING, _P.ADOPTING
)  # fmt: skip
USABLE = (_P.OPEN, _P.CONNECTING, _P.SERVING, _P.DISCONNECTING)
