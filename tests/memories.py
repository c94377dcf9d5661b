"""Memories of layers that a test keeps, as the supervisor does."""

from __future__ import annotations

import os

from xenbackend.kernel import memfd


class Memories:
    """Makes memories for an `EnvFactory`; `kept` has copies of their descriptors, by name, which are the test's."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}

    def make(self, name: str, size: int) -> int:
        """Return a new memory's descriptor."""
        made = memfd.make("test", size)
        self.kept[name] = os.dup(made)
        return made
