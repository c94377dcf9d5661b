"""Chroots of Debian releases with what the package and its checks, or the fast suite, need; built once and cached.

Must not depend on the package. A command in a chroot has its own mounts and processes, which end with it.
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
DEVELOPED_ON = ("trixie", "forky")  # with Python 3.13 and 3.14 when this was written; 12 and its 3.11 are CI's
NEEDED = ("mmdebstrap", "unshare", "tar")
PACKAGES = (
    "ca-certificates", "lintian", "man-db", "python3-daemon", "python3-pyxs", "python3-rich", "python3-structlog",
    "python3-venv", "systemd-standalone-sysusers",
)  # fmt: skip
TOOLS = (  # those of .ci/packages for the fast suite that have the same name in each release
    "cryptsetup-bin", "e2fsprogs", "fdisk", "fio", "gcc", "git", "kmod", "libc6-dev", "libxen-dev", "linux-libc-dev",
    "make", "mount", "nbdkit", "openssl", "procps", "python3-venv", "qemu-utils", "util-linux-extra",
)  # fmt: skip
_ENTER = """\
mount --bind "$0" "$0" && mount -t proc proc "$0/proc" && mount -t tmpfs tmpfs "$0/dev/shm" && exec chroot "$0" "$@"
"""
# After chroot(2) a process may not make user namespaces (user_namespaces(7)), with which walls are tested.
_ENTER_AS_ROOT_DIRECTORY = """\
mount --bind "$0" "$0" && mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && mount --rbind /sys "$0/sys" &&
cd "$0" && pivot_root . . && umount --lazy . && exec "$@"
"""
_HOSTS = ("etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt")  # for pip to reach its registry


def why_not() -> str:
    """Return why there can be no chroot here, empty if there can."""
    lacking = [each for each in NEEDED if shutil.which(each) is None]
    if os.geteuid() != 0:
        return "only root can build a chroot"
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def build(suite: str, packages: Sequence[str] = PACKAGES) -> Path:
    """Return the archive of a release with these packages, from the cache or else from the distribution's registry."""
    recipe = sha256(" ".join(packages).encode()).hexdigest()[:8]
    name = suite if packages is PACKAGES else f"developed-on-{suite}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xenbackend-chroots"
    return cached(cache, f"{name}-{recipe}", lambda place: _bootstrap(suite, packages, place)) / "root.tar"


def _bootstrap(suite: str, packages: Sequence[str], place: Path) -> None:
    command = [
        "mmdebstrap", "--quiet", "--mode=root", "--variant=apt", '--aptopt=APT::Install-Recommends "false"',
        '--aptopt=Acquire::Check-Valid-Until "false"',  # testing's lists expire in days, which a mirror may be behind
        "--dpkgopt=force-unsafe-io", f"--include={','.join(packages)}", suite, str(place / "root.tar"),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


class Chroot:
    """A release, unpacked into a directory."""

    def __init__(self, archive: Path, root: Path) -> None:
        self.root = root
        root.mkdir()
        subprocess.run(["tar", "--extract", "--numeric-owner", f"--file={archive}", f"--directory={root}"], check=True)

    def run(
        self, *words: str | Path, user: str = "", check: bool = True, as_system: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there as root, or as another user; processes that it has started end with it.

        `as_system` gives it the host's devices, and makes the directory the root of its mounts, as in a system; the
        release needs Debian's package `mount` for that.
        """
        as_user: Sequence[str] = ["runuser", "-u", user, "--"] if user else []
        enter = _ENTER_AS_ROOT_DIRECTORY if as_system else _ENTER
        inner = ["sh", "-c", enter, str(self.root), *as_user, *map(str, words)]
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

    def connect(self) -> None:
        """Let pip in the chroot reach its registry as the host does."""
        for name in _HOSTS:
            if (file := Path("/", name)).exists():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.root / name)

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.root)
