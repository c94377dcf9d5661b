"""How a request ended: codes for scripts, and the exit status for each of them.

Must not import anything of ours: a worker, the service and the command line all use it.

A worker's replies to its supervisor, the service's answers over its control socket, and the end of the command line use
the same codes. Each code but `OK` comes with a sentence for people.
"""

from __future__ import annotations

from enum import StrEnum


class Code(StrEnum):
    """How a request ended."""

    OK = "ok"  # it was done
    INVALID = "invalid"  # the caller's mistake; nothing was touched
    BUSY = "busy"  # another order, which excludes it, is under way; nothing was touched
    FAILED = "failed"  # it was tried and failed; the sentence says what holds now
    GONE = "gone"  # the disk, or the service that was asked, went away before it was done
    UNDER_WAY = "under-way"  # the wait for it is over, and it may still be done
    UNREACHABLE = "unreachable"  # no service answers
    BUG = "bug"  # the program's own fault; its log has more


def known(said: object) -> Code:
    """Return a service's code: FAILED for one that a newer release has added. Raises: ValueError, if it is no code."""
    if not isinstance(said, str) or not said:
        raise ValueError(f"not a code: {str(said)[:40]}")
    try:
        return Code(said)
    except ValueError:
        return Code.FAILED


EXIT_STATUS = {
    Code.OK: 0,
    Code.INVALID: 2,
    Code.BUSY: 1,
    Code.FAILED: 1,
    Code.GONE: 1,
    Code.UNDER_WAY: 75,  # EX_TEMPFAIL of sysexits.h
    Code.UNREACHABLE: 1,
    Code.BUG: 1,
}
