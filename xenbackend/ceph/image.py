"""An open image of a pool: its properties, the settings in effect for it, and the owner of its lock.

Must not do a guest's I/O (`requests` does), nor decide what is safe.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from dataclasses import dataclass

from xenbackend.ceph.bounded import Attempt
from xenbackend.ceph.cluster import Cluster, plain_address
from xenbackend.ceph.library import OnExtent, check
from xenbackend.errors import DriverError

EXCLUSIVE = 0  # rbd/librbd.h, RBD_LOCK_MODE_EXCLUSIVE
HAS_EXCLUSIVE_LOCK = 1 << 2  # rbd/features.h, RBD_FEATURE_EXCLUSIVE_LOCK
BLOCKLISTED = errno.ESHUTDOWN  # rbd/librbd.h: the error that a client on the blocklist gets
_EVENTFD = 2  # rbd/librbd.h, EVENT_TYPE_EVENTFD
_ID_BYTES = 256
_OWNERS_BYTES = 4096
_MARK_BYTES = 4096
MARK = "xenbackend.served"  # a key of the image's metadata, which `rbd image-meta list` shows
_MOST = 1024  # settings or watchers; a release has about 80 settings, an image few watchers
_LOCK = b"rbd_lock"  # librbd's own lock on the image's header; include/rbd_types.h, RBD_LOCK_NAME
_COOKIE = "auto "  # prefix for clients that watch the image; librbd/managed_lock/Utils.cc, WATCHER_LOCK_COOKIE_PREFIX


class _Setting(ctypes.Structure):
    """rbd_config_option_t."""

    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_char_p), ("source", ctypes.c_int))


class _Watcher(ctypes.Structure):
    """rbd_image_watcher_t."""

    _fields_ = (("address", ctypes.c_char_p), ("id", ctypes.c_int64), ("cookie", ctypes.c_uint64))


class _Mirrored(ctypes.Structure):
    """rbd_mirror_image_info_t."""

    _fields_ = (("id", ctypes.c_char_p), ("state", ctypes.c_int), ("is_primary", ctypes.c_bool))


_NOT_MIRRORED = 2  # rbd/librbd.h, RBD_MIRROR_IMAGE_DISABLED
SOURCES = {0: "ceph.conf or its default", 1: "the pool", 2: "the image"}  # rbd/librbd.h, rbd_config_source_t


@dataclass(frozen=True, slots=True)
class Owner:
    """The owner of an image's lock."""

    client: str  # such as client.4123
    cookie: str
    address: str  # as `Cluster.address` returns it

    def __str__(self) -> str:
        return f"{self.client} at {self.address}"

    @property
    def is_client(self) -> bool:
        """Whether the owner is a client that uses the image; otherwise the lock was made by `rbd lock add`."""
        return self.cookie.startswith(_COOKIE)


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting in effect for an image, and where it comes from."""

    value: str
    source: str


class Pool:
    """A pool and a namespace in it, as this client sees them."""

    def __init__(self, cluster: Cluster, name: str, namespace: str = "") -> None:
        """Look the pool up. Raises: DriverError; ENOENT if there is no such pool."""
        self._rados, self._slow = cluster.library.rados, cluster.library.slow
        self.handle = ctypes.c_void_p()
        result = self._rados.rados_ioctx_create(cluster.handle, _bytes(name), ctypes.byref(self.handle))
        if result == -errno.ENOENT:
            raise DriverError(f"the cluster has no pool {name!r}", errno=errno.ENOENT)
        check(result, f"look at the pool {name!r}")
        self._rados.rados_ioctx_set_namespace(self.handle, _bytes(namespace))

    def number(self) -> int:
        """Return the pool's ID in its cluster, which no other pool has, not even an earlier one of the same name."""
        return int(self._rados.rados_ioctx_get_id(self.handle))

    def create(self, name: str, size: int) -> None:
        """Create an image of `size` zero bytes, by the cluster's settings. Raises: DriverError; EEXIST if it exists."""
        options = ctypes.c_void_p()
        self._slow.rbd_image_options_create(ctypes.byref(options))
        try:
            check(self._slow.rbd_create4(self.handle, _bytes(name), size, options), f"make the image {name!r}")
        finally:
            self._slow.rbd_image_options_destroy(options)

    def rename(self, former: str, name: str) -> None:
        """Rename an image. Raises: DriverError; EEXIST if `name` exists."""
        check(self._slow.rbd_rename(self.handle, _bytes(former), _bytes(name)), f"rename the image {former!r}")

    def remove(self, name: str) -> None:
        """Remove an image. Raises: DriverError; EBUSY if it is open, or if its last client has just died."""
        check(self._slow.rbd_remove(self.handle, _bytes(name)), f"remove the image {name!r}")

    def close(self) -> None:
        """Release the pool. Its images must have been closed."""
        if self.handle:
            self._rados.rados_ioctx_destroy(self.handle)
            self.handle = ctypes.c_void_p()


class Image:
    """An open image, or one of its snapshots; `handle` is its `rbd_image_t`."""

    def __init__(self, cluster: Cluster, pool: Pool, name: str, snapshot: str = "", *, read_only: bool) -> None:
        """Open the image or snapshot. Raises: DriverError; ENOENT if there is none of that name."""
        self._rados, self._slow = cluster.library.rados, cluster.library.slow
        self._pool = pool
        self._in_use = threading.Lock()  # another thread may ask for the size while it is closed
        self.handle = ctypes.c_void_p()
        opens = self._slow.rbd_open_read_only if read_only or snapshot else self._slow.rbd_open
        snap = _bytes(snapshot) if snapshot else None
        result = opens(pool.handle, _bytes(name), ctypes.byref(self.handle), snap)
        if result < 0:
            self.handle = ctypes.c_void_p()
            raise DriverError(_why_not_opened(-result, name, snapshot, cluster.user), errno=-result)

    def size(self) -> int:
        """Return the present size in bytes. It may have to ask the cluster. Any thread may call it.

        Raises: DriverError; EBADF if the image is closed.
        """
        size = ctypes.c_uint64()
        with self._in_use:
            result = self._slow.rbd_get_size(self.handle, ctypes.byref(size)) if self.handle else -errno.EBADF
        check(result, "ask for the image's size")
        return size.value

    def id(self) -> str:
        """Return the image's ID in its pool, which does not change with its name. Raises: DriverError."""
        text = ctypes.create_string_buffer(_ID_BYTES)
        check(self._slow.rbd_get_id(self.handle, text, _ID_BYTES), "ask for the image's id")
        return text.value.decode()

    def snapshot_id(self, name: str) -> int:
        """Return a snapshot's ID, which no other one has, not even an earlier one of its name. Raises: DriverError."""
        found = ctypes.c_uint64()
        check(self._slow.rbd_snap_get_id(self.handle, _bytes(name), ctypes.byref(found)), "ask for the snapshot's id")
        return found.value

    def features(self) -> int:
        """Return the image's features, as bits of rbd/features.h. Raises: DriverError."""
        found = ctypes.c_uint64()
        check(self._slow.rbd_get_features(self.handle, ctypes.byref(found)), "ask for the image's features")
        return found.value

    def is_mirror(self) -> bool:
        """Return whether it is a non-primary mirror, to which nobody may write here. Raises: DriverError."""
        found = _Mirrored()
        result = self._slow.rbd_mirror_image_get_info(self.handle, ctypes.byref(found), ctypes.sizeof(found))
        check(result, "ask whether the image is mirrored")
        try:
            return found.state != _NOT_MIRRORED and not found.is_primary
        finally:
            self._slow.rbd_mirror_image_get_info_cleanup(ctypes.byref(found))

    def settings(self) -> dict[str, Setting]:
        """Return the settings in effect by name, whatever the client has asked for. Raises: DriverError."""
        found, count = (_Setting * _MOST)(), ctypes.c_int(_MOST)
        result = self._slow.rbd_config_image_list(self.handle, found, ctypes.byref(count))
        check(result, "ask which settings hold for the image")
        try:
            return {
                each.name.decode(): Setting(each.value.decode(errors="replace"), SOURCES.get(each.source, "elsewhere"))
                for each in found[: count.value]
            }
        finally:
            self._slow.rbd_config_image_list_cleanup(found, count.value)

    def owners(self) -> list[Owner]:
        """Return the owners of its lock: one, or none. Raises: DriverError."""
        texts = [ctypes.create_string_buffer(_OWNERS_BYTES) for _ in range(4)]  # tag, clients, cookies, addresses
        sizes = [ctypes.c_size_t(_OWNERS_BYTES) for _ in texts]
        exclusive = ctypes.c_int()
        pairs = [each for text, size in zip(texts, sizes, strict=True) for each in (text, ctypes.byref(size))]
        result = self._rados.rados_list_lockers(
            self._pool.handle, self._header(), _LOCK, ctypes.byref(exclusive), *pairs
        )
        if result == -errno.ENOENT:
            return []
        count = check(result, "ask who has the image's lock")
        columns = [text.raw[: size.value].split(b"\0")[:count] for text, size in zip(texts, sizes, strict=True)][1:]
        return [
            Owner(client, cookie, plain_address(address))
            for client, cookie, address in ([each.decode() for each in row] for row in zip(*columns, strict=True))
        ]

    def watchers(self) -> list[str]:
        """Return the addresses of the live clients that have it open for writing. Raises: DriverError."""
        found, count = (_Watcher * _MOST)(), ctypes.c_size_t(_MOST)
        check(self._slow.rbd_watchers_list(self.handle, found, ctypes.byref(count)), "ask who has the image open")
        try:
            return [plain_address(each.address.decode()) for each in found[: count.value]]
        finally:
            self._slow.rbd_watchers_list_cleanup(found, count.value)

    def acquire(self) -> None:
        """Take the lock, and do not give it up when others ask. This may take 30 s if a dead client has it.

        Raises: DriverError; EROFS if another client keeps it.
        """
        check(self._slow.rbd_lock_acquire(self.handle, EXCLUSIVE), "take the image's lock")

    def break_lock(self, owner: Owner) -> None:
        """Break the lock of a client that is on the blocklist already (`Cluster.refuse`). Raises: DriverError."""
        result = self._rados.rados_break_lock(
            self._pool.handle, self._header(), _LOCK, owner.client.encode(), owner.cookie.encode()
        )
        if result != -errno.ENOENT:  # ENOENT: it has been released meanwhile
            check(result, f"take the lock from {owner}")

    def mark(self) -> str:
        """Return the disk that was last served from it (see `set_mark`), empty if none. Raises: DriverError."""
        text, room = ctypes.create_string_buffer(_MARK_BYTES), ctypes.c_size_t(_MARK_BYTES)
        result = self._slow.rbd_metadata_get(self.handle, MARK.encode(), text, ctypes.byref(room))
        if result == -errno.ENOENT:
            return ""
        check(result, "ask which disk has served the image")
        return text.value.decode(errors="replace")

    def set_mark(self, disk: str) -> None:
        """Write which disk is served from it; the caller must own the lock. Raises: DriverError."""
        check(self._slow.rbd_metadata_set(self.handle, MARK.encode(), disk.encode()), "mark the image as served")

    def snapshot(self, name: str) -> None:
        """Make a snapshot; any thread may call it. Raises: DriverError; EEXIST; EBADF if the image is closed."""
        with self._in_use:
            result = self._slow.rbd_snap_create(self.handle, _bytes(name)) if self.handle else -errno.EBADF
        check(result, f"make the snapshot {name!r}")

    def diff(self, since: str, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """Return the extents of a range that have changed since a snapshot, or since the image was made if it is empty.

        An extent is (offset in bytes, length in bytes, whether it has data); one without data reads as zeros. Data of
        the image's parent count as its own.

        Raises: DriverError; ENOENT if there is no such snapshot, EBADF if the image is closed.
        """
        found: list[tuple[int, int, bool]] = []
        is_left = threading.Event()

        def take(start: int, size: int, exists: int, _nothing: object) -> int:
            if is_left.is_set():
                return -errno.EINTR
            found.append((start, size, bool(exists)))
            return 0

        callback, snapshot = OnExtent(take), _bytes(since) if since else None

        def ask() -> int:
            with self._in_use:
                if not self.handle:
                    return -errno.EBADF
                result = self._slow.rbd_diff_iterate2(self.handle, snapshot, offset, length, 1, 0, callback, None)
            return int(result)

        try:
            # Not in the main thread: ctypes would swallow a KeyboardInterrupt in `take`, and an extent would be lost.
            result = Attempt(None, "").run(ask)
        except BaseException:
            is_left.set()
            raise
        check(result, f"ask what has changed since {since or 'it was made'}")
        return found

    def notify(self, fd: int) -> None:
        """Make librbd write to an eventfd when requests are done. Raises: DriverError."""
        check(self._slow.rbd_set_image_notification(self.handle, fd, _EVENTFD), "have answers told by an eventfd")

    def _header(self) -> bytes:
        return f"rbd_header.{self.id()}".encode()

    def close(self) -> None:
        """Close the image and release its lock; nothing may be in flight. May wait for the cluster.

        Raises: DriverError.
        """
        with self._in_use:
            handle, self.handle = self.handle, ctypes.c_void_p()
        if handle:
            check(self._slow.rbd_close(handle), "close the image")


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _why_not_opened(code: int, name: str, snapshot: str, user: str) -> str:
    what = f"the snapshot {snapshot!r} of {name!r}" if snapshot else f"{name!r}"
    match code:
        case errno.ENOENT if snapshot:
            return f"there is no image {name!r} with a snapshot {snapshot!r} in the pool"
        case errno.ENOENT:
            return f"there is no image {name!r} in the pool"
        case errno.EPERM | errno.EACCES:
            return f"the key of client.{user} may not open {what}; it needs `profile rbd` for monitors and for the pool"
        case errno.ESHUTDOWN:
            return "the cluster refuses this client: it is on its blocklist"
        case errno.ENOSYS:
            return f"{what} requires a plug-in of librbd that this host does not have; see its setting rbd_plugins"
    return f"{what} cannot be opened: {os.strerror(code)}"
