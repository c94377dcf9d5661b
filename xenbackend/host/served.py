"""Finds out whether guests depend on the service right now.

Must not take a missing answer for a no.

``python3 -m xenbackend.host.served`` is for the package's scripts: its exit status is 1 if guests have disks, or if
that is not known; a message says which.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from xenbackend.errors import ConfigError, XenbackendError
from xenbackend.protocol.client import DEFAULT_SOCKET, call
from xenbackend.supervisor.service import settings

_NAMED = 5
_PROC = Path("/proc")
_FORCE = ", or use --force"  # main() omits it: a package manager's --force means something else


def control_sockets(path: Path | None = None) -> list[str]:
    """Return the sockets on which a service may listen: the one in its settings, and the default one.

    A service that cannot use its settings uses former ones, which may have named the default.
    Raises: XenbackendError if the settings cannot be read while a service or a worker runs: they may name any socket.
    """
    try:
        return list(dict.fromkeys([settings.load(path, {}).socket, DEFAULT_SOCKET]))
    except ConfigError as problem:
        doubt = _who_may_serve()
        if not doubt:
            return []
        raise _not_known(problem, doubt) from None


def refuse_while_serving(socket: str) -> None:
    """Check that the service on a control socket serves no disk, or that there is none.

    Raises: XenbackendError, which names the disks that guests would lose.
    """
    if not Path(socket).exists():
        return
    try:
        served = [each["vbd"] for each in call(socket, {"verb": "status"}).data]
    except XenbackendError as problem:
        doubt = _who_may_serve()
        if not doubt:
            return  # a service that was killed has left its socket
        raise _not_known(problem, doubt) from None
    if served:
        names = ", ".join(served[:_NAMED]) + (f" ... ({len(served)} in all)" if served[_NAMED:] else "")
        raise XenbackendError(f"guests have disks: {names}; detach them or shut the guests down first{_FORCE}")


def _not_known(problem: XenbackendError, doubt: str) -> XenbackendError:
    return XenbackendError(f"it is not known whether disks are served: {problem}; {doubt}{_FORCE}")


def _who_may_serve() -> str:
    """Return which service or worker runs on this host, wherever it listens; empty if none does."""
    try:
        pids = [each for each in os.listdir(_PROC) if each.isdecimal()]  # noqa: PTH208 - names, not paths
    except OSError:
        pids = []
    if str(os.getpid()) not in pids:
        return f"{_PROC} does not show which processes run"
    return next((f"process {each} may serve some" for each in pids if _is_ours(_words_of(each))), "")


def _words_of(pid: str) -> list[str]:
    with suppress(OSError):  # it has ended
        return (_PROC / pid / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
    return []


def _is_ours(words: Sequence[str]) -> bool:
    """Return whether this is the command line of a service or its parent, of a worker or their zygote."""
    is_service = "run" in words and any(Path(each).name == "xenbackend" for each in words)
    return is_service or any(each.startswith("xenbackend.worker.") for each in words)


def main() -> int:
    """Print a message if guests have disks, or if that is not known, and return the exit status for a script."""
    try:
        for socket in control_sockets():
            refuse_while_serving(socket)
    except XenbackendError as problem:
        print(f"xenbackend: {str(problem).removesuffix(_FORCE)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
