"""A part of a suite, as command lines name it: the second of five is 2/5."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """The `number`-th of `count` parts; all together are the whole."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read a part such as ``2/5``. Raises: ValueError."""
        part = cls(*map(int, text.split("/")))
        if not 1 <= part.number <= part.count:
            raise ValueError(text)
        return part
