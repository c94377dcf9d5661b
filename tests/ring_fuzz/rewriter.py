"""A second process that rewrites fields of the guest's memory while they are read.

Must not choose a field: whoever runs it says which. Each has two contents, and a reader sees one of the two.
A field is a word of 1, 2 or 4 bytes at a multiple of its size: no reader sees half of each.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple, Self

MOST = 64  # fields at a time
_WANTED, _SEEN, _COUNT, _FIRST = 0, 1, 2, 4  # words of the control page; four words per field follow
_KINDS = {1: "B", 2: "H", 4: "I"}
_LOOKS = 100  # whether it has seen what is wanted, before it may have ended
_ROUNDS = 32  # over all fields before the control page is looked at


class Field(NamedTuple):
    """A word of the guest's memory, and what is written there in turn."""

    address: int  # bytes into the memory
    width: int
    one: int
    other: int


class Rewriter:
    """The process, as whoever runs it has it."""

    def __init__(self, memory_fd: int) -> None:
        """Start it on the guest's memory, which it may write anywhere in."""
        self._control_fd = os.memfd_create("rewriter", os.MFD_CLOEXEC)
        os.ftruncate(self._control_fd, mmap.PAGESIZE)
        self._words = memoryview(mmap.mmap(self._control_fd, mmap.PAGESIZE)).cast("Q")
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        fds = (memory_fd, self._control_fd, self._wake)
        command = [sys.executable, "-m", "tests.ring_fuzz.rewriter", str(os.getpid()), *map(str, fds)]
        self._process = subprocess.Popen(command, pass_fds=fds, stdout=subprocess.DEVNULL)
        self.rounds = 0  # times that fields were being rewritten

    def begin(self, fields: list[Field]) -> None:
        """Rewrite these fields from now on, until `end`."""
        for place, field in enumerate(fields[:MOST]):
            start = _FIRST + 4 * place
            self._words[start : start + 4] = memoryview(_pack(field)).cast("B").cast("Q")
        self._words[_COUNT] = len(fields[:MOST])
        self._tell()
        self._await()
        self.rounds += 1

    def end(self) -> None:
        """Rewrite nothing any more; when this returns, nothing is written."""
        self._words[_COUNT] = 0
        self._tell()
        self._await()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._words.release()
        os.close(self._control_fd)
        os.close(self._wake)

    def _tell(self) -> None:
        self._words[_WANTED] += 1
        os.eventfd_write(self._wake, 1)

    def _await(self) -> None:
        give_up = time.monotonic() + 60
        while True:
            for _ in range(_LOOKS):
                if self._words[_SEEN] == self._words[_WANTED]:
                    return
                os.sched_yield()
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError("the process that rewrites fields has ended, or does not run")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pack(field: Field) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in field)


def _rewrite(memory_fd: int, control_fd: int, wake: int) -> None:
    memory = memoryview(mmap.mmap(memory_fd, 0))
    views = {width: memory.cast(kind) for width, kind in _KINDS.items()}
    words = memoryview(mmap.mmap(control_fd, mmap.PAGESIZE)).cast("Q")
    while True:
        wanted = words[_WANTED]
        fields = []
        for place in range(words[_COUNT]):
            address, width, one, other = words[_FIRST + 4 * place : _FIRST + 4 * place + 4]
            fields.append((views[width], address // width, one, other))
        words[_SEEN] = wanted
        if not fields:
            os.eventfd_read(wake)
            continue
        while words[_WANTED] == wanted:
            for _ in range(_ROUNDS):
                for view, place, one, other in fields:
                    view[place] = one
                    view[place] = other


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() == int(sys.argv[1]):  # else it has ended already
        _rewrite(*map(int, sys.argv[2:]))
