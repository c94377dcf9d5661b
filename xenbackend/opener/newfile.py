"""New files that appear whole or not at all, and never in the place of another one.

Must not know what an image is.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from xenbackend.block.formats.blank import Blank
from xenbackend.errors import ConfigError, printable


def refuse_existing(path: str) -> None:
    """Refuse a name that is taken, or whose directory does not exist. Raises: ConfigError."""
    if os.path.lexists(path):
        raise ConfigError(f"{printable(path)} exists already, and is not overwritten; choose another name or remove it")
    if not _directory(path).is_dir():
        raise ConfigError(f"there is no directory {printable(str(_directory(path)))}; make it first")


class NewFile:
    """A file that is being made: under a temporary name beside its own, for its owner only.

    fd   open for reading and writing, until `publish` or `abandon`
    """

    def __init__(self, path: str) -> None:
        """Make the temporary file. Raises: ConfigError, if the name is taken; OSError."""
        refuse_existing(path)
        self._path = path
        self._temporary = f"{_directory(path)}/.xenbackend-{secrets.token_hex(8)}"
        with naming(path):
            self.fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def publish(self) -> None:
        """Make it durable and give it its name. Raises: ConfigError, if that is taken by now; OSError."""
        publish(self._temporary, self._path)

    def abandon(self) -> None:
        """Close it, and remove the temporary file if it was not published."""
        os.close(self.fd)
        Path(self._temporary).unlink(missing_ok=True)


def write_new(path: str, blank: Blank, mark: Callable[[int], bool] | None = None) -> bool:
    """Make a file: under a temporary name beside it, made durable, then linked into its place.

    Only its owner may read it: it becomes a guest's disk. `mark` is called with its descriptor before it gets its name.
    Returns what `mark` returns, without it True.

    Raises: ConfigError, if the name is taken; OSError.
    """
    new = NewFile(path)
    try:
        with naming(path):
            fill(new.fd, blank)
            is_marked = mark is None or mark(new.fd)
        new.publish()
        return is_marked
    finally:
        new.abandon()


def fill(fd: int, blank: Blank) -> None:
    """Write the initial content of an image into an empty file. Raises: OSError."""
    os.ftruncate(fd, blank.size)
    for place, data in blank.pieces:
        os.pwrite(fd, data, place)


def publish(temporary: str, path: str) -> None:
    """Make a file durable and rename it from `temporary` to `path`.

    Raises: ConfigError, if that name is taken by now; OSError.
    """
    fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)
    try:
        with naming(path):
            os.link(temporary, path)
    except FileExistsError as error:
        raise ConfigError(f"{printable(path)} has appeared meanwhile, and is not overwritten") from error
    Path(temporary).unlink()
    sync_directory(path)


def replace_durably(path: str, data: bytes) -> None:
    """Write a small file in the place of an older one, atomically and durably.

    Raises: OSError; then the older one is still there, and nothing else.
    """
    new = Path(f"{path}.new")
    try:
        with naming(path), new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    sync_directory(path)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Name the file in errors of calls that have only a descriptor or a temporary name."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = path, None
        raise


def sync_directory(path: str) -> None:
    """Make the name of a file durable. Raises: OSError."""
    fd = os.open(_directory(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _directory(path: str) -> Path:
    return Path(path).absolute().parent
