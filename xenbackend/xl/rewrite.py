"""Rewrites the disk lines of a configuration that xl would not understand: in the text, or as an additional argument.

Must not read or write a file.
"""

from __future__ import annotations

from xenbackend.errors import ChainError, ConfigError
from xenbackend.xl.config import Atom, line_of, quote, read_disks
from xenbackend.xl.disk import Version, rewrite


def convert(text: str, source: str, xen: Version) -> tuple[str, int]:
    """Return a file's text with its disk lines rewritten and all else unchanged, and the number of rewritten lines.

    Raises: ChainError, ConfigError, both with `source` and the line number.
    """
    pieces = []
    place = 0
    for disk, line in _rewritten(text, source, xen):
        if line is not None:
            mark = text[disk.start] if text[disk.start] in "'\"" else "'"
            pieces += [text[place : disk.start], quote(line, mark)]
            place = disk.end
    return "".join((*pieces, text[place:])), len(pieces) // 2


def disk_argument(text: str, source: str, xen: Version) -> str | None:
    """Return a setting that, given after the text, makes xl see its disks; None if xl understands them already.

    Raises: ChainError, ConfigError, both with `source` and the line number.
    """
    disks = _rewritten(text, source, xen)
    if all(line is None for _, line in disks):
        return None
    return f"disk=[{','.join(quote(disk.value if line is None else line) for disk, line in disks)}]"


def _rewritten(text: str, source: str, xen: Version) -> list[tuple[Atom, str | None]]:
    return [(disk, _located(disk, text, source, xen)) for disk in read_disks(text, source)]


def _located(disk: Atom, text: str, source: str, xen: Version) -> str | None:
    try:
        return rewrite(disk.value, xen)
    except ChainError as error:
        problem = f"{source}:{line_of(text, disk.start)}: {error.problem}"
        raise ChainError(problem, error.chain, error.position, error.length) from error
    except ConfigError as error:
        raise ConfigError(f"{source}:{line_of(text, disk.start)}: {error}") from error
