"""The parts of a bench that are in C, compiled once for all tests of a module that run whole benches."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend.bench import native
from xenbackend.bench.native import COMPILERS, Native


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """Return the parts as the compiler of this host makes them."""
    return native.build(tmp_path_factory.mktemp("native"))


@pytest.fixture(autouse=True)
def _built_once(built: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let benches use these parts, unless a test replaces the list of compilers."""
    build = native.build

    def find(directory: Path) -> Native:
        return built if native.COMPILERS is COMPILERS else build(directory)

    monkeypatch.setattr(native, "build", find)
