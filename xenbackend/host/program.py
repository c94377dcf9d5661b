"""The command that starts this xenbackend from a process that has neither our environment nor our directory.

Must not guess: a program that cannot be started in this way is refused.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from xenbackend import __version__
from xenbackend.errors import ConfigError

_NAME = "xenbackend"
_PLAIN = re.compile(r"/[A-Za-z0-9_./+@~-]+")  # has no special characters in a unit or in a script's first line
_MAX_LINE = 120  # the kernel reads 127 bytes of a script's first line, or 255
_START_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Program:
    """A command line without arguments, and the interpreter that runs it, with absolute paths."""

    command: str
    python: str


PACKAGED = Program("/usr/bin/xenbackend", "/usr/bin/python3")


def this_program(called_as: str, python: str) -> Program:
    """Return the running program, from its ``sys.argv[0]`` and ``sys.executable``.

    Raises: ConfigError if a service manager could not start it.
    """
    script = Path(called_as).absolute()
    is_script = script.name == _NAME and script.is_file()
    program = Program(str(script) if is_script else f"{python} -m {_NAME}", python)
    for path in (str(script) if is_script else python, python):
        if not _PLAIN.fullmatch(path) or len(path) > _MAX_LINE:
            raise ConfigError(
                f"{path}: cannot stand in a unit and in a script's first line; install to a shorter path, of letters, "
                "digits and any of /._+@~-"
            )
    if not _starts(program.command.split()):
        raise ConfigError(
            f"{program.command}: starts only in your environment, which a service does not have; install xenbackend "
            "into a venv"
        )
    return program


def _starts(command: list[str]) -> bool:
    try:
        result = subprocess.run(  # noqa: S603 - the command is our own
            [*command, "--version"],
            env={"PATH": "/usr/bin:/bin"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_START_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0 and result.stdout.decode(errors="replace").strip() == f"{_NAME} {__version__}"
