"""One client of a cluster: its settings, its connection, its address, and its commands to the monitors.

Must not read a file: the caller passes all settings, including the key.

Every client has its own address (`address`), with a number that no earlier client of its host had. It identifies the
owner of a lock, and the cluster refuses a client whose address is on its blocklist.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Mapping

from xenbackend.ceph.library import Libraries, check, load
from xenbackend.errors import DriverError

CONNECT_S = 10  # time limit for connecting if the monitors do not answer
_FSID = 37  # bytes, with a NUL

# Settings that override the configuration. Settings of the image or its pool override some of these; that is checked
# later (`image.Image.settings`).
FORCED = {
    # A write that librbd answers must be in the cluster: this process may die at any moment.
    "rbd_cache": "false",
    "rbd_cache_policy": "writethrough",
    "rbd_plugins": "",
    "rbd_parent_cache_enabled": "false",
    # An operation that is given up may still be carried out later, so writes are never given up.
    "rados_osd_op_timeout": "0",
    # Opening waits for commands to the monitors; the next attempt to open repeats them.
    "rados_mon_op_timeout": "15",
    "client_mount_timeout": str(CONNECT_S),
    # Breaking a lock puts its owner on the blocklist. Not every release accepts another expiry than the cluster's own.
    "rbd_blocklist_on_break_lock": "true",
    "rbd_blocklist_expire_seconds": "0",
    # Guests change pages while they are written: without a copy, checksums would be wrong (ceph/ceph#31794).
    "rbd_disable_zero_copy_writes": "true",
    # A worker has no files to read or to write.
    "log_to_stderr": "false",
    "err_to_stderr": "false",
    "log_file": "",
    "admin_socket": "",
    "keyring": "/dev/null",
    "mon_dns_srv_name": "",
}


class Cluster:
    """A connected client; `user` is its name without ``client.``."""

    def __init__(self, user: str, settings: Mapping[str, str], cluster: str = "ceph") -> None:
        """Connect. Settings that this release of Ceph does not know are ignored.

        Raises: DriverError; with ETIMEDOUT if no monitor answers.
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
        """The client's `rados_t`."""
        return self._handle

    def fsid(self) -> str:
        """Return the cluster's unique ID. Raises: DriverError."""
        text = ctypes.create_string_buffer(_FSID)
        check(self.library.rados.rados_cluster_fsid(self._handle, text, _FSID), "ask for the cluster's number")
        return text.value.decode()

    def address(self) -> str:
        """Return the address that identifies this client as a lock's owner: ``10.0.0.1:0/1234567890``.

        Raises: DriverError.
        """
        found = ctypes.c_char_p()
        check(self.library.rados.rados_getaddrs(self._handle, ctypes.byref(found)), "ask for our own address")
        try:
            return plain_address((found.value or b"").decode())
        finally:
            self.library.rados.rados_buffer_free(found)

    def refuse(self, address: str, seconds: float) -> None:
        """Put the client with this address on the cluster's blocklist for `seconds`, and wait for the new OSD map.

        Later requests of our own client carry that map, so every OSD that handles one knows of the blocklist entry.

        Raises: DriverError; EACCES if the key does not allow it.
        """
        order = {"prefix": "osd blocklist", "blocklistop": "add", "addr": address}
        self._command({**order, "expire": float(seconds)})  # Ceph 16.2 rejects an integer as malformed
        self.wait_for_map()

    def wait_for_map(self) -> None:
        """Wait until this client has the cluster's latest OSD map. Raises: DriverError."""
        check(self.library.rados.rados_wait_for_latest_osdmap(self._handle), "wait for the cluster's map")

    def close(self) -> None:
        """Disconnect. Pools and images of the cluster must have been closed."""
        if self._handle:
            self.library.rados.rados_shutdown(self._handle)
            self._handle = ctypes.c_void_p()

    def _command(self, order: Mapping[str, object]) -> None:
        """Send a command to the monitors. Raises: DriverError, with their message."""
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
    """Return an address without the protocol version that some releases put in front of it."""
    return text.removeprefix("any:").removeprefix("v1:").removeprefix("v2:")


def _why_not_connected(code: int, user: str) -> str:
    match code:
        case errno.ETIMEDOUT:
            return f"no monitor of the cluster has answered for {CONNECT_S} s"
        case errno.EACCES | errno.EPERM:
            return f"the cluster does not know client.{user} with this key"
        case errno.ENOENT:
            return f"the configuration has no key for client.{user}, or names no monitor"
    return f"the cluster cannot be connected to: {os.strerror(code)}"
