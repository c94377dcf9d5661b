"""The shim, run by a real shell."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from xenbackend.xl.command import SHORTEST
from xenbackend.xl.shim import is_shim, shim_text


def program(file: Path, text: str) -> Path:
    """Make an executable."""
    file.write_text(text)
    file.chmod(0o755)
    return file


@pytest.fixture
def shim(tmp_path: Path) -> Path:
    """Return a shim between an xl and a xenbackend that print their arguments; the latter's path needs quotes."""
    xl = program(tmp_path / "the xl", '#!/bin/sh\nprintf "%s\\n" real "$@"; exit 8')
    ours = program(tmp_path / "our own", '#!/bin/sh\nprintf "%s\\n" "$@"; exit 7')
    return program(tmp_path / "xl", shim_text(str(xl), str(ours), "-m", "xenbackend"))


def run(shim: Path, *words: str) -> tuple[int, list[str]]:
    """Return the exit status and the words that arrived."""
    ended = subprocess.run([shim, *words], capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout.splitlines()


@pytest.mark.parametrize("command", [*SHORTEST, *SHORTEST.values()])
def test_it_starts_the_front_step_with_the_same_words(shim: Path, command: str) -> None:
    """Every argument arrives unchanged behind the command's own, and the exit status is passed back."""
    words = ["-v", command, "a b", "", "$x'|"]

    assert (7, ["-m", "xenbackend", "xl", *words]) == run(shim, *words)


@pytest.mark.parametrize("words", [[], ["list", "a b", ""], ["block-list", "0"], ["console", "-t", "pv"]])
def test_other_commands_go_straight_to_xl(shim: Path, words: list[str]) -> None:
    """A command that names no disk starts only a shell, and no Python."""
    assert (8, ["real", *words]) == run(shim, *words)


def test_without_us_it_is_xl(shim: Path, tmp_path: Path) -> None:
    """If xenbackend has been removed, the shim starts the real xl."""
    (tmp_path / "our own").unlink()

    assert (8, ["real", "create", "vm.cfg"]) == run(shim, "create", "vm.cfg")


def test_it_is_known_wherever_it_lies(tmp_path: Path) -> None:
    """A copy of the shim or a link to it is recognised; another program, a directory or nothing is not."""
    shim = program(tmp_path / "xl", shim_text("/usr/sbin/xl", "/usr/bin/xenbackend"))
    (tmp_path / "link").symlink_to(shim)
    other = program(tmp_path / "other", "#!/bin/sh\nexec /usr/lib/xen-4.17/bin/xl")

    assert [True, True] == [is_shim(file) for file in (shim, tmp_path / "link")]
    assert [False, False, False] == [is_shim(file) for file in (other, tmp_path, tmp_path / "none")]
