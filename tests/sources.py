"""The sources of the package, for tests that look at all of them: each file is read and parsed once.

Must not know what tests look for.
"""

from __future__ import annotations

import ast
import gc
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PROJECT = TESTS.parent
PACKAGE = PROJECT / "xenbackend"
FILES = sorted(PACKAGE.rglob("*.py"))

in_one_process = pytest.mark.xdist_group("sources")  # or each of several would parse all of it


@cache
def tree_of(file: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(file.read_text())


@cache
def nodes_of(file: Path) -> tuple[ast.AST, ...]:
    """Return all nodes of a file's syntax tree, as `ast.walk` yields them."""
    nodes = tuple(ast.walk(tree_of(file)))
    gc.freeze()  # they stay, and no collection of a later test needs to look at them
    return nodes
