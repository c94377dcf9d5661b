"""How a question ended: a code that scripts go by, and the exit status that each leads to. One table for both wires.

Must not import anything of ours: a worker, the service and the command line all go by it.

What a worker replies to its supervisor, what the service answers over its control socket, and how the command line ends
are the same codes. A sentence for people stands beside each that is not `OK`.
"""

from __future__ import annotations

from enum import StrEnum


class Code(StrEnum):
    """How a question ended."""

    OK = "ok"  # it was done
    INVALID = "invalid"  # it cannot be asked: a mistake of whoever asks; nothing was touched
    BUSY = "busy"  # another order that excludes it is under way; nothing was touched
    FAILED = "failed"  # it was tried and could not be done; the sentence says what holds now
    GONE = "gone"  # the disk, or the service that was asked, went away before it was done
    UNDER_WAY = "under-way"  # nobody waits for it any more, and it may still be done
    UNREACHABLE = "unreachable"  # no service answers
    BUG = "bug"  # the program's own fault; its log has more


def known(said: object) -> Code:
    """Return a service's code: FAILED for one that a newer release has added. Raises: ValueError for what is none."""
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
