"""Starts and ends an embedded Xen host: hypervisor, xenstored, the service as its own process, guests with disks.

Must not do a guest's I/O. Everything is in one directory and ends with the machine, whatever happens.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from xenbackend.errors import XenbackendError
from xenbackend.protocol import client
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.rig.guest import Guest
from xenbackend.rig.store import Xenstored
from xenbackend.rig.xen import Xen
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.store import Store
from xenbackend.supervisor.xenstore.toolstack import Attachment, attach, detach, vbd_path

START_TIMEOUT_S = 20.0
_LONGEST = 64  # characters of the directory for temporary files: the whole path of a socket must stay below 108
Observer = Callable[[str, bytes | None], None]  # a path of xenstore, and its new value or None


class GuestDomain:
    """A running guest: its memory, its own connection to xenstore, its blkfronts."""

    def __init__(self, machine: Machine, domid: int, pages: int) -> None:
        self.domid = domid
        self.memory = Guest(machine.directory, domid, pages)
        self.store = Store(machine.xenstored.add_domain_socket(domid))
        self._machine = machine

    def connect(self, path: VbdPath, wishes: Wishes) -> Frontend:
        """Connect the guest's blkfront to its disk. Raises: TimeoutError, BackendMisbehaved, KernelError."""
        frontend = Frontend(self.memory, self.store, path.frontend, wishes)
        frontend.connect()
        return frontend

    def close(self) -> None:
        """Destroy the domain."""
        self.store.close()
        self._machine.xenstored.release_domain(self.domid)
        self.memory.close()


class Machine:
    """An embedded Xen host. Use it as a context manager.

    directory   has its sockets and logs; removed at the end
    store       dom0's connection to xenstore
    service     the process that starts the service, and restarts it if it dies
    """

    def __init__(
        self,
        *,
        observer: Observer | None = None,
        log: Path | None = None,
        program: str = "xenbackend",
        config: Path | None = None,
    ) -> None:
        """Prepare a machine; `observer` is called for every change in xenstore, from another thread.

        `program` is the module that runs as the service, `config` its settings file.
        """
        if len(tempfile.gettempdir()) > _LONGEST:
            raise XenbackendError(
                f"{tempfile.gettempdir()} is too long a path for sockets; set TMPDIR to a shorter one"
            )
        self.directory = Path(tempfile.mkdtemp(prefix="xenbackend-"))
        self.control = str(self.directory / "control.sock")
        self.log = log or self.directory / "service.log"
        self.store: Store
        self.xen = Xen(self.directory)
        self.xenstored = Xenstored(self.directory / "xenstore.sock", observer=observer)
        self.service: subprocess.Popen[bytes] | None = None
        self._program = program
        self._config = ["--config", str(config)] if config else []
        self._undo = ExitStack()
        self._undo.callback(shutil.rmtree, self.directory)

    def __enter__(self) -> Self:
        """Boot. Raises: XenbackendError with the last line of the service's log if the service does not start."""
        try:
            self.xen.start()
            self._undo.callback(self.xen.close)
            self.xenstored.start()
            self._undo.callback(self.xenstored.stop)
            self.store = Store(str(self.directory / "xenstore.sock"))
            self._undo.callback(self.store.close)
            self.start_service()
        except BaseException:
            self.stop_service()
            self._undo.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shut everything down, the service first."""
        try:
            self.stop_service()
        finally:
            self._undo.close()

    @property
    def service_pid(self) -> int:
        """The service's process ID, 0 while none runs. Raises: XenbackendError if it does not answer."""
        return int(self.ask({"verb": "ping"})["data"]["pid"]) if self.service else 0

    def replace_service(self) -> None:
        """Replace the running service by a new one, as the upgrade of a package does."""
        if self.service is not None:
            self.service.send_signal(signal.SIGHUP)

    def start_service(self, *arguments: str) -> None:
        """Start the service, and return when it is ready. Raises: XenbackendError."""
        command = [
            sys.executable, "-m", self._program, "run", "--keep", "--serve", "all", "--log", "json",
            "--store", str(self.directory / "xenstore.sock"),
            "--host", f"xenbackend.rig.host:{self.directory}",
            "--socket", self.control, *self._config, *arguments,
        ]  # fmt: skip
        notify = self.directory / "notify.sock"
        with self.log.open("ab") as log, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(str(notify))
            self.service = subprocess.Popen(  # noqa: S603 - our own program
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": str(notify)},  # as systemd does
                process_group=0,  # so that Ctrl-C reaches only us: the service must end after the guests
            )
            self._wait_until_ready(ready)
        notify.unlink()

    def stop_service(self) -> None:
        """End the service in order, or by force if it does not end."""
        if self.service is None:
            return
        service, self.service = self.service, None
        service.terminate()
        try:
            service.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            service.kill()
            service.wait()

    def create_guest(self, domid: int, pages: int = 16384) -> GuestDomain:
        """Create a running guest with `pages` pages of memory."""
        self.store.write(f"/local/domain/{domid}/name", f"guest-{domid}")
        return GuestDomain(self, domid, pages)

    def attach(self, domid: int, vdev: str, chain: str, *, read_only: bool = False) -> VbdPath:
        """Give a guest a disk. Raises: ChainError, XenbackendError."""
        path = vbd_path(self.store, domid, vdev)
        attach(self.store, Attachment(path, chain, read_only=read_only), self.control)
        return path

    def detach(self, path: VbdPath) -> None:
        """Detach a disk. Raises: XenbackendError."""
        detach(self.store, path)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask the service over its control socket. Raises: XenbackendError."""
        return client.call(self.control, request).as_json()

    def written_ranges(self, vbd: str) -> list[tuple[int, int]]:
        """Return the written ranges that a vbd's `log:` layer has noted: (first sector, count).

        Raises: XenbackendError.
        """
        ranges: list[tuple[int, int]] = []
        arguments: list[str] = []
        while True:
            request = {"verb": "command", "vbd": vbd, "layer": "log", "command": "peek", "arguments": arguments}
            *lines, last = str(self.ask(request)["data"]).splitlines()
            ranges += [(int(first), int(count)) for first, count in (line.split() for line in lines)]
            if last == "end":
                return ranges
            arguments = [last.removeprefix("more ")]

    def _wait_until_ready(self, ready: socket.socket) -> None:
        assert self.service is not None  # noqa: S101 - just started
        pidfd: int = os.pidfd_open(self.service.pid)
        either: list[socket.socket | int] = [ready, pidfd]
        try:
            while True:
                readable, _, _ = select.select(either, [], [], START_TIMEOUT_S)
                if ready in readable and ready.recv(4096).startswith(b"READY=1"):
                    return
                if pidfd in readable or not readable:
                    said = self.log.read_text().strip().splitlines()
                    raise XenbackendError(f"the service did not start: {said[-1] if said else 'it said nothing'}")
        finally:
            os.close(pidfd)
