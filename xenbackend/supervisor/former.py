"""The settings of the service before, kept for one that cannot use its own: guests are served on all the same.

Must not be used where no disk is in service: then a mistake is said, and nothing is started.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

from xenbackend.errors import ConfigError, KernelError
from xenbackend.supervisor import settings
from xenbackend.supervisor.estate import is_of_a_disk
from xenbackend.supervisor.keeper import Keeper
from xenbackend.supervisor.settings import Settings

_NAME = "settings"  # at the keeper
_MAX = 1 << 20  # bytes


def choose(read: Callable[[], Settings], keeper: Keeper) -> tuple[Settings, str]:
    """Return the settings to go by, and what is wrong with those that should be; empty where nothing is.

    Args:
        read: returns our own. Raises: ConfigError.
        keeper: what an earlier service left.

    Raises: ConfigError where our own are not usable, and no disk is in service or nobody knows by which settings.
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
    except OSError as error:
        raise KernelError("keep the settings", error.errno or errno.EMFILE) from None
    try:
        with suppress(KernelError):
            keeper.forget(_NAME)
        os.write(fd, json.dumps(asdict(chosen)).encode())
        keeper.keep(_NAME, fd)
    finally:
        os.close(fd)


def _take(keeper: Keeper) -> Settings | None:
    fd = keeper.inherited.pop(_NAME, -1)
    if fd < 0:
        return None
    try:
        return settings.make(json.loads(os.pread(fd, _MAX, 0)), "the settings of the service before")
    except (ConfigError, ValueError, TypeError):  # another program's
        return None
    finally:
        os.close(fd)
