"""Writes the archive of a report: a file that appears whole or not at all, and that only its owner can read.

Must not gather anything.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xenbackend.doctor.pieces import Piece
from xenbackend.errors import ConfigError, unwritable


def contents(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """Return a list of a report's pieces, with the reason for those that are missing."""
    return [
        {"name": each.name, "size": len(_data(each)), "left_out": each.left_out, "problem": each.problem}
        for each in pieces
    ]


def check_new(path: Path) -> None:
    """Check, before anything is gathered, that an archive can be written at a path. Raises: ConfigError."""
    if path.exists():
        raise _exists(path)
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent}: there is no such directory")


def _exists(path: Path) -> ConfigError:
    return ConfigError(f"{path}: it exists; name a new file")


def write(pieces: Sequence[Piece], path: Path) -> None:
    """Write the archive, a compressed tar file. Raises: XenbackendError, a ConfigError if the path exists."""
    directory = path.name.removesuffix(".gz").removesuffix(".tar")
    listed = Piece("contents.json", json.dumps(contents(pieces), indent=1) + "\n")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            try:
                with tarfile.open(fileobj=file, mode="w:gz") as archive:
                    for piece in (listed, *(each for each in pieces if not each.problem)):
                        archive.addfile(*_member(f"{directory}/{piece.name}", _data(piece)))
                file.flush()
                os.fsync(file.fileno())
                os.link(file.name, path)  # fails if the path has been created meanwhile
            finally:
                Path(file.name).unlink()
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise unwritable(f"{path}: cannot be written: {error.strerror}", error) from None


def _data(piece: Piece) -> bytes:
    return piece.text.encode(errors="backslashreplace")


def _member(name: str, data: bytes) -> tuple[tarfile.TarInfo, io.BytesIO]:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(data), 0o600, int(time.time())
    return member, io.BytesIO(data)
