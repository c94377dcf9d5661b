"""The policy for requests that fail: an action for each kind of error, from a text that people write.

Must not hold a request, nor know a guest.

    enospc=pause,read=retry 3 every 1s,write=report,flush=pause,away=pause         the default

Kinds:
    enospc   no space left for a write (ENOSPC, EDQUOT)
    read     any other error of a read
    write    any other error of a write or discard
    flush    any error of a flush
    away     the disk's server cannot be reached (AWAY), for any operation

Actions:
    pause             keep the request, report the pause, and try again every second until it works: to the guest it
                      only takes long
    retry N every T   keep the request, and try again up to N times, T seconds apart; then report the error
    report            the guest gets the error

If an image turns out to be damaged (IMAGE_DAMAGED), the disk pauses whatever the policy says: the next write could
destroy what is still intact, and only an administrator can repair the image. It also pauses if a cache's file cannot be
used while only that file has data that were answered (CACHE_LOST).

The only action for a flush is `pause`, and a flush is not tried again automatically unless the disk's server was away.
A frontend takes a failed flush for a success, and never flushes again; and another try would prove nothing, since the
kernel reports lost data only once.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from xenbackend.block.request import AWAY, CACHE_LOST, IMAGE_DAMAGED, Op
from xenbackend.errors import ConfigError

DEFAULT = "enospc=pause,read=retry 3 every 1s,write=report,flush=pause,away=pause"
PAUSE_S = 1.0  # between two tries during a pause
MAX_TRIES, MAX_EVERY_S = 1000, 60.0
_KINDS = ("enospc", "read", "write", "flush", "away")
_RETRY = re.compile(r"retry (\d{1,4}) every (\d{1,3}(?:\.\d{1,3})?)s")


@dataclass(frozen=True, slots=True)
class Action:
    """Try again up to `tries` times, `every_s` seconds apart; None: for ever, and report that the disk is paused."""

    tries: int | None
    every_s: float = PAUSE_S

    @property
    def pauses(self) -> bool:
        """Whether the disk is paused, which an administrator has to know."""
        return self.tries is None


_REPORT, _PAUSE = Action(0), Action(None)


class Policy:
    """An action for each kind of error."""

    def __init__(self, text: str = "") -> None:
        """Parse a text; kinds that it leaves out are as in `DEFAULT`. Raises: ConfigError."""
        self._actions: dict[str, Action] = {}
        for part in f"{DEFAULT},{text}".split(","):
            if part.strip():
                kind, _, action = (each.strip() for each in part.partition("="))
                self._actions[kind] = _parse(text, kind, action)

    def action(self, op: int, code: int) -> Action:
        """Return the action for a request of operation `op` that ended with errno `code`."""
        if code == CACHE_LOST:
            return _PAUSE
        if code == AWAY:
            return _PAUSE if op == Op.FLUSH else self._actions["away"]
        if op == Op.FLUSH:
            return self._actions["flush"]
        if op == Op.READ:
            return self._actions["read"]
        if code == IMAGE_DAMAGED:
            return _PAUSE
        return self._actions["enospc" if code in (errno.ENOSPC, errno.EDQUOT) else "write"]

    def __str__(self) -> str:
        """Return the complete text, with all kinds."""
        return ",".join(f"{kind}={_text(self._actions[kind])}" for kind in _KINDS)


def _parse(text: str, kind: str, action: str) -> Action:
    if kind not in _KINDS:
        kinds = ", ".join(_KINDS)
        raise ConfigError(f"the policy {text!r} names {kind!r}; write KIND=ACTION, where KIND is one of {kinds}")
    if kind == "flush" and action != "pause":
        raise ConfigError(
            f"the policy {text!r} lets a flush {action or 'nothing'}; a flush can only pause: a guest takes an error "
            "for success, and never flushes again"
        )
    if action in ("pause", "report"):
        return _PAUSE if action == "pause" else _REPORT
    found = _RETRY.fullmatch(action)
    if not found:
        raise ConfigError(
            f"the policy {text!r} says {action!r} for {kind}; it can be pause, report, or retry 3 every 1s"
        )
    tries, every_s = int(found[1]), float(found[2])
    if not (1 <= tries <= MAX_TRIES and 0 < every_s <= MAX_EVERY_S):
        limits = f"1 to {MAX_TRIES} times, up to {MAX_EVERY_S:g}s apart"
        raise ConfigError(f"the policy {text!r} retries too often: {limits}")
    return Action(tries, every_s)


def _text(action: Action) -> str:
    if action.pauses:
        return "pause"
    return f"retry {action.tries} every {action.every_s:g}s" if action.tries else "report"
