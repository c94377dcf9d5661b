"""Completion in real shells: the test presses keys and looks at the command that results."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xenbackend.cli import completion
from xenbackend.cli.main import main

PATIENCE_S = 30.0
PROGRAM = """\
#!/bin/sh
[ "$1" = __complete ] && exec {python} -m xenbackend "$@"
[ "$1" = completion ] && exec {python} -m xenbackend "$@"
for each; do printf '<%s>' "$each"; done
printf ' done\\n'
"""
BEGIN = {  # arguments, and what is typed first
    "bash": (["--norc", "--noprofile", "-i"], 'bind "set bell-style none"; eval "$(xenbackend completion bash)"'),
    "zsh": (["-f", "-i"], 'autoload -Uz compinit; compinit -u -D; eval "$(xenbackend completion zsh)"'),
    "fish": (["--no-config", "-i"], "xenbackend completion fish | source"),
}
SHELLS = [pytest.param(each, marks=pytest.mark.skipif(not shutil.which(each), reason=f"{each} is not installed"))
          for each in BEGIN]  # fmt: skip


class Shell:
    """A shell in a terminal."""

    def __init__(self, name: str, directory: Path) -> None:
        self._fd, far = os.openpty()
        environment = {
            "PATH": f"{directory}:/usr/bin:/bin", "HOME": str(directory), "TERM": "xterm", "LANG": "C.UTF-8",
            "PYTHONPATH": str(Path(completion.__file__).parents[2]),
        }  # fmt: skip
        arguments, begin = BEGIN[name]
        self._process = subprocess.Popen(
            ["setsid", "--ctty", name, *arguments], stdin=far, stdout=far, stderr=far, env=environment, cwd=directory
        )
        os.close(far)
        self.said = ""
        self.type(f"{begin}; xenbackend ready\r")
        self.wait("<ready> done")

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._fd, keys.encode())

    def complete(self, typed: str, result: str) -> None:
        """Type, press Tab, and wait until the line contains `result`."""
        self.said = ""
        self.type(f"{typed}\t")
        end = time.monotonic() + PATIENCE_S
        while result not in self.said:
            assert time.monotonic() < end, (typed, result, self.said)
            self._hear(0.5)

    def wait(self, text: str) -> str:
        """Wait until a command has printed a text, and return the part of the line before it."""
        end = time.monotonic() + PATIENCE_S
        while text not in self.said:
            assert time.monotonic() < end, self.said
            self._hear(0.5)
        before, _, self.said = self.said.partition(text)
        return before.rpartition("\n")[2]

    def enter(self) -> str:
        """Run the line, and return the arguments that the command got."""
        self.said = ""
        self.type("\r")
        line = self.wait(" done")
        return line[line.index("<") :]

    def close(self) -> None:
        """End the shell."""
        self._process.kill()
        self._process.wait()
        os.close(self._fd)

    def _hear(self, seconds: float) -> bool:
        if not select.select([self._fd], [], [], seconds)[0]:
            return False
        text = os.read(self._fd, 1 << 16).decode(errors="replace")
        self.said += re.sub(r"\x07|\x1b(?:\[[0-9;?>=]*[a-zA-Z]|[=>()][A-Z0-9]?|\][^\x07]*\x07)", "", text)
        if "\x1b[c" in text or "\x1b[0c" in text:  # fish wants to know what terminal this is
            self.type("\x1b[?62c")
        return True


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A home directory with images, and on its PATH a program that prints its arguments."""
    program = tmp_path / "xenbackend"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "guest one.raw").touch()
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", SHELLS)
def test_keys_make_a_command(name: str, directory: Path) -> None:
    """A shell completes a command, an option, and a quoted chain driver by driver, with a space in a file name."""
    shell = Shell(name, directory)
    try:
        shell.complete("xenbackend chec", "check ")
        shell.complete("--read-o", "--read-only ")
        shell.complete("'log:|ai", "aio:")
        shell.complete(f"{directory}/imag", "images/")
        shell.complete("gue", "one.raw" if name == "bash" else "one.raw'")  # bash has closed it before, and escapes
        arguments = shell.enter()
    finally:
        shell.close()

    assert f"<check><--read-only><log:|aio:{directory}/images/guest one.raw>" == arguments


@pytest.mark.slow
@pytest.mark.parametrize("name", SHELLS)
def test_words_with_colons_and_equal_signs(name: str, directory: Path) -> None:
    """Unquoted words are not doubled where a shell splits them at colons and equal signs."""
    shell = Shell(name, directory)
    try:
        shell.complete("xenbackend check nbd:un", "unix:")
        shell.complete(f"{directory}/imag", "images/")
        shell.complete("x,drai", "drain=")
        shell.complete("5s --js", "--json ")
        arguments = shell.enter()
    finally:
        shell.close()

    assert f"<check><nbd:unix:{directory}/images/x,drain=5s><--json>" == arguments


HOSTILE = [
    "a$(touch run)",
    "b`touch run`",
    "c!!",
    "d'e",
    'f"g',
    "h\\i",
    "j$HOME",
    "k;touch run",
    "l~m",
    "n*",
    "p'",
    'q"',
]


@pytest.mark.slow
@pytest.mark.parametrize("quote", ["", "'", '"'])
@pytest.mark.parametrize("name", SHELLS)
def test_the_name_of_a_file_is_never_run(name: str, quote: str, directory: Path) -> None:
    """No file name, quoted or not, makes the shell run anything; the command gets the name unchanged."""
    for each in HOSTILE:
        (directory / "images" / each).touch()
    shell = Shell(name, directory)
    found = []
    try:
        for each in HOSTILE:
            shell.type(f"xenbackend check {quote}aio:{directory}/images/{each[0]}\t")
            found.append(shell.enter())
    finally:
        shell.close()

    assert [f"<check><aio:{directory}/images/{each}>" for each in HOSTILE] == found
    assert not (directory / "run").exists()


@pytest.mark.parametrize("name", BEGIN)
def test_the_script_of_each_shell(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The completion script of each shell is printed unchanged."""
    assert 0 == main(["completion", name])
    assert completion.SCRIPTS[name] == capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["bash"], ["bash", "xenbackend nosuch "], ["fish", "xenbackend 'check no"]])
def test_a_shell_never_hears_of_a_mistake(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Invalid input to `__complete` prints nothing and ends with status 0."""
    assert 0 == main(["__complete", *words])
    assert ("", "") == capsys.readouterr()


def test_bash_gets_what_it_puts_in_place(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Bash gets only the part after its last word break, with special characters escaped as the open quote requires."""
    (tmp_path / "a b|c").touch()
    (tmp_path / "d$e`f!g'h\"i\\j").touch()
    breaks = " \t\n\"'><=;|&(:"
    for line in (f"x check aio:{tmp_path}/a", f"x check 'aio:{tmp_path}/a", f"x check aio:'{tmp_path}/a"):
        assert 0 == main(["__complete", "bash", line, breaks])

    escaped, quoted, inner = capsys.readouterr().out.splitlines()
    assert rf"{tmp_path}/a\ b\|c" == escaped
    assert (f"aio:{tmp_path}/a b|c", f"{tmp_path}/a b|c") == (quoted, inner)

    for line in (f'x check "aio:{tmp_path}/d', f"x check 'aio:{tmp_path}/d"):
        assert 0 == main(["__complete", "bash", line, breaks])
    double, single = capsys.readouterr().out.splitlines()
    assert rf"""aio:{tmp_path}/d\$e\`f"\!"g'h\"i\\j""" == double
    assert rf"""aio:{tmp_path}/d$e`f!g'\''h"i\j""" == single
