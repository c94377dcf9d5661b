"""Processes that take turns by a lock file."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.descriptors import open_descriptors
from xenbackend.kernel.in_turn import in_turn

PROGRAM = """
import sys
from xenbackend.kernel.in_turn import in_turn
with in_turn(sys.argv[1]):
    print("mine", flush=True)
    sys.stdin.read(1)
"""


def start(path: Path) -> subprocess.Popen[bytes]:
    """Start a process that takes a turn."""
    return subprocess.Popen([sys.executable, "-c", PROGRAM, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_one_after_the_other(tmp_path: Path) -> None:
    """A process waits until the one with the turn ends, even if that is killed; only its owner may access the file."""
    path = tmp_path / "turns"
    first, others = start(path), []
    assert first.stdout is not None
    assert b"mine\n" == first.stdout.readline()
    others = [start(path) for _ in range(2)]
    outputs = [each.stdout for each in others if each.stdout is not None]
    for each in outputs:
        os.set_blocking(each.fileno(), False)
    with pytest.raises(subprocess.TimeoutExpired):
        others[0].wait(0.5)
    assert [None, None] == [each.read() for each in outputs]
    assert 0o600 == stat.S_IMODE(path.stat().st_mode)
    first.kill()
    first.communicate()
    for each in others:
        os.set_blocking(each.stdout.fileno(), True)
        assert each.stdin is not None
        each.stdin.write(b"x")
        each.stdin.flush()
    assert [b"mine\n"] * 2 == [each.stdout.read() for each in others]
    for each in others:
        each.communicate()

    assert [0, 0] == [each.returncode for each in others]


def test_alone_and_by_no_link(tmp_path: Path) -> None:
    """Without a file there is no lock; a symbolic link is not followed; no descriptor is left open."""
    before = open_descriptors()
    with in_turn(""):
        assert before == open_descriptors()
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"), in_turn(str(tmp_path / "link")):
        pass
    with in_turn(str(tmp_path / "turns")):
        pass

    assert before == open_descriptors()
    assert not (tmp_path / "victim").exists()


AGAIN = """
import os, sys
from xenbackend.kernel.in_turn import in_turn
log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
for _ in range(int(sys.argv[3])):
    with in_turn(sys.argv[1]):
        os.write(log, sys.argv[4].encode())
        sys.stdin.read(1)
"""


def again(path: Path, log: Path, times: int, letter: str) -> subprocess.Popen[bytes]:
    """Start a process that takes `times` turns and writes a letter in each; a turn lasts until it reads a byte."""
    command = [sys.executable, "-c", AGAIN, str(path), str(log), str(times), letter]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def test_who_comes_again_and_again_keeps_nobody_waiting(tmp_path: Path) -> None:
    """A waiting process gets the next turn, however soon the one before asks for another."""
    path, log = tmp_path / "turns", tmp_path / "log"
    for _ in range(3):
        log.write_bytes(b"")
        greedy = again(path, log, 200, "g")
        while not log.read_bytes():
            assert greedy.poll() is None
        waiting = again(path, log, 1, "w")
        while not _waits_for(waiting.pid, path):
            assert waiting.poll() is None
        assert waiting.stdin is not None
        waiting.stdin.write(b"x")  # ends its turn at once
        waiting.stdin.flush()
        greedy.communicate(b"x" * 200)
        waiting.communicate()

        assert log.read_bytes().index(b"w") <= 2
        assert 201 == len(log.read_bytes())


def test_one_waits_for_the_turn_and_the_others_at_the_door(tmp_path: Path) -> None:
    """One process waits for the turn and the others for its place, so that the longest waiting one is next."""
    path, log = tmp_path / "turns", tmp_path / "log"
    log.write_bytes(b"")
    holder = again(path, log, 1, "h")
    while not log.read_bytes():
        assert holder.poll() is None
    first = again(path, log, 1, "f")
    while not _waits_for(first.pid, path):
        assert first.poll() is None
    others = [again(path, log, 1, "o") for _ in range(2)]
    while not all(_waits_for(each.pid, tmp_path / "turns.door") for each in others):
        assert [None, None] == [each.poll() for each in others]
    for each in (holder, first, *others):
        assert each.stdin is not None
        each.stdin.write(b"x")
        each.stdin.flush()
    for each in (holder, first, *others):
        each.communicate()

    assert b"hfoo" == log.read_bytes()


def _waits_for(pid: int, path: Path) -> bool:
    """Return whether a process waits for the lock of a file, as proc_locks(5) has it."""
    inode = path.stat().st_ino
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f" {pid} " in line and f":{inode} " in line for line in lines)
