"""Tests of `xenbackend.block.mapped.tables`."""

from __future__ import annotations

from random import Random

from xenbackend.block.mapped.tables import Tables


def test_what_was_used_last_stays() -> None:
    """The tables used last are kept, at most twice the limit. An old table that is used again counts as new."""
    tables: Tables[str] = Tables(3)
    for number in range(20):
        tables.put(number, f"t{number}")
        assert f"t{number}" == tables.find(number)
        assert "t0" == tables.find(0)
        assert len(tables) <= 6

    assert (None, None) == (tables.find(1), tables.find(99))
    assert tables.find(19) is tables.young[19]


def test_pinned_tables_stay() -> None:
    """A pinned table is never dropped, until it has been unpinned as often as it was pinned."""
    tables: Tables[str] = Tables(2)
    tables.put(7, "kept")
    tables.pin(7)
    tables.pin(7)
    tables.unpin(7)
    for number in range(100, 140):
        tables.put(number, "")
    assert "kept" == tables.find(7)

    tables.unpin(7)
    for number in range(200, 240):
        tables.put(number, "")
    assert tables.find(7) is None


def test_a_dropped_table_is_gone() -> None:
    """A dropped table is loaded again, whether it was new or old."""
    tables: Tables[str] = Tables(1)
    tables.put(1, "old")
    tables.put(2, "young")
    tables.drop(1)
    tables.drop(2)

    assert (None, None, 0) == (tables.find(1), tables.find(2), len(tables))


def test_it_never_forgets_more_than_it_says() -> None:
    """Whatever the order of use, the last `limit` different tables are found."""
    chance, tables, last = Random(1), Tables[int](4), list[int]()
    for _ in range(2000):
        number = chance.randrange(12)
        assert number not in last or number == tables.find(number)
        if tables.find(number) is None:
            tables.put(number, number)
        last = [*(each for each in last if each != number), number][-4:]
