"""The settings file: its place, and its values as they are written there.

Must not know any particular setting: `supervisor.service.settings` does.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from xenbackend.errors import ConfigError

PATH = Path("/etc/xenbackend.toml")
SCRATCH = "/var/tmp"  # noqa: S108 - default of the setting `scratch`; files there have no name, so nobody else can open them
_TABLE = re.compile(r"\s*\[\s*([\w.-]+)\s*\]")
_KEY = re.compile(r"\s*([\w.-]+)\s*=")


def read(path: Path, *, must_exist: bool) -> dict[str, Any]:
    """Return the values in a settings file by name; empty if the file is missing and need not exist.

    Raises: ConfigError.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if must_exist:
            raise ConfigError(f"{path}: there is no such file") from None
        return {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None


def lines(path: Path) -> dict[str, int]:
    """Return the line number of each setting and table; a setting in a table is named like ``limits.max_queues``.

    For messages only: a value of several lines that looks like settings may give a wrong line. Empty if the file
    cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := _TABLE.match(line):
            table = f"{match[1]}."
            found.setdefault(match[1], number)
        elif match := _KEY.match(line):
            found.setdefault(f"{table}{match[1]}", number)
    return found
