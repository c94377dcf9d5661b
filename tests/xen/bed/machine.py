"""What the host must have for the bed, and sentences about what is missing.

Must not install anything.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

FOR_BOOT = {"mke2fs": "e2fsprogs", "debugfs": "e2fsprogs"}
FOR_BUILD = {"mmdebstrap": "mmdebstrap", "cpio": "cpio", "modprobe": "kmod"}
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # a user's PATH has no sbin in Debian


def missing(*, builds: bool, which: Callable[[str], str | None] | None = None, uid: int | None = None) -> str:
    """Return a sentence about what is missing, empty if nothing is.

    Args:
        builds: the image has to be built first.
        which: finds a tool.
        uid: the user who runs the bed.
    """
    which = which or (lambda tool: shutil.which(tool, path=PATH))
    tools = {**FOR_BOOT, **(FOR_BUILD if builds else {})}
    packages = sorted({package for tool, package in tools.items() if not which(tool)})
    if packages:
        return (
            f"not installed: {', '.join(packages)}; try: apt-get install --no-install-recommends {' '.join(packages)}"
        )
    if builds and (os.geteuid() if uid is None else uid):
        return "there is no dom0 image yet, and only root can build one; try: sudo make test-xen"
    return ""
