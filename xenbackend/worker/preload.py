"""Imports all that a worker may need later, as it can open no file then.

Must not open anything else, nor import what a third party's driver is made of: every worker would have it.
"""

from __future__ import annotations

from contextlib import suppress

from xenbackend.block.drivers import BUILT_IN, find_driver
from xenbackend.block.formats.zstd import find_unzstd
from xenbackend.block.luks.cipher import find_libcrypto
from xenbackend.errors import DriverError, KernelError
from xenbackend.kernel.fence import find_fence
from xenbackend.kernel.ports import load_host

ENCODINGS = ("ascii", "idna", "latin-1", "utf-8", "utf-16-be", "utf-16-le")  # of names in images, and of messages


def preload(host: str) -> None:
    """Import what is imported late elsewhere, because few workers need it; `host` as `kernel.ports` knows it."""
    import difflib  # noqa: F401
    import encodings.idna  # noqa: F401
    import inspect  # noqa: F401
    import pathlib  # noqa: F401
    import shlex  # noqa: F401
    import traceback  # noqa: F401
    import urllib.parse  # noqa: F401
    import uuid  # noqa: F401
    from xml.parsers import expat  # noqa: F401

    import xenbackend.worker.export
    import xenbackend.worker.io_queue
    import xenbackend.worker.leaf  # noqa: F401

    load_host(host)
    for encoding in ENCODINGS:
        "".encode(encoding)
    for name in BUILT_IN:
        find_driver(name)
    for find in (find_unzstd, find_libcrypto):
        with suppress(DriverError):  # whoever has such an image is told
            find()
    with suppress(KernelError):
        find_fence()
