"""Files that tell the next service which chain was in service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.supervisor.helpers import PATH
from xenbackend.errors import KernelError
from xenbackend.supervisor.vbd import notes
from xenbackend.supervisor.vbd.last_chains import DIRECTORY, LastChain, LastChains, state_directory
from xenbackend.units import PAGE

_LAST = LastChain("null:2G", ["null:1G", "log:|null:1G"], "null:3G")


def test_what_was_left_is_found_by_the_next_service(tmp_path: Path) -> None:
    """What was left for a vbd is found by that vbd only, until it is forgotten; only root can read it."""
    former = LastChains(tmp_path / "state", "boot")
    file = former.leave(PATH, _LAST)
    following = LastChains(tmp_path / "state", "boot")
    other = PATH.__class__("vbd", 0, 6, PATH.devid)

    assert {PATH: _LAST} == former.left
    assert ([PATH], _LAST, None) == (following.paths(), following.of(PATH), following.of(other))
    assert 0o700 == file.parent.stat().st_mode & 0o777
    following.forget(PATH)
    following.forget(PATH)
    assert ([], None, False) == (following.paths(), following.of(PATH), file.parent.exists())


def test_whatever_the_notes_can_hold_is_found_again(tmp_path: Path) -> None:
    """However often the chain is exchanged while xenstore is away, the next service knows the one in service."""
    room = 64 * PAGE  # of the notes
    last = LastChain("null:2G", [f"aio:/{'x' * 1000}{number}" for number in range(room // 1016)])
    notes.write(memoryview(bytearray(notes.SIZE)), notes.Notes(last.chain, stale_params=last.stale_params))
    LastChains(tmp_path, "boot").leave(PATH, last)

    assert last == LastChains(tmp_path, "boot").of(PATH)


def test_another_boot_s_guests_are_others(tmp_path: Path) -> None:
    """Files from before the last boot are removed: a guest with the same number is another one now."""
    file = LastChains(tmp_path, "boot").leave(PATH, _LAST)

    assert [] == LastChains(tmp_path, "another").paths()
    assert not file.exists()


@pytest.mark.parametrize("content", [
    b"", b"\xff", b"[" * 50000, b"{}", b"[]", b'{"boot": "boot", "chain": 5, "stale_params": []}',
    b'{"boot": "boot", "chain": "null:", "stale_params": [5]}',
])  # fmt: skip
def test_what_is_none_of_ours_is_not_believed(tmp_path: Path, content: bytes) -> None:
    """A file that was cut short, or holds anything else, is ignored."""
    chains = LastChains(tmp_path, "boot")
    chains.leave(PATH, _LAST).write_bytes(content)
    (tmp_path / DIRECTORY / "readme.json").write_text("x")

    assert ([], None) == (chains.paths(), chains.of(PATH))


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """If a file cannot be written, the error names it."""
    (tmp_path / "file").write_text("")

    with pytest.raises(KernelError, match=r"write .*/file/xenbackend-last-chains/vbd-0-5-51712.json"):
        LastChains(tmp_path / "file").leave(PATH, _LAST)


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, "/run/x"), ({"STATE_DIRECTORY": ""}, "/run/x"), ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}, "/var/lib/a"),
])  # fmt: skip
def test_systemd_names_the_directory(environment: dict[str, Any], expected: str) -> None:
    """The directory is systemd's state directory, or else that of the control socket."""
    assert Path(expected) == state_directory(environment, "/run/x/control.sock")


def test_this_boot_has_a_name(tmp_path: Path) -> None:
    """Each file has the host's id of the current boot."""
    file = LastChains(tmp_path).leave(PATH, _LAST)

    assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() == json.loads(file.read_text())["boot"]
