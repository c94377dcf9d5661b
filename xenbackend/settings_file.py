"""The settings file: where it is, and its values as they are written.

Must not know a setting: `supervisor.service.settings` does.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from xenbackend.errors import ConfigError

PATH = Path("/etc/xenbackend.toml")
SCRATCH = "/var/tmp"  # noqa: S108 - the setting scratch by default; what is there has no name, so nobody meets it
_TABLE = re.compile(r"\s*\[\s*([\w.-]+)\s*\]")
_KEY = re.compile(r"\s*([\w.-]+)\s*=")


def read(path: Path, *, must_exist: bool) -> dict[str, Any]:
    """Return the values in a settings file by name; none where there need not be one. Raises: ConfigError."""
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
    """Return the line of each setting and table, a table's settings by both names: ``limits.max_queues``.

    For people: where a text of several lines looks like settings, it may be another line. Empty for a file that cannot
    be read.
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
