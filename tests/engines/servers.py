"""Real NBD servers as processes of a test: nbdkit, qemu-nbd, qemu-storage-daemon.

Must not leave one behind. A server that is started again has the same socket.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import pytest

from tests.until import until

START_S = 10.0
_ACTIVATE = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&"$0"'


def tls_of(kind: str, certificates: Path) -> list[str]:
    """Return the options by which a server requires TLS and a valid client certificate."""
    if kind == "nbdkit":
        return ["--tls=require", f"--tls-certificates={certificates}", "--tls-verify-peer"]
    return ["--object", f"tls-creds-x509,id=t,endpoint=server,verify-peer=yes,dir={certificates}", "--tls-creds", "t"]


class Engine:
    """One server over an image of zeros.

    chain   the layer with its disk
    """

    def __init__(
        self,
        kind: str,
        directory: Path,
        size: int,
        options: Sequence[str] = (),
        more: str = "",
        image: str = "",
        *,
        has_socket_unit: bool = False,
    ) -> None:
        """Prepare a server. `options` come before nbdkit's plug-in or the image, and `more` is added to the chain.

        `image` is what qemu-nbd serves instead of a file of zeros. With `has_socket_unit`, nbdkit gets its socket as
        from a systemd unit: the socket outlives it, and connections wait until it is started again.
        """
        if shutil.which(kind) is None:
            pytest.skip(f"there is no {kind} here")
        self.kind = kind
        self.image = directory / f"{kind}.img"
        with self.image.open("wb") as file:
            file.truncate(size)
        self.socket = directory / f"{kind}.sock"
        self._options = list(options)
        self._more = more
        self._image = image or str(self.image)
        self._listener: socket.socket | None = None
        if has_socket_unit and kind == "nbdkit":
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self.socket))
            self._listener.listen(64)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def chain(self) -> str:
        """The layer with the server's disk, and with the `drain=` that this server needs."""
        export = ",export=disk" if self.kind == "qemu-storage-daemon" else ""
        return f"nbd:unix:{self.socket}{export},drain={'0s' if self.kind == 'nbdkit' else '1s'}{self._more}"

    def start(self) -> None:
        """Start the server, and return when it accepts connections."""
        if self._listener is not None:
            listener = self._listener.fileno()
            self._process = subprocess.Popen(
                ["bash", "-c", _ACTIVATE, str(listener), *self._command()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # an assertion for each death of a client
                pass_fds=[listener],
            )
            return
        self.socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL)
        until(self._listens_or_has_ended, f"{self.kind} does not listen", limit_s=START_S)
        assert self.is_alive(), f"{self.kind} has ended"

    def is_alive(self) -> bool:
        """Whether the server is running."""
        return self._process is not None and self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send the server a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the server."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._listener is not None:
            self._listener.close()

    def _listens_or_has_ended(self) -> bool:
        """Whether the server accepts connections, which it may do later than its socket exists, or has ended."""
        if not self.is_alive():
            return True
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def _command(self) -> list[str]:
        match self.kind:
            case "nbdkit":
                plugin = (
                    [] if any(each in ("memory", "sh", "eval") for each in self._options) else ["file", str(self.image)]
                )
                # With several threads the end of a connection proves nothing, and `chain` could not say drain=0s.
                where = [] if self._listener is not None else ["-U", str(self.socket)]
                return ["nbdkit", "-f", "--threads=1", *where, *self._options, *plugin]
            case "qemu-nbd":
                return [
                    "qemu-nbd",
                    "-f",
                    "raw",
                    "-t",
                    "-e",
                    "8",
                    "-k",
                    str(self.socket),
                    "--discard=unmap",
                    *self._options,
                    self._image,
                ]
            case _:
                return [
                    "qemu-storage-daemon",
                    "--blockdev", f"driver=file,node-name=f,filename={self.image},discard=unmap",
                    "--nbd-server", f"addr.type=unix,addr.path={self.socket}",
                    "--export", "type=nbd,id=e,node-name=f,name=disk,writable=on",
                ]  # fmt: skip
