"""The parts of a bench that are in C, compiled once for all tests of a module that run whole benches."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend.bench import native
from xenbackend.bench.native import COMPILERS, Native


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """Return what the compiler that is there makes."""
    return native.build(tmp_path_factory.mktemp("native"))


@pytest.fixture(autouse=True)
def _built_once(built: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a bench find it built, but where a test says that there are other compilers."""
    build = native.build

    def find(directory: Path) -> Native:
        return built if native.COMPILERS is COMPILERS else build(directory)

    monkeypatch.setattr(native, "build", find)
