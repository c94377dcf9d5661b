"""Runs the service in place of systemd: restarts it when it dies, and keeps its descriptors meanwhile.

Must not do anything that could fail: it is all that is left when everything else has died.

To the service it looks like systemd: ``NOTIFY_SOCKET``, ``FDSTORE``, ``LISTEN_FDS``. Signals:

    SIGTERM, SIGINT   the service finishes what is in flight and closes every disk, and both end
    SIGHUP            the service is replaced by a new one, which takes over every disk in service
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from xenbackend.errors import ConfigError
from xenbackend.loop.reactor import Reactor
from xenbackend.loop.signals import taking_signals
from xenbackend.protocol import datagrams
from xenbackend.supervisor.service.keeper import FIRST, MAX_NAMES, length_of
from xenbackend.supervisor.service.listening import alone_at, check_free, identity_of
from xenbackend.supervisor.service.notify import address_of

MAX_KEPT = 4096
_OTHERS = 128  # descriptors of a service, or of ours, that have nothing to do with a disk
RESTART_S = 1.0  # before a service is restarted that died sooner than this; doubled each time
MAX_RESTART_S = 60.0
_MISTAKE = 2  # exit status for a mistake of the operator, which no restart mends
_MESSAGE = 4096  # bytes
_STDERR = 2


class Store:
    """The kept descriptors by name, filled by datagrams on `socket`."""

    def __init__(self, path: Path) -> None:
        """Listen at `path`. Raises: OSError; XenbackendError, also if another process does."""
        self.fds: dict[str, int] = {}
        self.room = MAX_KEPT  # how many are kept at most; `make_room` says how many can be passed on
        self.path = path
        with alone_at(path):
            check_free(path, socket.SOCK_DGRAM, "`xenbackend run --keep`")
            path.unlink(missing_ok=True)
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            try:
                self.socket.bind(str(path))
                path.chmod(0o600)
            except OSError:
                self.socket.close()
                raise
            self._place = identity_of(path)

    def make_room(self) -> None:
        """Raise the limit of open descriptors as far as we need and may, and keep no more than a service can take over.

        A service has the same limit. All that is kept is open in it, too, and up to half as much for the same disks.
        """
        wanted = MAX_KEPT * 3 // 2 + _OTHERS
        with suppress(OSError, ValueError):
            most = int(Path("/proc/sys/fs/nr_open").read_text(encoding="ascii"))
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            for limit in (max(hard, min(wanted, most)), hard):  # only a privileged process may raise the hard one
                with suppress(OSError, ValueError):
                    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
                    break
        left = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHERS
        self.room = max(0, min(MAX_KEPT, left * 2 // 3))

    def take(self) -> str:
        """Take one message, do what it asks for, and return it, so that it can be passed on.

        Raises: BlockingIOError while there is none.
        """
        data, fds, _ = datagrams.receive(self.socket, _MESSAGE, 8)
        message = data.decode(errors="replace")
        fields = dict(line.partition("=")[::2] for line in message.splitlines())
        name = fields.get("FDNAME", "")
        if fields.get("FDSTOREREMOVE") == "1" or fds:
            self._forget(name)
        has_room = len(self.fds) < self.room and length_of([*self.fds, name]) <= MAX_NAMES
        if fields.get("FDSTORE") == "1" and fds and has_room:
            self.fds[name] = fds.pop()
        for fd in fds:
            os.close(fd)
        return message

    def close(self) -> None:
        """Close everything."""
        for name in list(self.fds):
            self._forget(name)
        if identity_of(self.path) == self._place:  # else another parent has taken the path
            self.path.unlink(missing_ok=True)  # before the close: from then on, another parent may take it
        self.socket.close()

    def _forget(self, name: str) -> None:
        fd = self.fds.pop(name, -1)
        if fd >= 0:
            os.close(fd)


class Parent:
    """Runs one service after the other."""

    def __init__(self, command: Sequence[str], store: Store, environment: Mapping[str, str], loop: Reactor) -> None:
        """Run `command`; `environment` is our own, and its ``NOTIFY_SOCKET`` is told what the service says."""
        self._command = command
        self._store = store
        self._environment = {**environment, "NOTIFY_SOCKET": str(store.path)}
        self._environment.pop("LISTEN_PID", None)  # our number, if systemd gave us descriptors; the service has another
        self._above = address_of(environment)
        self._loop = loop
        self._start_soon = loop.timer(self._start)
        self._pid = 0  # of the service that runs
        self._pidfd = -1
        self._began = 0.0
        self._rest_s = RESTART_S
        self._status = 0
        self._is_ending = self._is_replacing = False
        self._said: set[int] = set()  # errnos of starts that failed since the last one that did not

    def run(self) -> int:
        """Run until the service ends by itself, or as we told it, and return its exit status."""
        self._store.make_room()
        self._environment["FDSTORE"] = str(self._store.room)
        self._loop.add(self._store.socket.fileno(), self._listen)
        with taking_signals(self._loop, _SIGNALS, self._on_signal):
            self._start()
            self._loop.run()
        self._loop.remove(self._store.socket.fileno())
        return self._status

    def _start(self) -> None:
        self._began = self._loop.now()
        try:
            self._pid, self._pidfd = _spawn(self._command, self._store.fds, self._environment)
        except OSError as problem:  # no process or descriptor is available now: try later
            self._complain(problem)
            self._follow(1)
        else:
            self._said.clear()
            self._loop.add(self._pidfd, self._reap)

    def _complain(self, problem: OSError) -> None:
        """Say why no service could be started, once for each kind of failure."""
        if problem.errno not in self._said:
            self._said.add(problem.errno or 0)
            line = f"xenbackend: no service can be started with the {len(self._store.fds)} descriptors that are kept"
            with suppress(OSError):
                os.write(_STDERR, f"{line}: {problem.strerror}; it is tried again\n".encode())

    def _reap(self) -> None:
        self._listen()  # its last messages count, before it is started again
        self._loop.remove(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._follow(os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]))

    def _follow(self, status: int) -> None:
        """Start another service, now or later, after one that ended with this status, or stop."""
        self._status = status
        is_over = self._is_ending or status in (0, _MISTAKE) or not self._store.path.exists()
        if is_over and not self._is_replacing:
            self._loop.stop()
            return
        self._is_replacing = False
        now = self._loop.now()
        if not status or now - self._began >= RESTART_S:
            self._rest_s = RESTART_S
            self._start_soon.set(now)
        else:
            self._start_soon.set(now + self._rest_s)
            self._rest_s = min(2 * self._rest_s, MAX_RESTART_S)

    def _listen(self) -> None:
        """Handle the service's messages."""
        with suppress(BlockingIOError):
            while True:
                message = self._store.take()
                if self._above and "FDSTORE" not in message:
                    _tell(self._above, message)

    def _on_signal(self, number: int) -> None:
        is_running = self._pidfd >= 0
        self._is_replacing = number == signal.SIGHUP and not self._is_ending and is_running
        self._is_ending |= number != signal.SIGHUP
        if is_running:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGTERM if self._is_replacing else signal.SIGINT)
        elif self._is_ending:
            self._loop.stop()


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _tell(address: str, message: str) -> None:
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as near:
        near.sendto(message.encode(), address)


def _fill_streams() -> None:
    """Open what we were started without of stdin, stdout and stderr: nothing that is kept may have their numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < FIRST:
        os.set_inheritable(fd, True)
    os.close(fd)


def run(arguments: Sequence[str], socket_path: str, environment: Mapping[str, str]) -> int:
    """Run the service with these arguments for ``xenbackend``. Raises: XenbackendError."""
    try:
        _fill_streams()
        store = Store(Path(f"{socket_path}.keep"))
    except OSError as error:
        raise ConfigError(f"{socket_path}.keep: cannot listen there: {error.strerror or error}") from None
    with closing(store), closing(Reactor()) as loop:
        return Parent([sys.executable, "-m", "xenbackend", *arguments], store, environment, loop).run()


def _spawn(command: Sequence[str], kept: Mapping[str, int], environment: Mapping[str, str]) -> tuple[int, int]:
    """Start a process that inherits the kept descriptors, from `FIRST` on; return its number and its pidfd.

    In the order of their numbers, each gets a number that is not larger than its own. So no descriptor takes the place
    of one that comes later, and no copies are needed. Raises: OSError; then no process is left.
    """
    ordered = sorted(kept.items(), key=lambda item: item[1])
    names = ":".join(name for name, _ in ordered)
    pid = os.posix_spawn(
        command[0],
        list(command),
        {**environment, "LISTEN_FDS": str(len(kept)), "LISTEN_FDNAMES": names},
        file_actions=[(os.POSIX_SPAWN_DUP2, fd, FIRST + place) for place, (_, fd) in enumerate(ordered)],
        setsid=True,  # a terminal's signals, and its session's share of the CPU, are for us
        setsigmask=[],
        setsigdef=_SIGNALS,
    )
    try:
        return pid, os.pidfd_open(pid)
    except OSError:  # we would not hear of its end, and would start another service beside it
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
