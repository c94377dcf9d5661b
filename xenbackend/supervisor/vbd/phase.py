"""How far a worker is, how far it should be, how long it may take, and what its answers lead to: tables.

Must not hold behaviour.
"""

from __future__ import annotations

from enum import Enum

from xenbackend.protocol import messages
from xenbackend.supervisor.vbd.events import Postponed


class Phase(Enum):
    """How far the worker is."""

    NONE = "none"
    OPENING = "opening"
    OPEN = "open"
    CONNECTING = "connecting"
    SERVING = "serving"
    DISCONNECTING = "disconnecting"
    RETIRING = "retiring"  # it hands over to another process
    CLOSING = "closing"
    RESTING = "resting"  # one has died, the next one comes later
    ADOPTING = "adopting"  # an earlier service started it, and it has been asked where it stands


class Goal(Enum):
    """How far the worker should be."""

    NONE = "none"
    OPEN = "open"
    SERVE = "serve"


LIMIT_S = {
    Phase.OPENING: 60.0, Phase.CONNECTING: 60.0, Phase.DISCONNECTING: 30.0, Phase.RETIRING: 30.0, Phase.CLOSING: 30.0,
    Phase.ADOPTING: 10.0,
}  # fmt: skip
FORCED_LIMIT_S = 5.0  # once our node is gone: nobody waits for the drain, and a domain must not become a zombie
ATTACHED = (  # rings may be mapped
    Phase.CONNECTING, Phase.SERVING, Phase.DISCONNECTING, Phase.RETIRING, Phase.CLOSING, Phase.ADOPTING
)  # fmt: skip
USABLE = (Phase.OPEN, Phase.CONNECTING, Phase.SERVING, Phase.DISCONNECTING)
ANSWERS: dict[tuple[type, Phase], Phase] = {
    (messages.Opened, Phase.OPENING): Phase.OPEN,
    (messages.Failed, Phase.OPENING): Phase.OPEN,  # the process is still there, and is told to close next
    (messages.Opened, Phase.CONNECTING): Phase.CONNECTING,  # what was only looked at until now
    (messages.Connected, Phase.CONNECTING): Phase.SERVING,
    (messages.Failed, Phase.CONNECTING): Phase.OPEN,
    (Postponed, Phase.CONNECTING): Phase.OPEN,
    (messages.Disconnected, Phase.DISCONNECTING): Phase.OPEN,
}
STANDINGS = {
    "open": Phase.OPEN, "connecting": Phase.CONNECTING, "serving": Phase.SERVING, "disconnecting": Phase.DISCONNECTING
}  # fmt: skip
