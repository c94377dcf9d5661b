"""Event channels through `/dev/xen/evtchn`: bind, see which ports fired, let them fire again, notify.

Must not loop or wait. Structures and numbers: linux/include/uapi/xen/evtchn.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress

from xenbackend.errors import KernelError
from xenbackend.kernel import ioctl

PATH = "/dev/xen/evtchn"
PORT = struct.Struct("=I")
INTERDOMAIN = struct.Struct("=II")  # remote_domain, remote_port
DOMID = struct.Struct("=H")
BIND_INTERDOMAIN = ioctl.number("E", 1, INTERDOMAIN.size)
UNBIND = ioctl.number("E", 3, PORT.size)
NOTIFY = ioctl.number("E", 4, PORT.size)
RESET = ioctl.number("E", 5, 0)
RESTRICT_DOMID = ioctl.number("E", 6, DOMID.size)
_READ = 4096  # bytes: the kernel gives a page at most


class Evtchn:
    """Event channels towards one domain; implements `kernel.ports.EventChannels`.

    Raises: KernelError, if the device cannot be opened or restricted.
    """

    def __init__(self, domid: int, path: str = PATH) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise KernelError(f"open {path}", error.errno or 0) from error
        self._domid = domid
        self._ports: dict[int, bytes] = {}  # bound ports, as the device wants to see them
        try:
            self._restrict()
        except KernelError:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the device's descriptor, readable while a port is pending."""
        return self._fd

    def bind(self, remote_port: int) -> int:
        """Bind an inter-domain channel and return the local port. Raises: KernelError."""
        # With an immutable argument, Python returns the argument instead of the port.
        argument = bytearray(INTERDOMAIN.pack(self._domid, remote_port))
        port = ioctl.call(self._fd, BIND_INTERDOMAIN, argument, f"bind port {remote_port} of domain {self._domid}")
        self._ports[port] = PORT.pack(port)
        return port

    def pending(self) -> list[int]:
        """Return the ports that fired, without blocking; they stay masked. Raises: KernelError."""
        try:
            return memoryview(os.read(self._fd, _READ)).cast("I").tolist()
        except BlockingIOError:
            return []
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise KernelError("read event channels", error.errno or 0) from error
        # More fired than the kernel had room for, so that it no longer knows which: any may have.
        ioctl.call(self._fd, RESET, 0, "reset event channels")
        return list(self._ports)

    def unmask(self, port: int) -> None:
        """Let the port fire again; it fires at once if it was notified meanwhile."""
        os.write(self._fd, self._ports[port])

    def notify(self, port: int) -> None:
        """Notify the other side; a peer that has gone is not our error."""
        with suppress(OSError):
            fcntl.ioctl(self._fd, NOTIFY, self._ports[port])

    def unbind(self, port: int) -> None:
        """Close the port. Raises: KernelError."""
        argument = self._ports.pop(port, None)
        if argument is None:
            raise KernelError(f"unbind port {port}, which is not bound", errno.EINVAL)
        ioctl.call(self._fd, UNBIND, argument, f"unbind port {port}")

    def close(self) -> None:
        """Close every port and the device."""
        self._ports.clear()
        os.close(self._fd)

    def _restrict(self) -> None:
        """Give up the right to bind towards any other domain. The kernel has no such restriction for domain 0."""
        if self._domid == 0:
            return
        try:
            ioctl.call(self._fd, RESTRICT_DOMID, DOMID.pack(self._domid), f"restrict events to domain {self._domid}")
        except KernelError as error:
            if error.errno != errno.ENOTTY:  # a kernel older than Linux 4.8
                raise
