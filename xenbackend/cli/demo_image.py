"""The raw images of `xenbackend demo`, which are made where they are missing.

Must not alter one that is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from xenbackend.errors import ConfigError, printable
from xenbackend.units import format_size

_LEAST = 1 << 20  # bytes, whatever part of it is used


def make(path: Path, size: int) -> int:
    """Make an image for that much, sparse, and return how large it is. Raises: OSError, FileExistsError too."""
    size = max(size, _LEAST)
    with path.open("xb") as file:
        file.truncate(size)
    return size


def make_missing(chain: str, size: int) -> None:
    """Make the raw image that a chain ends in, where there is none yet. Raises: ChainError, ConfigError."""
    from xenbackend.block.drivers.aio import Aio
    from xenbackend.block.options import files_of
    from xenbackend.block.spec import parse_chain

    bottom = parse_chain(chain).layers[-1]
    if bottom.driver is not Aio:
        return
    for name in files_of(bottom.options).values():
        if Path(name).absolute().is_relative_to("/dev"):
            continue  # a device that is missing is no file
        try:
            made = make(Path(name), size)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{printable(name)} is missing and cannot be made: {error.strerror}") from None
        print(f"{printable(name)} was missing; it has {format_size(made)} now", file=sys.stderr)
