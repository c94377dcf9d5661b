"""The settings file: where it is, and its values as they are written.

Must not know a setting: `supervisor.service.settings` does.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from xenbackend.errors import ConfigError

PATH = Path("/etc/xenbackend.toml")


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
