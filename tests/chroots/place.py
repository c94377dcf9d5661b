"""Chroots of Debian releases, with what the package and its checks need; built once, and cached.

Must not know the package. What runs in one has mounts and processes of its own, which end with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from tests.xen.bed.image import cached

RELEASES = {"bookworm": "12", "trixie": "13"}
NEEDED = ("mmdebstrap", "unshare", "tar")
PACKAGES = (
    "ca-certificates", "lintian", "man-db", "python3-daemon", "python3-pyxs", "python3-rich", "python3-structlog",
    "python3-venv", "systemd-standalone-sysusers",
)  # fmt: skip
_ENTER = """\
mount --bind "$0" "$0" && mount -t proc proc "$0/proc" && mount -t tmpfs tmpfs "$0/dev/shm" && exec chroot "$0" "$@"
"""


def why_not() -> str:
    """Return why no chroot can be had here; empty where it can."""
    lacking = [each for each in NEEDED if shutil.which(each) is None]
    if os.geteuid() != 0:
        return "only root can build a chroot"
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def build(suite: str) -> Path:
    """Return the archive of a release, from the cache or the distribution's registry."""
    recipe = sha256(" ".join(PACKAGES).encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xenbackend-chroots"
    return cached(cache, f"{suite}-{recipe}", lambda place: _bootstrap(suite, place)) / "root.tar"


def _bootstrap(suite: str, place: Path) -> None:
    command = [
        "mmdebstrap", "--quiet", "--mode=root", "--variant=apt", '--aptopt=APT::Install-Recommends "false"',
        f"--include={','.join(PACKAGES)}", suite, str(place / "root.tar"),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


class Chroot:
    """A release, unpacked into a directory."""

    def __init__(self, archive: Path, root: Path) -> None:
        self.root = root
        root.mkdir()
        subprocess.run(["tar", "--extract", "--numeric-owner", f"--file={archive}", f"--directory={root}"], check=True)

    def run(self, *words: str | Path, user: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command there as root, or as another user; what it has started ends with it."""
        as_user: Sequence[str] = ["runuser", "-u", user, "--"] if user else []
        inner = ["sh", "-c", _ENTER, str(self.root), *as_user, *map(str, words)]
        result = subprocess.run(
            ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", *inner],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
        )
        assert not check or result.returncode == 0, f"{words}\n{result.stdout}{result.stderr}"
        return result

    def put(self, file: Path) -> Path:
        """Copy a file into the chroot, and return its name there."""
        shutil.copy(file, self.root / "root" / file.name)
        return Path("/root", file.name)

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.root)
