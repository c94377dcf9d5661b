"""Identifies the layers below a filter that keeps data about them: by a text that differs for another chain.

Must not read a disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields

from xenbackend.block.driver import Driver, Filter, Lookup
from xenbackend.block.options import files_of


def describe(driver: Driver | None, files: Lookup, *, with_changes: bool) -> str:
    """Return a text that identifies the layers from `driver` downward, by the identities of their files.

    Transparent filters do not count. If `with_changes`, the text includes the time when each file was changed last; for
    a block device that is not known.

    Raises: OSError, DriverError.
    """
    words: list[str] = []
    for each in _that_count(driver):
        words.append(each.name)
        paths = files_of(each.options).values()
        words += [_look_at(path, files, with_changes=with_changes) for path in paths] or _given(each.options)
    return "; ".join(words)


def changed_ns(driver: Driver | None, files: Lookup) -> int:
    """Return when the files of the layers from `driver` downward were changed last, in ns since 1970; 0: not known.

    Raises: OSError, DriverError.
    """
    facts = [files.look(path) for each in _that_count(driver) for path in files_of(each.options).values()]
    return max((each.mtime_ns for each in facts if not each.is_device), default=0)


def _that_count(driver: Driver | None) -> Iterator[Driver]:
    while driver is not None:
        if not (isinstance(driver, Filter) and driver.is_transparent):
            yield driver
        driver = driver.next


def _look_at(path: str, files: Lookup, *, with_changes: bool) -> str:
    facts = files.look(path)
    if facts.is_device:  # its number and its disk sequence number may change with each boot
        return facts.real
    identity = " ".join(word for word in facts.identity.split(" ") if not word.startswith("device="))
    return f"{identity} changed={facts.mtime_ns}" if with_changes else identity


def _given(options: object) -> list[str]:
    """Return the options that differ from their defaults."""
    values = [(each, getattr(options, each.name)) for each in fields(options)]  # type: ignore[arg-type]  # a dataclass
    return [f"{each.name}={value}" for each, value in values if each.default is MISSING or value != each.default]
