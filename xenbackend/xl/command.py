"""xl's command line: finds a configuration or a disk in it, and returns the command with lines that xl understands.

Must not run anything. Arguments that xl would refuse are passed on unchanged, so that xl can say why.

Source: xl's xl.c, xl_vmcontrol.c, xl_misc.c, xl_saverestore.c, xl_migrate.c, xl_block.c.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from getopt import GetoptError, getopt, gnu_getopt
from pathlib import Path
from typing import Final

from xenbackend.errors import ChainError, ConfigError
from xenbackend.xl.config import read_disks
from xenbackend.xl.disk import Version, rewrite
from xenbackend.xl.rewrite import convert, disk_argument

AsFile = Callable[[str], str]  # stores a text where xl can read it, and returns the path

_GLOBAL_OPTIONS: Final = "vftTN"
_VNC: Final = ["vncviewer", "vncviewer-autopass"]
SHORTEST: Final = {  # commands that name a configuration or a disk, with the shortest abbreviation that is unique in xl
    "create": "cr",
    "config-update": "conf",
    "restore": "rest",
    "save": "sa",
    "migrate": "migrate",
    "block-attach": "block-a",
}
_TAKES_FILE: Final[dict[str, tuple[str, list[str], int, int | None]]] = {
    # options, long options, number of arguments if one is the file, the index of the file; None: -C names it
    "restore": ("FcpdeVA", _VNC, 2, 0),
    "save": ("cpD", [], 3, 2),
    "migrate": ("FC:s:epD", ["debug", "live"], 2, None),
}
_WITH_VALUE: Final = ("-C", "-s")


def translate(words: Sequence[str], xen: Version, as_file: AsFile) -> list[str]:
    """Return xl's arguments with their disk lines rewritten; unchanged if there is nothing to rewrite.

    Raises: ChainError, ConfigError, with the place, if a line asks for us but its disk is not possible.
    """
    try:
        _, rest = getopt(list(words), _GLOBAL_OPTIONS)
        before, command = list(words[: len(words) - len(rest)]), _command(rest)
        if command == "create":
            return [*before, rest[0], *_with_disks(rest[1:], "AFVcdef:inpq", xen)]
        if command == "config-update" and len(rest) > 1:
            return [*before, *rest[:2], *_with_disks(rest[2:], "dqf:", xen)]
        if command == "block-attach":
            return [*before, rest[0], *_with_disk(rest[1:], xen)]
        if command in _TAKES_FILE:
            return [*before, rest[0], *_with_file(command, rest[1:], xen, as_file)]
    except GetoptError:
        pass  # xl will refuse it, with a better message
    return list(words)


def _command(rest: Sequence[str]) -> str | None:
    word = rest[0] if rest else ""
    return next((name for name, least in SHORTEST.items() if name.startswith(word) and word.startswith(least)), None)


def _with_disks(words: list[str], options: str, xen: Version) -> list[str]:
    """Return the arguments of create or config-update. The last setting of a name counts, so ours is appended."""
    file, settings = _config_of(words, options)
    text = None if file is None else _read(file)
    if file is None or text is None:
        return words
    if settings:
        text = "\n".join((text, *settings, "", ""))
    if not _is_readable(text):
        return words
    ours = disk_argument(text, file, xen)
    return words if ours is None else [*words, ours]


def _config_of(words: list[str], options: str) -> tuple[str | None, list[str]]:
    """Return the file (None if there is not exactly one) and the settings that xl's arguments name."""
    file = None
    if words and not words[0].startswith("-") and "=" not in words[0]:
        file, words = words[0], words[1:]
    known = ["defconfig=", "dryrun", "ignore-global-affinity-masks", "quiet", *_VNC]
    given, rest = gnu_getopt(words, options, known)
    file = next((value for name, value in reversed(given) if name in {"-f", "--defconfig"}), file)
    settings = [word for word in rest if "=" in word]
    files = [*([] if file is None else [file]), *(word for word in rest if "=" not in word)]
    return (files[0] if len(files) == 1 else None), settings


def _with_file(command: str, words: list[str], xen: Version, as_file: AsFile) -> list[str]:
    """Return the arguments of a command that takes a whole file instead of the domain's configuration."""
    options, known, count, place = _TAKES_FILE[command]
    given, rest = gnu_getopt(words, options, known)
    file = dict(given).get("-C") if place is None else rest[place] if len(rest) == count else None
    converted = None if file is None else _converted(file, xen, as_file)
    if converted is None:
        return words
    if place is None:
        given.append(("-C", converted))  # xl uses the last one
    else:
        rest[place] = converted
    return [*(word for pair in given for word in pair[: 2 if pair[0] in _WITH_VALUE else 1]), "--", *rest]


def _converted(file: str, xen: Version, as_file: AsFile) -> str | None:
    """Return the path of a copy of a file with its disk lines rewritten; None if there is nothing to rewrite."""
    text = _read(file)
    if text is None or not _is_readable(text):
        return None
    converted, count = convert(text, file, xen)
    return as_file(converted) if count else None


def _with_disk(words: list[str], xen: Version) -> list[str]:
    """Return the arguments of block-attach: a domain, and a disk line, which may be split into several arguments."""
    _, rest = gnu_getopt(words, "")
    try:
        line = rewrite(",".join(rest[1:]), xen)
    except ChainError as error:
        raise ChainError(f"block-attach: {error.problem}", error.chain, error.position, error.length) from error
    except ConfigError as error:
        raise ConfigError(f"block-attach: {error}") from error
    return words if line is None else ["--", rest[0], line]


def _read(file: str) -> str | None:
    """Return the text of a configuration; None if xl would not read it: it reads only regular files and /dev/null."""
    if file == "/dev/null":
        return ""
    try:
        if not stat.S_ISREG(Path(file).stat().st_mode):
            return None
        return os.fsdecode(Path(file).read_bytes())
    except OSError:
        return None


def _is_readable(text: str) -> bool:
    try:
        read_disks(text, "")
    except ConfigError:
        return False
    return True
