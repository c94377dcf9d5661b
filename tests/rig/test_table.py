"""The grant table in shared memory."""

from __future__ import annotations

import os

import pytest

from xenbackend.rig.table import (
    ENTRIES,
    GNTST_BAD_GNTREF,
    GNTST_BAD_PAGE,
    GNTST_PERMISSION_DENIED,
    GTF_READING,
    GTF_WRITING,
    SIZE,
    Table,
)


@pytest.fixture
def table() -> Table:
    """The table of a domain of 10 pages."""
    fd = os.memfd_create("table")
    os.ftruncate(fd, SIZE)
    table = Table(fd, pages=10)
    os.close(fd)
    return table


def test_entry_layout(table: Table) -> None:
    """An entry is flags u16, domid u16, frame u32, as `struct grant_entry_v1` of public/grant_table.h."""
    table.set(9, 3, 7, read_only=True)

    assert bytes.fromhex("0500 0300 07000000") == bytes(table.entries[9:10].cast("B"))


@pytest.mark.parametrize(
    ("gref", "domid", "writable", "expected"),
    [
        (8, 0, True, 4),
        (8, 0, False, 4),
        (8, 1, False, GNTST_PERMISSION_DENIED),
        (9, 0, False, 5),
        (9, 0, True, GNTST_PERMISSION_DENIED),
        (10, 0, False, GNTST_BAD_GNTREF),
        (11, 0, False, GNTST_BAD_PAGE),
        (12, 0, False, -12),
        (ENTRIES, 0, False, GNTST_BAD_GNTREF),
        (2**32 - 1, 0, False, GNTST_BAD_GNTREF),
        (-1, 0, False, GNTST_BAD_GNTREF),
    ],
)
def test_access_is_decided(table: Table, gref: int, domid: int, *, writable: bool, expected: int) -> None:
    """A gref gives its frame to the domain that it names, with the access that it allows; all else is refused."""
    table.set(8, 0, 4, read_only=False)
    table.set(9, 0, 5, read_only=True)
    table.set(11, 0, 10, read_only=False)
    table.set(12, 0, 6, read_only=False)
    table.faults[12] = -12

    assert expected == table.frame(gref, domid, writable=writable)


def test_mark_touches_only_its_flags(table: Table) -> None:
    """Marking a page as in use keeps the flags that the guest wrote, and clearing the mark restores them."""
    table.set(8, 0, 4, read_only=False)
    before = table.entries[8]
    table.mark(8, GTF_READING | GTF_WRITING)
    assert table.in_use(8)
    assert 4 == table.frame(8, 0, writable=True)
    table.mark(8, 0)

    assert before == table.entries[8]
