"""The service as a daemon: checked while the operator still looks, then restarted whenever it dies.

Must not serve anything itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from xenbackend import log
from xenbackend.errors import ConfigError, XenbackendError
from xenbackend.supervisor.service import main, parent
from xenbackend.supervisor.service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator


def run_detached(
    settings: Settings, arguments: Sequence[str], environment: Mapping[str, str], pid_file: Path, log_file: Path
) -> int:
    """Check, then become a daemon that runs the service with these arguments, and restarts it whenever it dies.

    Raises: XenbackendError, if a check fails, while the operator still looks.
    """
    settings = _with_whole_paths(settings)
    main.check(settings)
    _check_pid_file(pid_file)
    from daemon import DaemonContext  # only here: a service in the foreground does not need it

    try:
        stream = log_file.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    except OSError as error:
        raise ConfigError(f"{log_file}: cannot write the log there: {error.strerror}") from None
    with DaemonContext(pidfile=_pid_file(pid_file), stdout=stream, stderr=stream, umask=0o077, signal_map={}):
        try:
            return parent.run(["run", *arguments], settings.socket, environment)
        except XenbackendError as error:
            log.get_logger("service").error(str(error))
            sys.exit(1)


def _with_whole_paths(settings: Settings) -> Settings:
    """Return settings with absolute paths, which mean the same in a daemon's directory, the root."""
    store = str(Path(settings.store).absolute()) if settings.store else ""
    return replace(settings, store=store, socket=str(Path(settings.socket).absolute()))


def _check_pid_file(path: Path) -> None:
    """Raise ConfigError if the file cannot be written, or names a running service."""
    try:
        with path.open("a+", encoding="ascii", errors="replace") as file:
            file.seek(0)
            pid = file.read(20).strip()
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the pid there: {error.strerror}") from None
    with suppress(OSError):  # no such process: the file was left behind
        if pid.isdecimal() and b"xenbackend" in Path(f"/proc/{pid}/cmdline").read_bytes():
            raise ConfigError(f"{path}: another xenbackend service runs as process {pid}")


def _pid_file(path: Path) -> AbstractContextManager[None]:
    @contextmanager
    def hold() -> Iterator[None]:
        path.write_text(f"{os.getpid()}\n", encoding="ascii")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    return hold()
