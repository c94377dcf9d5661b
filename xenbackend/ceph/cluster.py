"""One client of a cluster: its settings, its connection, its address, and what it may order there.

Must not read a file: whoever makes one brings all settings, the key among them.

Every client has an address of its own (`address`), with a number that no other client of its host had. That is what a
lock's owner is called by, and what the cluster refuses once it is on its blocklist.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Mapping

from xenbackend.ceph.library import Libraries, check, load
from xenbackend.errors import DriverError

CONNECT_S = 10  # until a cluster whose monitors do not answer is given up
_FSID = 37  # bytes, with a NUL

# What we want whatever the configuration says. That an image's or pool's own settings beat some of these is seen later
# (`image.Image.settings`).
FORCED = {
    # What librbd answers must be in the cluster: this process may die at any moment.
    "rbd_cache": "false",
    "rbd_cache_policy": "writethrough",
    "rbd_plugins": "",
    "rbd_parent_cache_enabled": "false",
    # An operation that was given up may be done all the same, later: a write never is given up.
    "rados_osd_op_timeout": "0",
    # Orders to the monitors are what opening waits for; they are done again by whoever opens next.
    "rados_mon_op_timeout": "15",
    "client_mount_timeout": str(CONNECT_S),
    # Who breaks a lock keeps its owner out. No other expiry than the cluster's own is taken by every release.
    "rbd_blocklist_on_break_lock": "true",
    "rbd_blocklist_expire_seconds": "0",
    # Guests change pages that are being written: without a copy checksums would be wrong (ceph/ceph#31794).
    "rbd_disable_zero_copy_writes": "true",
    # Where there is nothing to write to and nothing to read.
    "log_to_stderr": "false",
    "err_to_stderr": "false",
    "log_file": "",
    "admin_socket": "",
    "keyring": "/dev/null",
    "mon_dns_srv_name": "",
}


class Cluster:
    """A connected client; `user` without ``client.``."""

    def __init__(self, user: str, settings: Mapping[str, str], cluster: str = "ceph") -> None:
        """Connect. A setting that this release does not know is passed over.

        Raises: DriverError; with ETIMEDOUT where no monitor answers.
        """
        self.library: Libraries = load()
        self.user = user
        self._handle = ctypes.c_void_p()
        rados = self.library.rados
        check(
            rados.rados_create2(ctypes.byref(self._handle), cluster.encode(), f"client.{user}".encode(), 0),
            "make a client of Ceph",
        )
        for name, value in {**settings, **FORCED}.items():
            rados.rados_conf_set(self._handle, name.encode(), value.encode(errors="surrogateescape"))
        result = rados.rados_connect(self._handle)
        if result < 0:
            self.close()
            raise DriverError(_why_not_connected(-result, user), errno=-result)

    @property
    def handle(self) -> ctypes.c_void_p:
        """The `rados_t`."""
        return self._handle

    def fsid(self) -> str:
        """Return what tells the cluster from any other. Raises: DriverError."""
        text = ctypes.create_string_buffer(_FSID)
        check(self.library.rados.rados_cluster_fsid(self._handle, text, _FSID), "ask for the cluster's number")
        return text.value.decode()

    def address(self) -> str:
        """Return what this client is called by as owner of a lock: ``10.0.0.1:0/1234567890``. Raises: DriverError."""
        found = ctypes.c_char_p()
        check(self.library.rados.rados_getaddrs(self._handle, ctypes.byref(found)), "ask for our own address")
        try:
            return plain_address((found.value or b"").decode())
        finally:
            self.library.rados.rados_buffer_free(found)

    def refuse(self, address: str, seconds: float) -> None:
        """Have the cluster refuse all that comes from a client, from now on, for so long.

        What this client asks for afterwards is done by no OSD that does not know of it.

        Raises: DriverError; EACCES, where the key may not.
        """
        order = {"prefix": "osd blocklist", "blocklistop": "add", "addr": address}
        self._command({**order, "expire": float(seconds)})  # written as an integer, 16.2 takes it for malformed
        self.wait_for_map()

    def wait_for_map(self) -> None:
        """Have this client know the cluster as it is now. Raises: DriverError."""
        check(self.library.rados.rados_wait_for_latest_osdmap(self._handle), "wait for the cluster's map")

    def close(self) -> None:
        """Disconnect; nothing of the cluster is in use any more."""
        if self._handle:
            self.library.rados.rados_shutdown(self._handle)
            self._handle = ctypes.c_void_p()

    def _command(self, order: Mapping[str, object]) -> None:
        """Give an order to the monitors. Raises: DriverError, with what they say."""
        text = ctypes.c_char_p(json.dumps(order).encode())
        out, said = ctypes.c_void_p(), ctypes.c_char_p()
        length, said_length = ctypes.c_size_t(), ctypes.c_size_t()
        rados = self.library.rados
        result = rados.rados_mon_command(
            self._handle, ctypes.byref(text), 1, None, 0,
            ctypes.byref(out), ctypes.byref(length), ctypes.byref(said), ctypes.byref(said_length),
        )  # fmt: skip
        sentence = (said.value or b"").decode(errors="replace")
        for each in (out, said):
            rados.rados_buffer_free(each)
        if result < 0:
            why = os.strerror(-result) + (f" ({sentence})" if sentence else "")
            raise DriverError(f"the cluster did not do `{order['prefix']}`: {why}", errno=-result)


def plain_address(text: str) -> str:
    """Return an address without the protocol's version that some releases put before it."""
    return text.removeprefix("any:").removeprefix("v1:").removeprefix("v2:")


def _why_not_connected(code: int, user: str) -> str:
    match code:
        case errno.ETIMEDOUT:
            return f"no monitor of the cluster has answered for {CONNECT_S} s"
        case errno.EACCES | errno.EPERM:
            return f"the cluster does not know client.{user} by this key"
        case errno.ENOENT:
            return f"the configuration has no key for client.{user}, or names no monitor"
    return f"the cluster cannot be connected to: {os.strerror(code)}"
