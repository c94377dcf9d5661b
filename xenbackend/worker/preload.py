"""Imports every module that a worker may need later, when it can open no file.

Must not open anything else, nor import third-party drivers: every worker would contain them.
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
    """Import modules that are imported late elsewhere, as few workers need them. `host`: its name in `kernel.ports`."""
    import difflib
    import encodings.idna
    import inspect
    import pathlib
    import shlex
    import traceback
    import urllib.parse
    import uuid
    from xml.parsers import expat

    import xenbackend.worker.export
    import xenbackend.worker.io_queue
    import xenbackend.worker.leaf

    load_host(host)
    for encoding in ENCODINGS:
        "".encode(encoding)
    for name in BUILT_IN:
        find_driver(name)
    for find in (find_unzstd, find_libcrypto):
        with suppress(DriverError):  # reported when such an image is opened
            find()
    with suppress(KernelError):
        find_fence()
