"""Landlock: nothing can be opened by its name any more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xenbackend.kernel import landlock

pytestmark = pytest.mark.skipif(landlock.version() == 0, reason="this kernel has no Landlock")

_RESTRICTED = """
import os, sys
from xenbackend.kernel import landlock, privileges
def opens(path, flags):
    try:
        os.close(os.open(path, flags))
    except OSError as error:
        return error.strerror
    return "opened"
place = sys.argv[1]
kept = os.open(f"{place}/kept", os.O_RDWR)
privileges.refuse_new_privileges()
landlock.restrict(reading=sys.argv[2] == "reading")
os.pwrite(kept, b"new", 0)
os.ftruncate(kept, 2)
print([opens(f"{place}/kept", os.O_RDONLY), opens(place, os.O_RDONLY), opens(f"{place}/kept", os.O_RDWR),
       opens(f"{place}/made", os.O_RDWR | os.O_CREAT)])
"""


@pytest.mark.parametrize(("kept", "first"), [("nothing", ["Permission denied"] * 2), ("reading", ["opened"] * 2)])
def test_names_lead_nowhere(tmp_path: Path, kept: str, first: list[str]) -> None:
    """No file or directory can be opened, except for reading if that is kept; open descriptors keep their rights."""
    (tmp_path / "kept").write_bytes(b"old")
    command = [sys.executable, "-c", _RESTRICTED, str(tmp_path), kept]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)

    assert f"{[*first, 'Permission denied', 'Permission denied']}\n" == done.stdout
    assert b"ne" == (tmp_path / "kept").read_bytes()


@pytest.mark.parametrize(("version", "words"), [(1, 1), (3, 1), (4, 2), (5, 2), (6, 3), (9, 3)])
def test_an_older_kernel_is_asked_for_what_it_knows(version: int, words: int) -> None:
    """The structure has only the rights of the kernel's version, as the kernel would refuse unknown ones."""
    attributes = landlock._attributes(version, network=False, reading=False)

    assert 8 * words == len(attributes)
    rights = int.from_bytes(attributes[:8], "little")
    assert {1: 13, 3: 15, 4: 15}.get(version, 16) == rights.bit_length()
