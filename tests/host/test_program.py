"""How a service manager starts this xenbackend."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from xenbackend import __version__
from xenbackend.errors import ConfigError
from xenbackend.host.program import this_program

HELLO = f"echo xenbackend {__version__}"


def script(path: Path, text: str) -> Path:
    """Make a shell script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_script_is_started_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative command becomes an absolute one."""
    path = script(tmp_path / "bin" / "xenbackend", HELLO)
    monkeypatch.chdir(tmp_path)
    program = this_program("bin/xenbackend", "/usr/bin/python3")

    assert (str(path), "/usr/bin/python3") == (program.command, program.python)


@pytest.mark.slow
def test_a_module_is_started_by_its_interpreter() -> None:
    """`python -m xenbackend` becomes the same command with the interpreter's absolute path."""
    program = this_program(str(Path(__file__).parents[2] / "xenbackend" / "__main__.py"), sys.executable)

    assert f"{sys.executable} -m xenbackend" == program.command


@pytest.mark.parametrize("text", [f': "${{PYTHONPATH:?}}"; {HELLO}', "exit 1", "echo xenbackend 0.0.1"])
def test_what_needs_an_environment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A program that fails, needs PYTHONPATH, or is another version, cannot be the service's program."""
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    path = script(tmp_path / "bin" / "xenbackend", text)
    with pytest.raises(ConfigError, match="install xenbackend into a venv"):
        this_program(str(path), "/usr/bin/python3")


@pytest.mark.parametrize("directory", ["a b", "100%", "x" * 120, "ü"])
def test_a_path_that_a_unit_would_misread_is_refused(tmp_path: Path, directory: str) -> None:
    """A path with a blank or percent sign, or one too long, is refused: a unit or a script's first line misreads it."""
    path = script(tmp_path / directory / "xenbackend", HELLO)
    with pytest.raises(ConfigError, match="install to a shorter path"):
        this_program(str(path), "/usr/bin/python3")
