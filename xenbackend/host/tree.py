"""A root directory and the operations on its files: examine, write atomically, remove.

Must not know which files are installed.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from xenbackend.errors import ConfigError
from xenbackend.host.files import Item, fingerprint_of_file, fingerprint_of_link


class Tree:
    """The files below `root`; paths are absolute as seen from inside it."""

    def __init__(self, root: Path) -> None:
        """Use a root directory. Raises: ConfigError if `root` is not a directory."""
        if not root.is_dir():
            raise ConfigError(f"{root}: is not a directory; --root names one that holds a system")
        self._root = root.resolve()
        self.is_host = self._root == Path("/")

    def at(self, path: str) -> Path:
        """Return the place of a path on this host. Raises: ConfigError if a symbolic link leads out of the root."""
        place = self._root / path.lstrip("/")
        if not place.parent.resolve().is_relative_to(self._root):
            raise ConfigError(f"{place}: a symbolic link leads out of {self._root}; run the command in a chroot there")
        return place

    def fingerprint(self, path: str) -> str | None:
        """Return the fingerprint of a path (see `Item.fingerprint`), None if there is no file."""
        place = self.at(path)
        if place.is_symlink():
            return fingerprint_of_link(str(place.readlink()))
        if not place.exists():
            return None
        return fingerprint_of_file(place.read_bytes()) if place.is_file() else "no file"

    def has(self, item: Item) -> bool:
        """Return whether an item is installed with this content and mode. The admin may choose a config file's mode."""
        if self.fingerprint(item.path) != item.fingerprint:
            return False
        return bool(item.link) or item.is_config or self.at(item.path).stat().st_mode & 0o7777 == item.mode

    def put(self, item: Item) -> None:
        """Write an item, and create the directories above it. Readers see the former file or all of the new one."""
        place = self.at(item.path)
        for directory in self.missing_directories([item.path]):
            self.at(directory).mkdir()
            self.at(directory).chmod(0o755)  # whatever the umask
        draft = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
        try:
            if item.link:
                draft.symlink_to(item.link)
            else:
                _write(draft, item.content, item.mode)
            draft.replace(place)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    def remove(self, path: str) -> None:
        """Remove a file or a link."""
        self.at(path).unlink(missing_ok=True)

    def missing_directories(self, paths: list[str]) -> list[str]:
        """Return the missing directories above `paths`, outermost first."""
        above = {str(parent) for path in paths for parent in Path(path).parents[:-1]}
        return sorted(each for each in above if not self.at(each).is_dir())

    def remove_directories(self, paths: list[str]) -> None:
        """Remove these directories if they are empty, innermost first; some may contain files of others."""
        for path in sorted(paths, reverse=True):
            with suppress(OSError):
                self.at(path).rmdir()


def _write(path: Path, content: bytes, mode: int) -> None:
    with path.open("xb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
