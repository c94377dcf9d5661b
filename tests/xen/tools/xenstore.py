"""Looking into the host's xenstore, by its own tools: a test must not trust the client that it tests.

Must not interpret a value.
"""

from __future__ import annotations

import re

from tests.xen.tools.command import run

_LINE = re.compile(r'^(/[^\n]*?) = "(.*)"$', re.MULTILINE)


def read(path: str) -> str | None:
    """Return a value, None where there is no node."""
    result = run("xenstore-read", path, check=False)
    return None if result.status else result.out.removesuffix("\n")


def write(path: str, value: str) -> None:
    """Write a value."""
    run("xenstore-write", path, value)


def remove(path: str) -> None:
    """Remove a node and all below it."""
    run("xenstore-rm", path)


def tree(path: str) -> dict[str, str]:
    """Return everything below a path, as full path to value; values as xenstore-ls prints them."""
    return dict(_LINE.findall(run("xenstore-ls", "-f", path, check=False).out))
