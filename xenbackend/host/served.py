"""Whether guests depend on the service right now.

Must not take silence for a no.
"""

from __future__ import annotations

from pathlib import Path

from xenbackend.errors import ConfigError, XenbackendError
from xenbackend.protocol.client import DEFAULT_SOCKET, call
from xenbackend.supervisor.service import settings

_NAMED = 5


def control_sockets(path: Path | None = None) -> list[str]:
    """Return where a service may listen: where its settings say, and at the default place.

    A service that cannot use its settings goes by former ones, which may have said the default.
    Raises: XenbackendError where the settings cannot be read: they may have said anything.
    """
    try:
        return list(dict.fromkeys([settings.load(path, {}).socket, DEFAULT_SOCKET]))
    except ConfigError as problem:
        raise _not_known(problem) from None


def refuse_while_serving(socket: str) -> None:
    """Return when no service listens on the control socket, or it has no disk.

    Raises: XenbackendError, naming disks that would be lost to their guests.
    """
    if not Path(socket).exists():
        return
    try:
        served = [each["vbd"] for each in call(socket, {"verb": "status"})["data"]]
    except XenbackendError as problem:
        raise _not_known(problem) from None
    if served:
        names = ", ".join(served[:_NAMED]) + (f" ... ({len(served)} in all)" if served[_NAMED:] else "")
        raise XenbackendError(f"guests have disks: {names}; detach them or shut the guests down first, or use --force")


def _not_known(problem: XenbackendError) -> XenbackendError:
    return XenbackendError(f"whether disks are served is not known: {problem}; --force goes on anyhow")
