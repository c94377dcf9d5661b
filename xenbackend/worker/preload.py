"""Imports all that a worker may need later, as it can open no file then.

Must not open anything else, nor import what a third party's driver is made of: every worker would have it.
"""

from __future__ import annotations

import codecs
import difflib  # noqa: F401 - for the words of errors
import shlex  # noqa: F401 - likewise
from contextlib import suppress

from xenbackend.block.drivers import BUILT_IN, find_driver
from xenbackend.block.formats.zstd import find_unzstd
from xenbackend.errors import DriverError
from xenbackend.kernel.ports import load_host
from xenbackend.worker import io_queue  # noqa: F401 - whoever opens an image for I/O imports it then

_CODECS = ("utf-8", "utf-16-le", "utf-16-be", "latin-1", "ascii")  # of names in images, and of messages


def preload(host: str) -> None:
    """Import it, for a host that `kernel.ports` knows by this text."""
    load_host(host)
    for name in BUILT_IN:
        find_driver(name)
    for name in _CODECS:
        codecs.lookup(name)
    with suppress(DriverError):  # whoever has such an image is told
        find_unzstd()
