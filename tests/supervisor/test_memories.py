"""What workers had kept goes to the next worker of the same chain, and to nobody else."""

from __future__ import annotations

import os

from descriptors import open_descriptors

from xenbackend.control import MAX_MEMORIES
from xenbackend.supervisor.memories import Memories


def made(content: bytes) -> int:
    """Return a memory's descriptor."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def test_the_next_worker_of_the_chain_gets_them() -> None:
    """What was kept under a name is handed on under that name; a later one of that name takes its place."""
    memories = Memories()
    memories.open_for("log:|ram:1M")
    memories.keep("map", made(b"old"))
    memories.keep("map", made(b"new"))
    kept = memories.open_for("log:|ram:1M")

    assert ["map"] == list(kept)
    assert b"new" == os.pread(kept["map"], 8, 0)
    memories.close()


def test_another_chain_gets_none() -> None:
    """A memory says something about one disk: with another chain it is gone for good."""
    before = len(open_descriptors())
    memories = Memories()
    memories.open_for("log:|aio:/one")
    memories.keep("map", made(b"one"))

    assert {} == memories.open_for("log:|aio:/two")
    assert {} == memories.open_for("log:|aio:/one")
    assert before == len(open_descriptors())


def test_there_is_a_bound() -> None:
    """A worker that goes mad fills no table: one too many is closed."""
    before = len(open_descriptors())
    memories = Memories()
    for number in range(MAX_MEMORIES + 5):
        memories.keep(str(number), made(b""))
    held = len(open_descriptors()) - before
    memories.close()

    assert MAX_MEMORIES == held
    assert before == len(open_descriptors())
