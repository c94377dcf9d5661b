"""librados and librbd, loaded by ctypes when a process first needs them: signatures, and results as exceptions.

Must not be loaded in the process from which workers are forked: every worker would have the libraries. Must not let
their threads call Python code: the only callback that is ever passed to them is that of `rbd_diff_iterate2`, which is
called in the calling thread (librbd/api/DiffIterate.cc).

librbd has two handles. Calls by `quick` keep the interpreter's lock, which saves two thread switches for calls that
cannot sleep. Calls by `slow` release it, so that other threads run meanwhile.

Source: rados/librados.h and rbd/librbd.h of Ceph 16.2.15; the interfaces have been stable since 14 (Nautilus).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Mapping
from typing import Any

from xenbackend.errors import DriverError

RADOS, RBD = "librados.so.2", "librbd.so.1"

_handle, _text, _int = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
_u64, _i64, _size = ctypes.c_uint64, ctypes.c_int64, ctypes.c_size_t

OnExtent = ctypes.CFUNCTYPE(_int, _u64, _size, _int, _handle)  # offset, bytes, whether there are data, unused
_RADOS: dict[str, tuple[Any, ...]] = {
    "rados_create2": (_handle, _text, _text, _u64),
    "rados_conf_set": (_handle, _text, _text),
    "rados_connect": (_handle,),
    "rados_shutdown": (_handle,),
    "rados_cluster_fsid": (_handle, _text, _size),
    "rados_getaddrs": (_handle, _handle),
    "rados_wait_for_latest_osdmap": (_handle,),
    "rados_mon_command": (_handle, _handle, _size, _text, _size, _handle, _handle, _handle, _handle),
    "rados_buffer_free": (_handle,),
    "rados_ioctx_create": (_handle, _text, _handle),
    "rados_ioctx_set_namespace": (_handle, _text),
    "rados_ioctx_get_id": (_handle,),
    "rados_ioctx_destroy": (_handle,),
    "rados_list_lockers": (_handle, _text, _text, *9 * (_handle,)),
    "rados_break_lock": (_handle, _text, _text, _text, _text),
}
_RBD: dict[str, tuple[Any, ...]] = {
    "rbd_open": (_handle, _text, _handle, _text),
    "rbd_open_read_only": (_handle, _text, _handle, _text),
    "rbd_close": (_handle,),
    "rbd_get_size": (_handle, _handle),
    "rbd_get_id": (_handle, _text, _size),
    "rbd_get_features": (_handle, _handle),
    "rbd_snap_get_id": (_handle, _text, _handle),
    "rbd_config_image_list": (_handle, _handle, _handle),
    "rbd_config_image_list_cleanup": (_handle, _int),
    "rbd_lock_acquire": (_handle, _int),
    "rbd_watchers_list": (_handle, _handle, _handle),
    "rbd_watchers_list_cleanup": (_handle, _size),
    "rbd_metadata_get": (_handle, _text, _text, _handle),
    "rbd_metadata_set": (_handle, _text, _text),
    "rbd_mirror_image_get_info": (_handle, _handle, _size),
    "rbd_mirror_image_get_info_cleanup": (_handle,),
    "rbd_set_image_notification": (_handle, _int, _int),
    "rbd_image_options_create": (_handle,),
    "rbd_image_options_destroy": (_handle,),
    "rbd_create4": (_handle, _text, _u64, _handle),
    "rbd_rename": (_handle, _text, _text),
    "rbd_remove": (_handle, _text),
    "rbd_snap_create": (_handle, _text),
    "rbd_diff_iterate2": (_handle, _text, _u64, _u64, ctypes.c_uint8, ctypes.c_uint8, OnExtent, _handle),
}
_QUICK: dict[str, tuple[Any, ...]] = {
    "rbd_aio_create_completion": (_handle, _handle, _handle),
    "rbd_aio_get_return_value": (_handle,),
    "rbd_aio_get_arg": (_handle,),
    "rbd_aio_release": (_handle,),
    "rbd_poll_io_events": (_handle, _handle, _int),
    "rbd_aio_read": (_handle, _u64, _size, _handle, _handle),
    "rbd_aio_write": (_handle, _u64, _size, _handle, _handle),
    "rbd_aio_discard": (_handle, _u64, _u64, _handle),
    "rbd_aio_flush": (_handle, _handle),
}
_RESULTS: dict[str, Any] = {
    "rados_shutdown": None,
    "rados_buffer_free": None,
    "rados_ioctx_set_namespace": None,
    "rados_ioctx_get_id": _i64,
    "rados_list_lockers": ctypes.c_ssize_t,
    "rados_ioctx_destroy": None,
    "rbd_config_image_list_cleanup": None,
    "rbd_image_options_create": None,
    "rbd_image_options_destroy": None,
    "rbd_watchers_list_cleanup": None,
    "rbd_mirror_image_get_info_cleanup": None,
    "rbd_aio_get_return_value": ctypes.c_ssize_t,
    "rbd_aio_get_arg": _handle,
    "rbd_aio_release": None,
}


class Libraries:
    """Both libraries: librados as `rados`, librbd as `slow` and `quick`, with the C functions as attributes."""

    def __init__(self) -> None:
        """Load them. Raises: OSError if one is missing, AttributeError if one lacks a function."""
        self.rados: Any = ctypes.CDLL(RADOS)
        self.slow: Any = ctypes.CDLL(RBD)
        self.quick: Any = ctypes.PyDLL(RBD)
        for library, calls in ((self.rados, _RADOS), (self.slow, _RBD), (self.quick, _QUICK)):
            _declare(library, calls)


_loaded: Libraries | str = ""  # or why they could not be loaded


def load() -> Libraries:
    """Return the libraries, which a process loads once. Raises: DriverError if this host does not have them."""
    global _loaded  # noqa: PLW0603 - a process loads a library once
    if not _loaded:
        try:
            _loaded = Libraries()
        except (OSError, AttributeError) as error:  # AttributeError: an older release lacks a function
            _loaded = f"Ceph's library cannot be used: {error}; install it (in Debian the package librbd1)"
    if isinstance(_loaded, str):
        raise DriverError(_loaded, errno=errno.ENOPKG)
    return _loaded


def check(result: int, what: str) -> int:
    """Return the result of a call. Raises: DriverError if it is a negative errno; `what` is the call in words."""
    if result < 0:
        raise DriverError(f"{what}: {os.strerror(-result)}", errno=-result)
    return result


def _declare(library: Any, calls: Mapping[str, Iterable[Any]]) -> None:
    for name, arguments in calls.items():
        function = getattr(library, name)
        function.argtypes = tuple(arguments)
        function.restype = _RESULTS.get(name, ctypes.c_int)
