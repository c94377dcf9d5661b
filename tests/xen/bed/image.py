"""The cache of built images: one directory for each recipe, complete or not there at all.

Must not know what an image is made of.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

KEPT = 2  # so that two branches with different recipes do not build in turns


def cache_directory() -> Path:
    """Return where images are kept (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xenbackend-xen"


def key_of(files: Iterable[Path], words: Iterable[str] = ()) -> str:
    """Return a recipe's key: a hash of the names and contents of its files, and of `words`."""
    digest = hashlib.sha256("\n".join(words).encode())
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def cached(cache: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Return the directory `name` of the cache; if it is missing, `build` fills one first.

    Other processes wait for the one that builds. The next build removes what an interrupted one has left.
    """
    place = cache / name
    if not place.is_dir():
        with _only_builder(cache):
            if not place.is_dir():
                _build(place, build)
                _forget_older(cache, name.rpartition("-")[0])
    os.utime(place)
    return place


def _build(place: Path, build: Callable[[Path], None]) -> None:
    draft = place.with_name(f"{place.name}.partial")
    for each in _mounted_below(draft):
        subprocess.run(["umount", each], check=True, capture_output=True, text=True)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    build(draft)
    draft.rename(place)


def _mounted_below(directory: Path) -> list[Path]:
    """Return what is mounted there, the last one first (proc_pid_mountinfo(5)).

    A build that was interrupted leaves the host's own /dev/shm in its root: what is in there must outlive the draft.
    """
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    places = [Path(line.split()[4].replace("\\040", " ")) for line in reversed(lines)]
    return [each for each in places if each.is_relative_to(directory.resolve())]


def _forget_older(cache: Path, family: str) -> None:
    siblings = sorted(cache.glob(f"{family}-*"), key=lambda each: each.stat().st_mtime, reverse=True)
    for old in siblings[KEPT:]:
        shutil.rmtree(old)


@contextmanager
def _only_builder(cache: Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
