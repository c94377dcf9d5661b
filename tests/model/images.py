"""The images of a run, and what every one of them must hold.

Must not know a guest or a worker. An image's content, sector by sector, is that of the writes that were answered; an
image over another one has the other's content where nothing was written to itself.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

SECTOR = 512
SIZE = 256 * 1024  # bytes of a new disk
LARGEST = 4 * SIZE  # bytes that a disk grows to at most
PLACES = tuple(number * 61 for number in range(8))  # sectors that guests write; some share a cluster of 64 KiB
_BOTTOM = re.compile(r"(aio|qcow2|vhd):([^,]+)")


def pattern(number: int) -> bytes:
    """Return a sector that identifies a write."""
    return number.to_bytes(8, "little") * (SECTOR // 8)


@dataclass(eq=False)
class Image:
    """One image: for each place its possible sectors, `None` for anything; places that are missing are the parent's."""

    path: str
    sectors: dict[int, set[bytes] | None] = field(default_factory=dict)
    parent: Image | None = None
    children: list[Image] = field(default_factory=list)

    def may_hold(self, place: int) -> set[bytes] | None:
        """Return the sectors that a place may hold."""
        if place in self.sectors or self.parent is None:
            return self.sectors[place]
        return self.parent.may_hold(place)

    def now_holds(self, place: int, values: set[bytes] | None) -> None:
        """Take note of what was written. Images over this one are of no use from then on."""
        self.sectors[place] = values
        for child in self.children:
            child.spoil()

    def holds(self, place: int, value: bytes) -> None:
        """Take note of what was read."""
        if place in self.sectors or self.parent is None:
            self.sectors[place] = {value}
        else:
            self.parent.holds(place, value)

    def spoil(self) -> None:
        """Take note that the content of this image is not known any more."""
        self.sectors = dict.fromkeys(PLACES)
        for child in self.children:
            child.spoil()


class Images:
    """All images of a run, by what their names mean."""

    def __init__(self, directory: Path, random: Random) -> None:
        self.directory = directory
        self._random = random
        self._by_inode: dict[int, Image] = {}
        self._made = 0
        self._written = 0

    def next_pattern(self) -> bytes:
        """Return a sector with a content that no other one has."""
        self._written += 1
        return pattern(self._written)

    def new_name(self, suffix: str) -> str:
        """Return a name that no file has."""
        self._made += 1
        return str(self.directory / f"{self._made}{suffix}")

    def make_raw(self, size: int = SIZE) -> Image:
        """Return a new raw image with content of its own."""
        image = Image(self.new_name(".raw"))
        with open(image.path, "wb") as file:  # noqa: PTH123 - a text
            file.truncate(size)
            for place in PLACES:
                if place * SECTOR < size:
                    sector = self.next_pattern()
                    file.seek(place * SECTOR)
                    file.write(sector)
                    image.sectors[place] = {sector}
        self._by_inode[os.stat(image.path).st_ino] = image  # noqa: PTH116 - a text
        return image

    def link(self, image: Image) -> str:
        """Return another name of an image."""
        name = self.new_name(".link")
        if self._random.random() < 0.5:
            os.link(image.path, name)
        else:
            Path(name).symlink_to(image.path)
        return name

    def of_chain(self, chain: str) -> Image | None:
        """Return the image that a chain writes to, None if it is not known."""
        match = _BOTTOM.fullmatch(chain.rsplit("|", maxsplit=1)[-1])
        try:
            return self._by_inode.get(os.stat(match[2]).st_ino) if match else None  # noqa: PTH116 - a text
        except OSError:
            return None

    def branched(self, chain: str, parent: Image) -> None:
        """Take note of an image that was made over another one."""
        match = _BOTTOM.fullmatch(chain.rsplit("|", maxsplit=1)[-1])
        assert match is not None, chain
        image = Image(match[2], parent=parent)
        parent.children.append(image)
        self._by_inode[os.stat(image.path).st_ino] = image  # noqa: PTH116 - a text

    def faults(self) -> list[str]:
        """Return sentences about contents of images that no answered write explains; no image is open."""
        return [fault for image in self._by_inode.values() for fault in _faults_of(image)]


def _faults_of(image: Image) -> list[str]:
    path = image.path
    if path.endswith(".raw"):
        content = Path(path).read_bytes()
    elif all(image.may_hold(place) is None for place in PLACES):
        return []
    else:
        done = subprocess.run(
            ["qemu-img", "convert", "-U", "-O", "raw", path, f"{path}.out"], capture_output=True, check=False
        )
        if done.returncode:
            return [f"qemu-img cannot read {path}: {done.stderr.decode()}"]
        content = Path(f"{path}.out").read_bytes()
    found = []
    for place in PLACES:
        values, sector = image.may_hold(place), content[place * SECTOR : (place + 1) * SECTOR]
        if values is not None and sector not in values:
            found.append(f"{path} has {_named(sector)} at sector {place}, not {' or '.join(map(_named, values))}")
    return found


def _named(sector: bytes) -> str:
    return f"write {int.from_bytes(sector[:8], 'little')}" if sector == sector[:8] * 64 else sector[:16].hex()
