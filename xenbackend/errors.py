"""A class of exceptions for each party that can be at fault, which decides what happens next and who is told.

Specific subclasses are defined beside the rule that they name (guest errors in `blkif/`). Must not import any other
module of xenbackend.

| class       | fault of           | reaches                                   | aftermath                     |
|-------------|--------------------|-------------------------------------------|-------------------------------|
| GuestError  | the frontend       | that request as an error, or stops a ring | worker lives                  |
| ChainError  | the operator       | one sentence and a caret, exit status 2   | nothing was touched           |
| ConfigError | the operator       | one sentence, exit status 2               | nothing was touched           |
| DriverError | operator or image  | the vbd's error node, or exit status 2    | chain closed again completely |
| KernelError | the host           | the vbd's error node, log                 | until either end starts again |
| StoreError  | xenstored          | log                                       | reconnect, re-read everything |
"""

from __future__ import annotations

import errno as errno_module
import os
import unicodedata


class XenbackendError(Exception):
    """Base class of the errors that xenbackend raises on purpose; the message tells a person what to act on."""


class GuestError(XenbackendError):
    """A frontend broke a rule of the protocol; the effect is limited to its request or its ring."""


class ConfigError(XenbackendError):
    """The settings file or a command line is not valid, or cannot be what the operator meant."""


class ChainError(ConfigError):
    """The text of a chain is not valid; `str()` shows the chain with carets below the characters at fault."""

    def __init__(self, problem: str, chain: str, position: int, length: int = 1) -> None:
        super().__init__(problem)
        self.problem = problem
        self.chain = chain
        self.position = position
        self.length = length

    def __str__(self) -> str:
        if not self.chain.strip():
            return printable(self.problem)
        start, end = self.position, self.position + self.length
        caret = " " * _columns(self.chain[:start]) + "^" * max(1, _columns(self.chain[start:end]))
        return f"{printable(self.problem)}\n  {printable(self.chain)}\n  {caret}"


class DriverError(XenbackendError):
    """A layer could not be opened, or refused a verb; `layer`, `option` and `path` are empty if not applicable."""

    def __init__(
        self, problem: str, *, layer: str = "", option: str = "", path: str = "", errno: int = errno_module.EINVAL
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.layer = layer
        self.option = option
        self.path = path
        self.errno = errno

    def __str__(self) -> str:
        where = f"{self.layer}: " if self.layer else ""
        what = f"option {self.option}: " if self.option else ""
        return f"{where}{what}{self.problem}"


class KernelError(XenbackendError):
    """The host kernel refused an operation, which `operation` describes in words."""

    def __init__(self, operation: str, errno: int) -> None:
        super().__init__(f"{operation}: {os.strerror(errno)}")
        self.operation = operation
        self.errno = errno


class StoreError(XenbackendError):
    """Xenstore refused an operation: `errno` is the code of its answer, or EIO if the connection is lost."""

    def __init__(self, problem: str, errno: int = errno_module.EIO) -> None:
        super().__init__(problem)
        self.errno = errno


_SHORTAGES = {
    errno_module.EMFILE, errno_module.ENFILE, errno_module.ENOMEM, errno_module.ENOBUFS, errno_module.ENOSPC,
    errno_module.EAGAIN,
}  # fmt: skip


def is_shortage(problem: BaseException) -> bool:
    """Return whether the host lacks a resource or has refused an operation, so that a later attempt may succeed."""
    is_short = isinstance(problem, OSError) and problem.errno in _SHORTAGES
    return is_short or isinstance(problem, KernelError | MemoryError)


_OF_STORAGE = {errno_module.EDQUOT, errno_module.EROFS, errno_module.EIO}


def unwritable(sentence: str, error: OSError) -> XenbackendError:
    """Return the error for a file that cannot be written: a ConfigError, unless storage or host are at fault."""
    return (XenbackendError if is_shortage(error) or error.errno in _OF_STORAGE else ConfigError)(sentence)


def sentence_of(problem: Exception) -> str:
    """Return what an error says to a person; of an OSError the file and the reason, without the number."""
    if not isinstance(problem, OSError):
        return str(problem)
    where = f"{printable(str(problem.filename))}: " if problem.filename else ""
    return f"{where}{problem.strerror or problem}"


def printable(text: str) -> str:
    """Return a text with all non-printable characters escaped, so that it cannot move the cursor or start a line."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _columns(text: str) -> int:
    """Return how many columns a text takes on a terminal."""
    shown = [char for char in printable(text) if not unicodedata.combining(char)]
    return sum(2 if unicodedata.east_asian_width(char) in "FW" else 1 for char in shown)
