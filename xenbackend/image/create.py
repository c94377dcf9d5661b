"""Creates images: empty ones, with or without a parent, and snapshots, which are children of an image.

Must not write to a parent, nor guess its format.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenbackend.block.formats.blank import Wishes, blank
from xenbackend.block.grammar import format_layer
from xenbackend.block.keys import parse_key
from xenbackend.block.leaf import leaf_over
from xenbackend.block.luks.blank import SECTOR_SIZES, blank_volume, check_size, derivation
from xenbackend.block.luks.unlock import wipe
from xenbackend.block.options import files_of
from xenbackend.errors import ConfigError, printable
from xenbackend.image.names import Image, image_of_file
from xenbackend.image.session import Session
from xenbackend.opener.deriving import derive
from xenbackend.opener.newfile import refuse_existing, write_new


@dataclass(frozen=True, slots=True)
class Created:
    """A new image: `text` is the layer that opens it, with all options it needs; `size` is its disk's, in bytes."""

    text: str
    size: int
    parent: str = ""


def create(
    image_format: str, path: str, size: int | None, wishes: Wishes | None = None, parent: Image | None = None
) -> Created:
    """Create an image. Without a size, it is as large as its parent.

    The parent is opened for reading meanwhile, so it is refused if somebody writes to it.

    Raises: ConfigError, DriverError; OSError.
    """
    refuse_existing(path)
    if parent is None:
        if size is None:
            raise ConfigError("an image without a parent needs a size, such as 20G")
        write_new(path, blank(image_format, size, wishes or Wishes(), None))
        return Created(image_of_file(image_format, path).text, size)
    with Session() as session:
        disk = session.open(parent.chain, read_only=True)
        layers = disk.chain.layers
        leaf = leaf_over(layers, path, image_format, size, wishes)
        files = files_of(layers[0].driver.options)
        is_marked = write_new(path, leaf.blank, lambda fd: session.opener.mark_child(fd, files))
    return Created(leaf.text if is_marked else leaf.unmarked, leaf.size, parent.text)


def create_encrypted(path: str, size: int, key: str, sector_size: int = SECTOR_SIZES[-1]) -> Created:
    """Create a raw image with an encrypted disk; `key` says where its passphrase is (`block.keys.KeySource`).

    Raises: ConfigError, DriverError; OSError.
    """
    refuse_existing(path)
    try:
        parse_key(key)
    except ValueError as problem:
        raise ConfigError(f"--encrypt: {problem}") from None
    check_size(size, sector_size)
    how = derivation()
    slot_key = derive(key, how)
    try:
        write_new(path, blank_volume(size, how, slot_key, sector_size))
    finally:
        wipe(slot_key)
    layer = format_layer("luks", f"key={key}")
    return Created(f"{layer}|{image_of_file('raw', path).text}", size)


def snapshot(image: Image, path: str) -> Created:
    """Create a child of an image, with its format and size. The image itself must not be written any more.

    Raises: ConfigError, DriverError; OSError.
    """
    if image.format == "raw":
        problem = f"{printable(image.path)} is raw, and a raw image cannot have a parent"
        raise ConfigError(f"{problem}; make a child with image create qcow2 NEW --parent-format raw --parent FILE")
    return create(image.format, path, None, parent=image)
