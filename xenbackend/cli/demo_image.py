"""Makes the raw images of `xenbackend demo` that are missing.

Must not alter an image that exists.
"""

from __future__ import annotations

import sys
from pathlib import Path

from xenbackend.errors import ConfigError, printable
from xenbackend.units import format_size

_LEAST = 1 << 20  # bytes, even if less of it is used


def make(path: Path, size: int) -> int:
    """Make a sparse image for `size` bytes, and return its size. Raises: OSError; FileExistsError."""
    size = max(size, _LEAST)
    with path.open("xb") as file:
        file.truncate(size)
    return size


def make_missing(chain: str, size: int) -> None:
    """Make the raw image that a chain ends in, if it is missing. Raises: ChainError, ConfigError."""
    from xenbackend.block.drivers.aio import Aio
    from xenbackend.block.options import files_of
    from xenbackend.block.spec import parse_chain

    bottom = parse_chain(chain).layers[-1]
    if bottom.driver is not Aio:
        return
    for name in files_of(bottom.options).values():
        if Path(name).absolute().is_relative_to("/dev"):
            continue  # a missing device cannot be made
        try:
            made = make(Path(name), size)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{printable(name)} is missing and cannot be made: {error.strerror}") from None
        print(f"{printable(name)} did not exist; it was created with {format_size(made)}", file=sys.stderr)
