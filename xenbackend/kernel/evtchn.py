"""Event channels through `/dev/xen/evtchn`: bind, find out which ports fired, unmask them, notify.

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
_READ = 4096  # bytes: the kernel returns at most a page


def open_device(domid: int, path: str = PATH) -> int:
    """Return a descriptor of the event channel device that can only bind channels to one domain.

    Raises: KernelError if the device cannot be opened or restricted.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KernelError(f"open {path}", error.errno or 0) from error
    try:
        _restrict(fd, domid)
    except KernelError:
        os.close(fd)
        raise
    return fd


class Evtchn:
    """Event channels towards one domain; implements `kernel.ports.EventChannels`."""

    def __init__(self, domid: int, fd: int) -> None:
        """Use the device behind `fd`, and close it in the end. Other copies of `fd` may be open, but not in use."""
        self._fd = fd
        self._domid = domid
        self._ports: dict[int, bytes] = {}  # bound ports, as the device wants to see them

    def fileno(self) -> int:
        """Return the device's descriptor, readable while a port is pending."""
        return self._fd

    def bind(self, remote_port: int) -> int:
        """Bind an inter-domain channel and return the local port. Raises: KernelError."""
        # With an immutable argument, fcntl.ioctl would return the argument instead of the port.
        argument = bytearray(INTERDOMAIN.pack(self._domid, remote_port))
        port = ioctl.call(self._fd, BIND_INTERDOMAIN, argument, f"bind port {remote_port} of domain {self._domid}")
        self._ports[port] = PORT.pack(port)
        return port

    def pending(self) -> list[int]:
        """Return the ports that fired, without blocking; they stay masked. Raises: KernelError."""
        try:
            fired = memoryview(os.read(self._fd, _READ)).cast("I").tolist()
            # A port that was unbound after it had fired, perhaps by an earlier user of the device, is still reported.
            return [port for port in fired if port in self._ports]
        except BlockingIOError:
            return []
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise KernelError("read event channels", error.errno or 0) from error
        # More events fired than the kernel had room for. It no longer knows which, so any port may have fired.
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
        """Close every port and the descriptor."""
        for port in list(self._ports):
            with suppress(KernelError):  # the domain is gone, and its ports with it
                self.unbind(port)
        os.close(self._fd)


def _restrict(fd: int, domid: int) -> None:
    """Give up the right to bind channels to any other domain. The kernel has no such restriction for domain 0."""
    if domid == 0:
        return
    try:
        ioctl.call(fd, RESTRICT_DOMID, DOMID.pack(domid), f"restrict events to domain {domid}")
    except KernelError as error:
        if error.errno != errno.ENOTTY:  # a kernel older than Linux 4.8
            raise
