"""Facts about the host: the version of the running Xen, and the real xl.

Must not run anything.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from xenbackend.errors import ConfigError, XenbackendError
from xenbackend.xl.disk import Version
from xenbackend.xl.shim import is_shim

EVERY_XEN: Final[Version] = (4, 17)  # lines for this version work with every Xen; used if none runs
_ROOT: Final = Path("/")


def running_xen(root: Path = _ROOT) -> Version:
    """Return the version of the running Xen, or `EVERY_XEN` if it is not known."""
    try:
        major, minor = (int((root / "sys/hypervisor/version" / part).read_text()) for part in ("major", "minor"))
    except (OSError, ValueError):
        return EVERY_XEN
    return major, minor


def parse_version(text: str) -> Version:
    """Return the version that a text such as ``4.19`` names. Raises: ConfigError."""
    match = re.fullmatch(r"(\d{1,3})\.(\d{1,3})(?:\.\d+)*", text)
    if match is None:
        raise ConfigError(f"{text!r} is not a version of Xen; write it as 4.19")
    return int(match[1]), int(match[2])


def find_xl(path: str, xen: Version, root: Path = _ROOT) -> Path:
    """Return the real xl: the first one on `path`, or where distributions put it, that is not the shim.

    Raises: XenbackendError if there is none.
    """
    private = [root / f"usr/lib/xen-{xen[0]}.{xen[1]}/bin", *sorted(root.glob("usr/lib/xen-*/bin"), reverse=True)]
    for folder in [*map(Path, filter(os.path.isabs, path.split(":"))), root / "usr/sbin", *private]:
        file = folder / "xl"
        if file.is_file() and os.access(file, os.X_OK) and not is_shim(file):
            return file
    raise XenbackendError(
        "there is no xl: not on PATH, in /usr/sbin or in /usr/lib/xen-*/bin; install Xen's tools (xen-utils in Debian)"
    )
