"""The command line as a whole."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from xenbackend import __version__
from xenbackend.cli import main as cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "xenbackend", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` lists all commands, although running one command imports none of the others."""
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    said = capsys.readouterr().out

    assert end.value.code == 0
    assert all(re.search(rf"\n    {name}\s", said) for name in cli.MODULES)


def test_a_python_without_its_lock_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Free-threaded Python ends every command with a sentence before anything is touched."""
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    refused = cli.main(["drivers"])
    said = capsys.readouterr()
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)

    assert (2, 0) == (refused, cli.main(["drivers"]))
    assert "" == said.out
    assert "global lock" in said.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the version."""
    with pytest.raises(SystemExit):
        cli.main(["--version"])

    assert capsys.readouterr().out == f"xenbackend {__version__}\n"


def test_an_operators_mistake_is_two_and_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """An invalid chain ends with status 2 and a caret on standard error, and with nothing on standard output."""
    status = cli.main(["check", "log:|ayo:/x"])
    said = capsys.readouterr()

    assert status == 2
    assert said.out == ""
    assert said.err == "xenbackend: unknown driver 'ayo'; did you mean aio?\n  log:|ayo:/x\n       ^^^\n"


def test_a_failure_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """A failure that is not the operator's mistake, such as a service that does not run, ends with status 1."""
    status = cli.main(["status", "--socket", "/nonexistent/socket"])

    assert status == 1
    assert "no service answers" in capsys.readouterr().err


def test_an_error_of_the_host_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """An error of the host that a command does not handle is printed with its file and reason, without its number."""
    assert 1 == cli.main(["image", "create", "qcow2", "/proc/self/new.qcow2", "1M"])

    assert "xenbackend: /proc/self/new.qcow2: No such file or directory\n" == capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """A pipe that is closed early ends the output without a message."""
    process = subprocess.Popen(
        [sys.executable, "-m", "xenbackend", "drivers", "log"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=60)

    assert said == b""
    assert process.returncode == 0


@pytest.mark.slow
def test_it_runs_as_a_module() -> None:
    """`python -m xenbackend` is the command."""
    assert run("--version").stdout == f"xenbackend {__version__}\n"
