"""Processes that take turns."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.descriptors import open_descriptors
from xenbackend.kernel.turns import turn

PROGRAM = """
import sys
from xenbackend.kernel.turns import turn
with turn(sys.argv[1]):
    print("mine", flush=True)
    sys.stdin.read(1)
"""


def start(path: Path) -> subprocess.Popen[bytes]:
    """Start a process that wants its turn."""
    return subprocess.Popen([sys.executable, "-c", PROGRAM, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_one_after_the_other(tmp_path: Path) -> None:
    """Who has the turn keeps the next one waiting until it ends, killed or not; the file is its owner's alone."""
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
        os.set_blocking(each.stdout.fileno(), True)  # type: ignore[union-attr]
        assert each.stdin is not None
        each.stdin.write(b"x")
        each.stdin.flush()
    assert [b"mine\n"] * 2 == [each.stdout.read() for each in others]  # type: ignore[union-attr]
    for each in others:
        each.communicate()

    assert [0, 0] == [each.returncode for each in others]


def test_alone_and_by_no_link(tmp_path: Path) -> None:
    """Without a file there is nobody else; a link in its place is not followed; nothing is left open."""
    before = open_descriptors()
    with turn(""):
        assert before == open_descriptors()
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"), turn(str(tmp_path / "link")):
        pass
    with turn(str(tmp_path / "turns")):
        pass

    assert before == open_descriptors()
    assert not (tmp_path / "victim").exists()
