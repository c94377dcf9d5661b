"""The shim, a file that makes plain ``xl`` run our step first: its text, its place, and how to recognise it.

Must not install itself: an operator has to ask for that. Must not get in the way: commands that name no disk, and all
commands once xenbackend is removed, go to the real xl at the cost of starting a shell.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Final

from xenbackend.xl.command import SHORTEST

SHIM_PLACE: Final = "/usr/local/sbin/xl"  # before /usr/sbin on root's PATH and on systemd's
_MARK: Final = "# xenbackend's step before xl"
_TEXT: Final = """\
#!/bin/sh
{mark}: disk lines such as tap2:log:|aio:/img become lines that xl understands.
# Remove this file to have plain xl again.
for word; do
    case $word in {commands}) [ -x {program} ] && exec {command} xl "$@" ;; esac
done
exec {xl} "$@"
"""


def shim_text(xl: str, *command: str) -> str:
    """Return the text of the shim; `xl` is the real xl, and `command` starts xenbackend, both with absolute paths."""
    return _TEXT.format(
        mark=_MARK,
        commands="|".join(f"{least}*" for least in SHORTEST.values()),
        program=shlex.quote(command[0]),
        command=shlex.join(command),
        xl=shlex.quote(xl),
    )


def is_shim(file: Path) -> bool:
    """Return whether a file is the shim, under any name."""
    try:
        with file.open("rb") as opened:
            return _MARK.encode() in opened.read(200)
    except OSError:
        return False
