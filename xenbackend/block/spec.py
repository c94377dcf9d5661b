"""A parsed chain: every driver of its text was found, and every option checked.

Must not open anything: by this the supervisor refuses a bad chain before anything is touched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xenbackend.block import drivers, grammar
from xenbackend.block.driver import Driver
from xenbackend.block.files import UNNAMED
from xenbackend.block.keys import key_files_of
from xenbackend.block.options import files_of, parse_options
from xenbackend.errors import ChainError, ConfigError


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A parsed layer: its canonical text, its driver and its options."""

    text: str
    driver: type[Driver]
    options: Any


@dataclass(frozen=True, slots=True)
class ChainSpec:
    """A parsed chain, the guest's end first; `text` is canonical."""

    text: str
    layers: tuple[LayerSpec, ...]


def parse_chain(text: str) -> ChainSpec:
    """Parse a chain's text and check every option, without opening anything. Raises: ChainError."""
    layers = grammar.parse(text)
    found = [_find_driver(layer, text) for layer in layers]
    _check_places(layers, found, text)
    specs = [
        LayerSpec(grammar.format_chain((layer,)), driver, parse_options(driver.Options, layer, text))
        for layer, driver in zip(layers, found, strict=True)
    ]
    return ChainSpec(grammar.format_chain(layers), tuple(specs))


def only_read_from(drivers: Sequence[Driver | type[Driver]]) -> int:
    """Return the index of the first layer that is only read, because a filter above it keeps all writes.

    If there is no such filter, return the number of layers.
    """
    keeping = (place + 1 for place, each in enumerate(drivers) if getattr(each, "keeps_writes", False))
    return next(keeping, len(drivers))


def check_whole_paths(chain: ChainSpec) -> None:
    """Check that every file of a chain has an absolute path: whoever opens it has another working directory.

    Raises: ConfigError that names the layer and the file.
    """
    for layer in chain.layers:
        for option, file in {**files_of(layer.options), **key_files_of(layer.options)}.items():
            if file != UNNAMED and not os.path.isabs(file):  # noqa: PTH117 - as `opening`
                whole = os.path.abspath(file)  # noqa: PTH100 - the same
                raise ConfigError(
                    f"{layer.text}: option {option}: {file} is relative to the service's working directory; write the "
                    f"whole path, such as {whole}"
                )


def _find_driver(layer: grammar.Layer, text: str) -> type[Driver]:
    try:
        return drivers.find_driver(layer.name)
    except LookupError as error:
        problem = f"{error}{_hint(layer, text)}"
        raise ChainError(problem, text, layer.start, len(layer.name)) from error


def _hint(layer: grammar.Layer, text: str) -> str:
    """Return a hint if a file name was taken for a driver, because a word before it was taken for a prefix."""
    before = text[: layer.start].rstrip(":").rpartition(":")[2].rpartition("|")[2]
    is_file = before in grammar.FORMATS
    return rf"; if it begins the name of a file, write {before}:{layer.name}\:" if is_file else ""


def _check_places(layers: tuple[grammar.Layer, ...], found: list[type[Driver]], text: str) -> None:
    for layer, driver in zip(layers[:-1], found, strict=False):
        if not driver.is_filter:
            problem = f"{layer.name} is a source and passes nothing on; it must be the last layer"
            raise ChainError(problem, text, layer.start, layer.end - layer.start)
    if found[-1].is_filter:
        layer = layers[-1]
        problem = f"{layer.name} is a filter and needs a layer below it; add a source, as in |aio:/img"
        raise ChainError(problem, text, layer.start, layer.end - layer.start)
