"""Checks chains that orders name, and derives new chains from the one in service.

Must not open anything, nor change what is noted.
"""

from __future__ import annotations

import json
from pathlib import Path

from xenbackend.block.files import UNNAMED
from xenbackend.block.grammar import format_layer
from xenbackend.block.options import files_of
from xenbackend.block.spec import LayerSpec, parse_chain
from xenbackend.errors import ConfigError

MAX_CHAIN = 2048  # characters, the quota of a value in xenstore


def short(chain: str) -> str:
    """Return `chain`. Raises: ConfigError, if it does not fit into xenstore."""
    if len(chain) > MAX_CHAIN:
        raise ConfigError(
            f"a chain of {len(chain)} characters does not fit into xenstore, which holds at most {MAX_CHAIN}"
        )
    return chain


def whole(file: str) -> str:
    """Return `file`. Raises: ConfigError, if it is not an absolute path."""
    if not Path(file).is_absolute():
        raise ConfigError(
            f"{file!r} is not an absolute path: the service would look for it in its own working directory"
        )
    return file


def is_over(chain: str, former: str, file: str) -> bool:
    """Return whether `chain` is `former` with an image in `file` instead of its source."""
    try:
        layers, formers = parse_chain(chain).layers, parse_chain(former).layers
    except ConfigError:
        return False
    is_same = [each.text for each in layers[:-1]] == [each.text for each in formers[:-1]]
    return is_same and list(files_of(layers[-1].options).values()) == [file]


def with_unnamed(chain: str) -> str:
    """Return the text of a chain. Raises: ConfigError, if it has no unnamed file."""
    return "|".join(each.text for each in _layers_with_unnamed(chain))


def with_named(chain: str, file: str) -> str:
    """Return a chain whose unnamed file is named `file`. Raises: ConfigError, if it has no unnamed file."""
    texts, is_named = [], False
    for each in _layers_with_unnamed(chain):
        is_it = _has_unnamed(each) and not is_named  # only the upper one is written to
        texts.append(format_layer(each.driver.name, file) if is_it else each.text)
        is_named |= is_it
    return "|".join(texts)


def check_keeps_unnamed(chain: str) -> None:
    """Check that a chain has a layer for an unnamed file that there is already. Raises: ConfigError, if not."""
    if not any(map(_has_unnamed, parse_chain(chain).layers)):
        raise ConfigError(
            f"what the guest wrote is in an unnamed file, and would be lost: in {chain} there is no cow: without a "
            "file; name a chain that has one, or detach the disk if nobody needs the data"
        )


def _layers_with_unnamed(chain: str) -> tuple[LayerSpec, ...]:
    layers = parse_chain(chain).layers
    if not any(map(_has_unnamed, layers)):
        raise ConfigError(f"the disk has no unnamed file: in {chain} there is no cow: without a file")
    return layers


def _has_unnamed(layer: LayerSpec) -> bool:
    return UNNAMED in files_of(layer.options).values()


def list_of_texts(data: str) -> list[str]:
    """Return the layers' texts from a worker's reply, which is not trusted; empty if it is not a list."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return []
    return [str(each) for each in found] if isinstance(found, list) else []
