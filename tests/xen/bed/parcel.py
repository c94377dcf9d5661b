"""The second disk of dom0: takes in the project's wheel, the Debian package if one was built, tests and the start
script, and brings results back.

Must not need the network from inside: wheels are made here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.xen.bed import wheels
from tests.xen.bed.machine import PATH

PROJECT = Path(__file__).parents[3]
START = Path(__file__).parent / "files/start"
ROOM_FOR_RESULTS = 256 << 20
_PARTS = ("tests", "pyproject.toml")  # not the package: in dom0 pip installs it


def pack(directory: Path, arguments: Sequence[str]) -> Path:
    """Write the disk's image into a directory and return it.

    Args:
        directory: an empty one.
        arguments: for pytest in dom0.

    Raises: CalledProcessError.
    """
    tree, image = directory / "parcel", directory / "parcel.img"
    wheels.make(tree / "wheels", "--no-deps", str(PROJECT))
    for name in _PARTS:
        _copy(PROJECT / name, tree / "project" / name)
    (tree / "out").mkdir()
    (tree / "arguments").write_text("".join(f"{each}\n" for each in arguments))
    shutil.copy(START, tree)
    for place in (".", "former"):  # the last release's is for the test of an upgrade
        (tree / place).mkdir(exist_ok=True)
        for package in (PROJECT / "dist" / place).glob("xenbackend_*_all.deb"):
            shutil.copy(package, tree / place)
    size = sum(file.stat().st_size for file in tree.rglob("*") if file.is_file())
    with image.open("wb") as file:
        file.truncate(size * 2 + ROOM_FOR_RESULTS)
    _run("mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image))
    return image


def unpack(image: Path, results: Path) -> None:
    """Copy what dom0 left to a directory, even if the machine was switched off."""
    _run("e2fsck", "-p", str(image), check=False)  # replays the journal
    _run("debugfs", "-R", f"rdump /out {results}", str(image))
    for file in (results / "out").iterdir():
        file.rename(results / file.name)
    (results / "out").rmdir()


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def _run(*command: str, check: bool = True) -> None:
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": PATH},
        check=False,
    )
    if check and result.returncode:
        raise subprocess.CalledProcessError(result.returncode, command, result.stdout, result.stderr)
