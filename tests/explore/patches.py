"""The seams by which real code runs on explored memory, and changes that are known to make that code wrong.

Must not be used except during a test.

A change replaces a piece of the code's text, so that a reader sees what becomes wrong.
"""

from __future__ import annotations

import inspect
import textwrap
from typing import Any, NamedTuple

import pytest

from tests.explore.memory import WordStruct
from xenbackend import journal
from xenbackend.blkif.ring import BackRing
from xenbackend.journal import RingJournal
from xenbackend.worker import queue, recovery
from xenbackend.worker.queue import Queue


class Change(NamedTuple):
    """A change: a function of a class or module, a piece of its text, and what replaces that."""

    owner: Any
    name: str
    former: str
    other: str


_LATER = """for entry, word in self._late:
        self._answers[entry] = word
    self._late = []
    self._release(batch)"""
_EARLIER = """journal.words[REQ_CONS] = first + count
    journal.blocks[block.index] = first << 8"""
_NO_JOURNAL = """journal.begin(ring.size, ring.consumed)
    taken = journal.taken()"""
_NO_JOURNAL_AND_SKIP = """journal.begin(ring.size, ring.consumed)
    journal.words[REQ_CONS] += ring.available()
    taken = journal.taken()"""

WRONG: dict[str, list[Change]] = {
    "no mark that a request is being answered": [
        Change(Queue, "answer_whole", "if batch != block.lent", "if True or batch != block.lent"),
        Change(
            Queue,
            "_answer_each",
            "self._answers[record.entry] = place << 2 | word",
            "self._late = [*getattr(self, '_late', []), (record.entry, place << 2 | word)]",
        ),
        Change(Queue, "answer", "self._release(batch)", _LATER),
    ],
    "each response written again": [
        Change(BackRing, "published", "return (self._index[RSP_PROD] - self.answered) & _MASK", "return 0"),
    ],
    "counted as taken before it is noted": [
        Change(Queue, "take", "journal.words[REQ_CONS] = first + count", "pass"),
        Change(Queue, "take", "journal.blocks[block.index] = first << 8", _EARLIER),
    ],
    "noted and not counted is taken again": [
        Change(
            RingJournal,
            "taken",
            "max([self.words[REQ_CONS], *(first + place + 1 for first, place, _, _ in self._entries())])",
            "self.words[REQ_CONS]",
        ),
    ],
    "no journal, from the response index": [
        Change(recovery, "recover", "taken = journal.taken()", _NO_JOURNAL),
    ],
    "no journal, from the request index": [
        Change(recovery, "recover", "taken = journal.taken()", _NO_JOURNAL_AND_SKIP),
    ],
}


def use_words(patch: pytest.MonkeyPatch, batch: int) -> None:
    """Limit batches to `batch` requests, and store words one by one."""
    for module in (journal, queue, recovery):
        patch.setattr(module, "BATCH", batch)
    patch.setattr(queue, "_WORDS", [WordStruct()] * (batch + 1))


def make_wrong(patch: pytest.MonkeyPatch, changes: list[Change]) -> None:
    """Change the code, under every name that the worker has for it."""
    texts: dict[tuple[Any, str], str] = {}
    for owner, name, former, other in changes:
        text = texts.get((owner, name)) or textwrap.dedent(inspect.getsource(getattr(owner, name)))
        assert text.count(former) == 1, f"{name} is not as it was when this was written: {former}"
        texts[owner, name] = text.replace(former, other)
    for (owner, name), text in texts.items():
        original = getattr(owner, name)
        made: dict[str, Any] = {}
        exec(compile(text, f"<wrong {name}>", "exec"), original.__globals__, made)  # noqa: S102 - our own code
        for holder in (owner, queue):
            if getattr(holder, name, None) is original:
                patch.setattr(holder, name, made[name])
