"""Converts what the previous release left of a disk to ours: its journal, and the notes in it.

Must not map anything: those memories are not sealed, so a worker of that release may cut them short, and may have
written anything into them.

A journal of VERSION 2 had the notes in pages 18-49, and the rings after them; the errno of a failed flush was word 4.
AGREED and the rings themselves had the layout that they have now.

The worker could write to the notes. So they deserve only as much trust as that worker, for us as for its own service.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from xenbackend import journal
from xenbackend.block.policy import Policy
from xenbackend.errors import ConfigError
from xenbackend.kernel import memfd, process
from xenbackend.note import MAGIC, Note
from xenbackend.protocol import codec
from xenbackend.protocol.jobs import HeldFile
from xenbackend.supervisor.vbd.notes import Notes
from xenbackend.units import PAGE

VERSION = 2
_HEAD = 50 * PAGE  # bytes before the rings
_AGREED = Note(PAGE, 2, (2 * PAGE, 10 * PAGE), 8 * PAGE, VERSION)
_NOTES = Note(PAGE, 3, (18 * PAGE, 34 * PAGE), 16 * PAGE, VERSION)
_POISON = 4
_FILES = 4 * PAGE  # bytes for what a worker has open: some 150 files
_SOMEBODY = "an administrator"  # who paused a disk was not noted


def remember_files(pidfd: int) -> int:
    """Return a memory that lists the files a worker has open, for `recall_files` when it has ended.

    Its release followed images to their parents by another rule, and files in use stay allowed. Raises: KernelError.
    """
    files = [asdict(each) for each in process.files_of(pidfd)]
    while len(data := json.dumps(files).encode()) > _FILES:
        files.pop()
    fd = memfd.make("xenbackend-open", _FILES)
    os.pwrite(fd, data, 0)
    return fd


def recall_files(fd: int) -> list[HeldFile]:
    """Return the files that `remember_files` listed; none if the list is not valid. Raises: KernelError."""
    data = memoryview(bytearray(_FILES))
    memfd.read_into(fd, 0, data)
    try:
        files: list[HeldFile] = [codec.restore(HeldFile, each) for each in json.loads(bytes(data).rstrip(b"\0"))]
    except (codec.NotAMessage, ValueError, TypeError):
        return []
    return files


def copy_journal(fd: int, page: memoryview) -> None:
    """Copy what a journal of VERSION holds into a new one of ours. Nobody may write to the former one any more.

    Raises: KernelError.
    """
    head = _head(fd)
    if head is None:
        return
    page[:PAGE] = head[:PAGE]  # the counters
    journal.poison(page, head[PAGE : 2 * PAGE].cast("Q")[_POISON])
    with suppress(ValueError):  # what a real worker wrote takes no more room after it was read
        journal.AGREED.write(page, _AGREED.read(head))
    for ring in range(journal.MAX_RINGS):
        start = ring * journal.RING_SIZE
        target = page[journal.RINGS_AT + start : journal.RINGS_AT + start + journal.SCRATCH_AT]
        memfd.read_into(fd, _HEAD + start, target)


def read_notes(fd: int) -> Notes:
    """Return the notes in a journal of VERSION; a new disk's if there are none. Raises: KernelError."""
    head = _head(fd)
    try:
        return _notes_of((head and _NOTES.read(head)) or {})
    except (codec.NotAMessage, LookupError, TypeError):
        return Notes()


def _head(fd: int) -> memoryview | None:
    """Return the bytes before the rings, padded with zeros; None if this is not a journal of VERSION."""
    head = memoryview(bytearray(_HEAD))
    memfd.read_into(fd, 0, head)
    is_ours = tuple(head[PAGE : PAGE + 16].cast("Q")) in ((0, 0), (MAGIC, VERSION))
    return head if is_ours else None


def _notes_of(found: dict[str, Any]) -> Notes:
    chain, swap, exchange, stale_params = found.get("chain", ""), found.get("swap"), None, []
    if swap is not None and swap["to"] == chain:
        stale_params = [swap["from"]]
    elif swap is not None:
        exchange = {"order": 0, "former_params": swap["from"], "chain": swap["to"]}
    values = {
        "chain": chain,
        "exchange": exchange,
        "stale_params": stale_params,
        "paused": _SOMEBODY if found.get("paused") else None,
        "policy": _policy_of(str(found.get("policy", ""))),
        "claim": found.get("claim"),
        "memories": found.get("memories", {}),
    }
    notes: Notes = codec.restore(Notes, values)
    return notes


def _policy_of(text: str) -> str | None:
    """Return the parts of a policy that are still valid; None if there are none."""
    parts = []
    for part in text.split(","):
        with suppress(ConfigError):
            Policy(part)
            parts.append(part)
    return ",".join(parts) or None
