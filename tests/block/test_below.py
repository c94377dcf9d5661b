"""Descriptions of what lies below a filter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers_block import Machine
from xenbackend.block.below import changed_ns, describe


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Return a machine that is closed after the test."""
    machine = Machine()
    yield machine
    machine.close()


def text_of(machine: Machine, chain: str, *, with_changes: bool = False) -> str:
    """Return the description of what is below the top layer of a chain."""
    found = machine.open(chain, checked=False, read_only=True)
    try:
        return describe(found.layers[0].driver.next, machine.files, with_changes=with_changes)
    finally:
        found.close()


def test_it_is_the_files_and_what_alters_them(machine: Machine, tmp_path: Path) -> None:
    """The description names the files and the layers that alter what is read, and no layer that does not."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    plain = text_of(machine, f"log:|aio:{tmp_path}/a")

    assert plain == text_of(machine, f"log:|delay:|readahead:|aio:{tmp_path}/a,cache=on")
    others = [f"log:|offset:start=4K|aio:{tmp_path}/a", f"log:|aio:{tmp_path}/b", "log:|ram:1M", "log:|ram:2M"]
    assert len({plain, *(text_of(machine, each) for each in others)}) == 5


def test_a_change_counts_if_it_is_to(machine: Machine, tmp_path: Path) -> None:
    """The description includes a file's time of change if the caller asks for it. The time can be asked for alone."""
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    chain = f"log:|aio:{tmp_path}/a"
    before = [text_of(machine, chain, with_changes=each) for each in (False, True)]
    os.utime(tmp_path / "a", ns=(0, 10**18 + 5))
    after = [text_of(machine, chain, with_changes=each) for each in (False, True)]

    assert [True, False] == [old == new for old, new in zip(before, after, strict=True)]
    found = machine.open(chain, checked=False, read_only=True)
    assert 10**18 + 5 == changed_ns(found.layers[0].driver.next, machine.files)
    assert 0 == changed_ns(None, machine.files)
    found.close()
