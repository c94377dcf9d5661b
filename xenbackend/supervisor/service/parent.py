"""What starts the service where systemd does not: starts it again when it dies, and keeps its descriptors meanwhile.

Must not do anything that could fail: it is what is left when everything else has died.

To the service it looks like systemd: ``NOTIFY_SOCKET``, ``FDSTORE``, ``LISTEN_FDS``. Signals:

    SIGTERM, SIGINT   the service drains and closes every disk, and both end
    SIGHUP            the service is replaced by a new one, which takes over every disk in service
"""

from __future__ import annotations

import fcntl
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from xenbackend.errors import ConfigError
from xenbackend.supervisor.service.keeper import FIRST
from xenbackend.supervisor.service.notify import address_of

MAX_KEPT = 4096
RESTART_S = 1.0  # before a service that died is started again, if it had not run for longer; twice that the next time
MAX_RESTART_S = 60.0
_MISTAKE = 2  # exit status for a mistake of the operator, which does not mend itself
_MESSAGE = 4096  # bytes


class Store:
    """The kept descriptors by name, filled by datagrams on `socket`."""

    def __init__(self, path: Path) -> None:
        """Listen at `path`. Raises: OSError."""
        self.fds: dict[str, int] = {}
        self.path = path
        path.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self.socket.bind(str(path))
            path.chmod(0o600)
        except OSError:
            self.socket.close()
            raise

    def take(self) -> str:
        """Take one message: do what it asks for, and return it for whoever else wants to know."""
        data, fds, _, _ = socket.recv_fds(self.socket, _MESSAGE, 8)
        for fd in fds:  # Python's recv_fds passes over the flag that would do it
            os.set_inheritable(fd, False)
        message = data.decode(errors="replace")
        fields = dict(line.partition("=")[::2] for line in message.splitlines())
        name = fields.get("FDNAME", "")
        if fields.get("FDSTOREREMOVE") == "1" or fds:
            self._forget(name)
        if fields.get("FDSTORE") == "1" and fds and len(self.fds) < MAX_KEPT:
            self.fds[name] = fds.pop()
        for fd in fds:
            os.close(fd)
        return message

    def close(self) -> None:
        """Let go of everything."""
        for name in list(self.fds):
            self._forget(name)
        self.socket.close()
        self.path.unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        fd = self.fds.pop(name, -1)
        if fd >= 0:
            os.close(fd)


class Parent:
    """Runs one service after the other."""

    def __init__(self, command: Sequence[str], store: Store, environment: Mapping[str, str]) -> None:
        """Run `command`; `environment` is ours, whose ``NOTIFY_SOCKET`` hears what the service says."""
        self._command = command
        self._store = store
        self._environment = {**environment, "NOTIFY_SOCKET": str(store.path), "FDSTORE": str(MAX_KEPT)}
        self._environment.pop("LISTEN_PID", None)  # ours, where systemd gave us descriptors; the service has another
        self._above = address_of(environment)
        self._pidfd = -1  # of the service that runs
        self._is_ending = self._is_replacing = False

    def run(self) -> int:
        """Run until the service ends of its own will, or ours, and return its exit status."""
        _raise_limit()
        rest_s = RESTART_S
        with selectors.DefaultSelector() as selector, self._signals(selector):
            selector.register(self._store.socket, selectors.EVENT_READ)
            while True:
                began = time.monotonic()
                status = self._run_once(selector)
                is_over = self._is_ending or status in (0, _MISTAKE) or not self._store.path.exists()
                if is_over and not self._is_replacing:
                    return status
                self._is_replacing = False
                if not status or time.monotonic() - began >= RESTART_S:
                    rest_s = RESTART_S
                elif self._rest(selector, time.monotonic() + rest_s):
                    rest_s = min(2 * rest_s, MAX_RESTART_S)
                else:
                    return status

    def _run_once(self, selector: selectors.BaseSelector) -> int:
        try:
            pid = _spawn(self._command, self._store.fds, self._environment)
            self._pidfd = pidfd = os.pidfd_open(pid)
        except OSError:  # no process or descriptor is to be had now: later
            return 1
        selector.register(pidfd, selectors.EVENT_READ)
        if self._is_ending:  # the signal came before there was anybody to tell
            self._tell(signal.SIGINT)
        while pidfd not in [key.fd for key, _ in self._select(selector, None)]:
            pass
        self._listen()  # what it said last counts, before it is started again
        selector.unregister(pidfd)
        self._pidfd = -1
        os.close(pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _rest(self, selector: selectors.BaseSelector, until: float) -> bool:
        """Let the time pass, and return whether there is to be another service."""
        while not self._is_ending and (left_s := until - time.monotonic()) > 0:
            self._select(selector, left_s)
        return not self._is_ending

    def _select(
        self, selector: selectors.BaseSelector, timeout_s: float | None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for anything, take what the service says and the signals, and return what was ready."""
        ready = selector.select(timeout_s)
        for key, _ in ready:
            if key.data is not None:
                key.data()
        self._listen()
        return ready

    def _listen(self) -> None:
        self._store.socket.setblocking(False)
        while True:
            try:
                message = self._store.take()
            except BlockingIOError:
                return
            if self._above and "FDSTORE" not in message:
                with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as near:
                    near.sendto(message.encode(), self._above)

    @contextmanager
    def _signals(self, selector: selectors.BaseSelector) -> Iterator[None]:
        """Hand on signals, which are taken in the loop, from now on."""

        def take() -> None:
            for number in near.recv(64):
                self._on_signal(number)

        near, far = socket.socketpair()
        far.setblocking(False)
        former_fd = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
        former = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        selector.register(near, selectors.EVENT_READ, take)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(former_fd)
            near.close()
            far.close()

    def _on_signal(self, number: int) -> None:
        self._is_replacing = number == signal.SIGHUP and not self._is_ending and self._pidfd >= 0
        self._is_ending |= number != signal.SIGHUP
        self._tell(signal.SIGTERM if self._is_replacing else signal.SIGINT)

    def _tell(self, number: int) -> None:
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _raise_limit() -> None:
    """Let as many descriptors be open as we may: a disk takes three or more."""
    with suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run(arguments: Sequence[str], socket_path: str, environment: Mapping[str, str]) -> int:
    """Run the service with these arguments for ``xenbackend``. Raises: ConfigError."""
    try:
        store = Store(Path(f"{socket_path}.keep"))
    except OSError as error:
        raise ConfigError(f"{socket_path}.keep: cannot listen there: {error.strerror or error}") from None
    try:
        return Parent([sys.executable, "-m", "xenbackend", *arguments], store, environment).run()
    finally:
        store.close()


def _spawn(command: Sequence[str], kept: Mapping[str, int], environment: Mapping[str, str]) -> int:
    """Start a process that inherits the kept descriptors, from `FIRST` on; return its number."""
    # Moved out of the way first: each has a place to go to, where another one may lie.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST + len(kept)) for fd in kept.values()]
    try:
        return os.posix_spawn(
            command[0],
            list(command),
            {**environment, "LISTEN_FDS": str(len(kept)), "LISTEN_FDNAMES": ":".join(kept)},
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, FIRST + place) for place, fd in enumerate(high)],
            setsid=True,  # what a terminal sends, and what its session gets of the CPU, is ours
            setsigmask=[],
            setsigdef=_SIGNALS,
        )
    finally:
        for fd in high:
            os.close(fd)
