"""Which names may be opened for a worker: those that a chain's text has, and what its images may name.

Must not open anything, nor believe what a worker says a layer is: the chain's text says that, and an administrator or a
toolstack wrote it.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from xenbackend.block.options import RECORD, uses_of
from xenbackend.block.spec import parse_chain
from xenbackend.errors import DriverError, printable
from xenbackend.protocol.opening import MAX_FILES


@dataclass(frozen=True, slots=True)
class Rule:
    """What may be done with a file.

    may_write     open it for writing
    is_record     make it where it is not there
    within        the directory in which the files that it names have to be, empty: its own
    """

    may_write: bool
    is_record: bool = False
    within: str = ""


class Rules:
    """Those of one chain."""

    def __init__(self, chain: str, *, read_only: bool) -> None:
        """Take the names from a chain's text. Raises: ChainError."""
        self._rules: dict[str, Rule] = {}
        self._images: list[str] = []
        for layer in parse_chain(chain).layers:
            within: str = getattr(layer.options, "parents", "")
            for path, use in uses_of(layer.options).items():
                if use == RECORD:
                    self._rules[path] = self._rules[f"{path}.1"] = Rule(may_write=True, is_record=True)
                else:
                    self._images.append(path)
                    self._rules[path] = Rule(may_write=not read_only, within=within)

    @property
    def images(self) -> list[str]:
        """The names of images that stand in the chain's text."""
        return self._images

    def of(self, name: str) -> Rule:
        """Return what may be done with a file of this name. Raises: DriverError where nothing may."""
        try:
            return self._rules[name]
        except KeyError:
            problem = f"{printable(name)} is named by nothing that this disk is made of, and is not opened"
            raise DriverError(problem, path=name, errno=errno.EACCES) from None

    def check_directory(self, path: str) -> None:
        """Refuse a directory in which no file of the disk has to be. Raises: DriverError."""
        if path not in {rule.within for rule in self._rules.values()}:
            self.of(path)

    def allow(self, name: str, named_by: str) -> None:
        """Let a file be read that an image may name, which itself may be opened.

        Raises: DriverError, where there are too many.
        """
        rule = self.of(named_by)
        if len(self._rules) >= MAX_FILES:
            raise DriverError(f"the disk is made of more than {MAX_FILES} files", path=name, errno=errno.EMFILE)
        self._rules.setdefault(name, Rule(may_write=False, within=rule.within))
