"""Which image a text means: its format as a driver's name, its file; and what a file looks like from outside.

Must not open a chain, nor let what a file looks like decide how it is served: a guest writes what it likes to a disk.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from xenbackend.block import grammar
from xenbackend.block.leaf import FORMAT_OF, FORMATS
from xenbackend.block.options import files_of
from xenbackend.block.spec import ChainSpec, parse_chain
from xenbackend.errors import ConfigError, DriverError, printable

_MAGIC = {  # where a format that has but one version says what it is
    "vhd": (0, b"conectix"),
    "vhdx": (0, b"vhdxfile"),
    "vmdk": (0, b"KDMV"),
    "vdi": (64, b"\x7f\x10\xda\xbe"),
}
_HAS_DRIVER = re.compile(r"[a-z][a-z0-9_-]*:")


@dataclass(frozen=True, slots=True)
class Image:
    """An image that somebody named: one layer, which is a source."""

    format: str  # a key of FORMATS
    path: str
    chain: ChainSpec

    @property
    def text(self) -> str:
        """The layer as it is written in a chain."""
        return self.chain.text


def has_driver(text: str) -> bool:
    """Return whether a text begins with a driver, and so is a chain and not a file."""
    return _HAS_DRIVER.match(text) is not None


def find_image(text: str, formats: tuple[str, ...] = tuple(FORMATS)) -> Image:
    """Return the image that a layer such as ``qcow2:/img`` names. Raises: ChainError, ConfigError."""
    if not has_driver(text):
        hint = _hint(text)
        raise ConfigError(f"{printable(text)!r} does not say its format; write {hint}")
    chain = parse_chain(text)
    layer = chain.layers[-1]
    name = FORMAT_OF.get(layer.driver.name, "")
    if len(chain.layers) > 1 or name not in formats:
        words = ", ".join(f"{FORMATS[each]}:FILE" for each in formats)
        raise ConfigError(f"{printable(chain.text)!r} is not an image by itself; write one of {words}")
    return Image(name, next(iter(files_of(layer.options).values())), chain)


def image_of_file(image_format: str, path: str, *options: str) -> Image:
    """Return the image in a file, whose format is known."""
    return find_image(grammar.format_layer(FORMATS[image_format], path, *options))


def at_another_path(image: Image, path: str) -> Image:
    """Return the same image in another file, with the same options."""
    (layer,) = grammar.parse(image.text)
    return image_of_file(image.format, path, *(item.text for item in layer.items[1:]))


def probe(path: str) -> str:
    """Return the format that a file looks like, also one that is only read; "raw" for none. Raises: DriverError."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(512)
            file.seek(-min(512, file.seek(0, os.SEEK_END)), os.SEEK_END)
            end = file.read(512)
    except OSError as error:
        raise DriverError(f"{printable(path)}: {error.strerror}", path=path, errno=error.errno or 0) from error
    if start.startswith(b"QFI\xfb"):
        return "qcow" if start[4:8] == b"\0\0\0\1" else "qcow2"
    if end.startswith(b"conectix"):
        return "vhd"
    return next((name for name, (place, magic) in _MAGIC.items() if start[place:].startswith(magic)), "raw")


def layer_of_file(image_format: str, path: str) -> str:
    """Return the layer that reads a file of a format that `probe` knows."""
    return grammar.format_layer(FORMATS.get(image_format, image_format), path)


def _hint(path: str) -> str:
    try:
        return f"{layer_of_file(probe(path), path)} if that is what it is: it looks like it"
    except DriverError:
        return f"the driver before it, as in qcow2:{printable(path)}"
