"""Finds the image that a text names: its format, by the driver's name, and its file.

Must not open a chain, nor guess a format: what a file looks like (`looks`) is only a hint.
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
    """An image that a person has named: one layer, which is a source."""

    format: str  # one of WRITTEN
    path: str
    chain: ChainSpec

    @property
    def text(self) -> str:
        """The layer as it is written in a chain."""
        return self.chain.text

    @property
    def row(self) -> Format:
        """The format's row in the table."""
        return FORMATS[self.format]

    @property
    def data_file(self) -> str:
        """The external data file that the layer names, empty if none."""
        return getattr(self.chain.layers[0].options, "data_file", "")


@contextmanager
def blame(image: Image) -> Iterator[None]:
    """Within this context, add the image's name to a DriverError that has no layer. Raises: DriverError."""
    try:
        yield
    except DriverError as error:
        error.layer = error.layer or image.text
        raise


def has_driver(text: str) -> bool:
    """Return whether a text begins with a driver's name, and so is a chain and not a file."""
    return _HAS_DRIVER.match(text) is not None


def find_chain(text: str) -> ChainSpec:
    """Return the chain that a text describes.

    Raises: ChainError; ConfigError, for a file without its format with advice on what to write.
    """
    return parse_chain(text) if has_driver(text) else find_image(text).chain


def find_image(text: str, formats: tuple[str, ...] = tuple(WRITTEN)) -> Image:
    """Return the image that a layer such as ``qcow2:/img`` names. Raises: ChainError, ConfigError."""
    if not has_driver(text):
        from xenbackend.image.looks import hint_for  # late: only needed after this mistake

        raise ConfigError(f"{printable(text)!r} does not say its format; {hint_for(text)}")
    chain = parse_chain(text)
    layer = chain.layers[-1]
    found = BY_DRIVER.get(layer.driver.name)
    if len(chain.layers) > 1 or found is None or found.name not in formats:
        words = ", ".join(layers(formats))
        raise ConfigError(f"{printable(chain.text)!r} is not an image by itself; write one of {words}")
    return Image(found.name, next(iter(files_of(layer.options).values())), chain)


def image_of_file(image_format: str, path: str, *options: str) -> Image:
    """Return the image in a file whose format is known."""
    return find_image(grammar.format_file(FORMATS[image_format].driver, path, *options))


def at_another_path(image: Image, path: str) -> Image:
    """Return an image with the same format and options at another path."""
    (layer,) = grammar.parse(image.text)
    return image_of_file(image.format, path, *(item.text for item in layer.items[1:]))
