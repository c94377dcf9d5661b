"""What lies below a filter that keeps something about it: a text by which another chain is told from that.

Must not read a disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields

from xenbackend.block.driver import Driver, Filter, Lookup
from xenbackend.block.options import files_of


def describe(driver: Driver | None, files: Lookup, *, with_changes: bool) -> str:
    """Return what tells the layers from `driver` downward from others: of files, which they are.

    Filters that alter nothing do not count. `with_changes`: and when a file was changed last; of a block device nobody
    knows that.

    Raises: OSError, DriverError.
    """
    words: list[str] = []
    for each in _that_count(driver):
        words.append(each.name)
        paths = files_of(each.options).values()
        words += [_look_at(path, files, with_changes=with_changes) for path in paths] or _given(each.options)
    return "; ".join(words)


def changed_ns(driver: Driver | None, files: Lookup) -> int:
    """Return when the files of the layers from `driver` downward were changed last, since 1970; 0: nobody knows.

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
    if facts.is_device:  # which number it has, and which sequence, is another matter after each start of the host
        return facts.real
    identity = " ".join(word for word in facts.identity.split(" ") if not word.startswith("device="))
    return f"{identity} changed={facts.mtime_ns}" if with_changes else identity


def _given(options: object) -> list[str]:
    """Return the options that are not as they are by default."""
    values = [(each, getattr(options, each.name)) for each in fields(options)]  # type: ignore[arg-type]  # a dataclass
    return [f"{each.name}={value}" for each, value in values if each.default is MISSING or value != each.default]
