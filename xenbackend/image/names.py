"""Which image a text means: its format as a driver's name, and its file.

Must not open a chain, nor guess a format: what a file looks like, which `looks` says, is a hint and no more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from xenbackend.block import grammar
from xenbackend.block.formats.table import BY_DRIVER, FORMATS, WRITTEN, Format, layers
from xenbackend.block.options import files_of
from xenbackend.block.spec import ChainSpec, parse_chain
from xenbackend.errors import ConfigError, DriverError, printable

_HAS_DRIVER = re.compile(r"[a-z][a-z0-9_-]*:")


@dataclass(frozen=True, slots=True)
class Image:
    """An image that somebody named: one layer, which is a source."""

    format: str  # one of WRITTEN
    path: str
    chain: ChainSpec

    @property
    def text(self) -> str:
        """The layer as it is written in a chain."""
        return self.chain.text

    @property
    def row(self) -> Format:
        """The row of its format."""
        return FORMATS[self.format]

    @property
    def data_file(self) -> str:
        """The external data file that the layer names; empty where it names none."""
        return getattr(self.chain.layers[0].options, "data_file", "")


@contextmanager
def blame(image: Image) -> Iterator[None]:
    """Name the image in whatever is raised about a file of it. Raises: DriverError."""
    try:
        yield
    except DriverError as error:
        error.layer = error.layer or image.text
        raise


def has_driver(text: str) -> bool:
    """Return whether a text begins with a driver, and so is a chain and not a file."""
    return _HAS_DRIVER.match(text) is not None


def find_chain(text: str) -> ChainSpec:
    """Return the chain that a text is; of a file without its format, say what to write.

    Raises: ChainError, ConfigError.
    """
    return parse_chain(text) if has_driver(text) else find_image(text).chain


def find_image(text: str, formats: tuple[str, ...] = tuple(WRITTEN)) -> Image:
    """Return the image that a layer such as ``qcow2:/img`` names. Raises: ChainError, ConfigError."""
    if not has_driver(text):
        from xenbackend.image.looks import hint_for  # late: only who makes this mistake needs it

        raise ConfigError(f"{printable(text)!r} does not say its format; {hint_for(text)}")
    chain = parse_chain(text)
    layer = chain.layers[-1]
    found = BY_DRIVER.get(layer.driver.name)
    if len(chain.layers) > 1 or found is None or found.name not in formats:
        words = ", ".join(layers(formats))
        raise ConfigError(f"{printable(chain.text)!r} is not an image by itself; write one of {words}")
    return Image(found.name, next(iter(files_of(layer.options).values())), chain)


def image_of_file(image_format: str, path: str, *options: str) -> Image:
    """Return the image in a file, whose format is known."""
    return find_image(grammar.format_layer(FORMATS[image_format].driver, path, *options))


def at_another_path(image: Image, path: str) -> Image:
    """Return the same image in another file, with the same options."""
    (layer,) = grammar.parse(image.text)
    return image_of_file(image.format, path, *(item.text for item in layer.items[1:]))
