"""The settings of the previous service, kept for one that cannot use its own, so that guests are still served.

Must not be used if no disk is in service: then the mistake is reported, and nothing is started.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from xenbackend.blkif.features import Limits
from xenbackend.errors import ConfigError, KernelError
from xenbackend.supervisor.service import settings
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.vbd.inheritance import is_of_a_disk

_NAME = "settings"  # at the keeper
_MAX = 1 << 20  # bytes


def choose(read: Callable[[], Settings], keeper: Keeper) -> tuple[Settings, str]:
    """Return the settings to use, and what is wrong with our own; empty if nothing is.

    Args:
        read: returns our own settings. Raises: ConfigError.
        keeper: has what an earlier service left.

    Raises: ConfigError, if our own are not usable, and no disk is in service or the former settings are not known.
    """
    former = _take(keeper)
    try:
        return read(), ""
    except ConfigError as problem:
        if former is None or not any(is_of_a_disk(name) for name in keeper.inherited):
            raise
        return former, str(problem)


def leave(chosen: Settings, keeper: Keeper) -> None:
    """Have the settings kept for the next service. Raises: KernelError."""
    try:
        fd = os.memfd_create("xenbackend-settings", os.MFD_CLOEXEC)
        with os.fdopen(fd, "wb") as file:
            file.write(json.dumps(asdict(chosen)).encode())
            file.flush()
            keeper.replace(_NAME, fd)
    except OSError as error:
        raise KernelError("keep the settings", error.errno or errno.EIO) from None


def _take(keeper: Keeper) -> Settings | None:
    fd = keeper.inherited.pop(_NAME, -1)
    if fd < 0:
        return None
    try:
        values = json.loads(os.pread(fd, _MAX, 0))
        known = {**_known(Settings, values), "limits": _known(Limits, values["limits"])}
        return settings.make(known, "the settings of the service before")
    except (ConfigError, OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):  # not ours
        return None
    finally:
        os.close(fd)


def _known(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of settings that this version has; another version may have others."""
    names = {each.name for each in fields(kind)}
    return {name: value for name, value in values.items() if name in names}
