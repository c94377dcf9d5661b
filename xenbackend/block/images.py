"""Our words for the formats of images that are written: the drivers that serve them, and what QEMU calls them.

Must not import a driver, nor anything that knows a format.
"""

from __future__ import annotations

FORMATS = {"raw": "aio", "vhd": "vhd", "qcow2": "qcow2", "qcow": "qcow"}  # our words for formats, and their drivers
FORMAT_OF = {driver: name for name, driver in FORMATS.items()} | {"sync": "raw"}
QEMU_NAMES = {"raw": "raw", "vhd": "vpc", "qcow2": "qcow2", "qcow": "qcow"}
