"""Making images: empty ones, with or without a parent, and snapshots, which are children of an image.

Must not write to a parent, nor guess of which format it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from xenbackend.block.drivers.vhd import Vhd
from xenbackend.block.opening import MAX_PARENTS
from xenbackend.errors import ConfigError, printable
from xenbackend.image.blank import Parent, Wishes, blank
from xenbackend.image.names import QEMU_NAMES, Image, image_of_file
from xenbackend.image.newfile import refuse_existing, write_new
from xenbackend.image.session import Disk, Session

_PARENTS = {"vhd": ("vhd", "raw"), "qcow2": ("raw", "vhd", "qcow2", "qcow"), "qcow": ("raw", "vhd", "qcow2", "qcow")}


@dataclass(frozen=True, slots=True)
class Created:
    """A new image: `text` is the layer that opens it, with every option that it needs; `size` is its disk's, bytes."""

    text: str
    size: int
    parent: str = ""


def create(
    image_format: str, path: str, size: int | None, wishes: Wishes | None = None, parent: Image | None = None
) -> Created:
    """Make an image. Without a size it is as large as its parent.

    The parent is opened for reading meanwhile, so one that somebody writes to is refused.

    Raises: ConfigError, DriverError; OSError.
    """
    refuse_existing(path)
    if parent is None:
        if size is None:
            raise ConfigError("an image without a parent needs a size, such as 20G")
        write_new(path, blank(image_format, size, wishes or Wishes(), None))
        return Created(image_of_file(image_format, path).text, size)
    _check_parent_format(image_format, parent)
    options = _options(image_format, path, parent)
    with Session() as session:
        disk = session.open(parent.chain, read_only=True)
        _check_chain_ends(disk)
        size = disk.size if size is None else size
        write_new(path, blank(image_format, size, wishes or Wishes(), _parent(path, parent, disk)))
    return Created(image_of_file(image_format, path, *options).text, size, parent.text)


def snapshot(image: Image, path: str) -> Created:
    """Make a child of an image, of its format and as large: the image itself must not be written any more.

    Raises: ConfigError, DriverError; OSError.
    """
    if image.format == "raw":
        problem = f"{printable(image.path)} is raw, and a raw child cannot be"
        raise ConfigError(f"{problem}; make one by image create qcow2 NEW --parent-format raw --parent FILE")
    return create(image.format, path, None, parent=image)


def parents_option(path: str, parent: str) -> str:
    """Return the directory that `parents=` has to name so that an image at `path` may have a parent, or nothing."""
    beside = os.path.realpath(os.path.dirname(os.path.abspath(path)))  # noqa: PTH100, PTH120 - as `opening`
    both = os.path.commonpath([beside, os.path.realpath(parent)])
    return "" if both == beside else both


def _check_parent_format(image_format: str, parent: Image) -> None:
    known = _PARENTS.get(image_format, ())
    if parent.format not in known:
        words = " or ".join(known) or "no image at all"
        raise ConfigError(f"the parent of a {image_format} image can be {words}, and not {parent.format}")


def _options(image_format: str, path: str, parent: Image) -> list[str]:
    """Return what the child's layer has to say: where its parents may be, and what the image itself cannot say."""
    directory = parents_option(path, parent.path)
    given: str = getattr(parent.chain.layers[0].options, "parents", "")
    if given:
        directory = os.path.commonpath([os.path.realpath(given), directory or os.path.realpath(given)])
    words = [f"parents={directory}"] if directory else []
    kept = getattr(parent.chain.layers[0].options, "parent_format", "")
    if image_format == "qcow":
        words.append(f"parent_format={QEMU_NAMES[parent.format]}")
    elif kept and image_format == "qcow2":
        words.append(f"parent_format={kept}")
    return words


def _check_chain_ends(disk: Disk) -> None:
    if len(disk.chain.layers) > MAX_PARENTS:
        raise ConfigError(f"there are {MAX_PARENTS} images behind one another already; commit or convert some first")


def _parent(path: str, parent: Image, disk: Disk) -> Parent:
    driver = disk.chain.layers[0].driver
    uuid = driver.footer.uuid if isinstance(driver, Vhd) else bytes(16)
    mtime = os.stat(parent.path).st_mtime  # noqa: PTH116 - as `opening`: pathlib would alter the name
    return Parent(_name(path, parent.path), parent.format, QEMU_NAMES[parent.format], uuid, mtime)


def _name(path: str, parent: str) -> str:
    """Return a parent's name: relative to the child, unless they have no more than the root in common."""
    beside = os.path.realpath(os.path.dirname(os.path.abspath(path)))  # noqa: PTH100, PTH120 - as `opening`
    real = os.path.realpath(parent)
    if os.path.commonpath([beside, real]) == "/":
        return real
    return os.path.relpath(real, beside)
