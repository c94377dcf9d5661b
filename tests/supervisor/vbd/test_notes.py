"""What the service remembers of a disk, in a memory of its own."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest

from tests.supervisor.helpers import PATH, Kept
from xenbackend import journal
from xenbackend.errors import ConfigError
from xenbackend.kernel import memfd
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.vbd import notes
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.inheritance import prefix_of, sort_inherited
from xenbackend.supervisor.vbd.notes import Claimed, Exchange, Notes
from xenbackend.units import PAGE


def test_notes_have_their_types(kept: Kept) -> None:
    """The next service reads the notes with their types. A value that cannot be stored is refused with a sentence, and
    the former notes stay. So a memory with too long a name is refused: no successor would get it.
    """
    noted = Notes(
        "null:1G", Exchange(2**63, "params", "null:\udcff"), ["stale"], "uid 0", "read=retry",
        Claimed({"state": "1"}, ["n0", "r5"], is_in_libxl=True),
    )  # fmt: skip
    handover = Handover(kept.keeper(), PATH)
    handover.note(**{name: getattr(noted, name) for name in noted.__slots__})
    for much in ("x" * notes.SIZE, "\ud800"):
        with pytest.raises(ConfigError, match="cannot record"):
            handover.note(policy=much)
    assert "cannot record" in handover.keep("x" * 100_000, os.memfd_create("long"))
    handover.leave()
    keeper = kept.keeper()
    heir = Handover(keeper, PATH, sort_inherited(keeper, 0)[PATH])

    assert noted == handover.notes == heir.notes
    assert [] == list(heir.descriptors("null:1G")[1])
    assert [f"{prefix_of(PATH)}.{kind}.3" for kind in ("journal", "notes")] == list(kept.fds)
    heir.close()


def test_no_worker_is_given_the_notes() -> None:
    """A worker can neither read the notes in what it is given, nor change them by overwriting it."""
    handover = Handover(Keeper({}), PATH)
    handover.note(policy="secret")
    page, _ = handover.descriptors("null:1G")

    assert b"secret" not in os.pread(page, journal.RINGS_AT, 0)
    handover.page[: journal.RINGS_AT] = b"\xff" * journal.RINGS_AT
    assert Notes("null:1G", policy="secret") == notes.read(handover._notes_page)
    handover.close()


def test_names_of_memories_leave_room_for_what_counts() -> None:
    """Names of memories, which a hostile worker may choose, leave enough room in the notes for all the rest; a memory
    whose name has no room is refused.
    """
    handover = Handover(Keeper({}), PATH)
    handover.descriptors("null:1G")
    refusals = [handover.keep(f"{number}{'x' * 8000}", memfd.make("test", 4096)) for number in range(8)]
    handover.note(paused="root", program="1.2.3", exchange=Exchange(1, "\udcff" * 2048, "\udcff" * 2048))

    assert refusals.count("") == len(handover.notes.memories) == len(handover.descriptors("null:1G")[1]) < 8
    assert "cannot record" in refusals[-1]
    handover.close()


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize("most", ["files", "all"])
def test_the_end_of_an_exchange_can_always_be_noted(most: str, *, is_done: bool) -> None:
    """The end of an exchange can be noted even if the notes are full, since the worker has made it already."""
    handover = Handover(Keeper({}), PATH)
    handover.descriptors("aio:/a")
    if most == "all":
        handover.note(stale_params=["x" * 40 * PAGE])
    handover.note(exchange=Exchange(1, "aio:/a", "aio:/a"))

    kinds = ("next", "both") if is_done else ("both",)
    files: dict[str, str] = {}
    for count, size in ((100, 100), (10, 100), (1, 100), (1, 1)):
        with suppress(ConfigError):
            while True:
                first = len(files)
                more = {
                    f"f{number}": f"{kinds[number % len(kinds)]}|file device=1 inode={number}|/{'x' * size}"
                    for number in range(first, first + count)
                }
                handover.note(files={**files, **more})
                files |= more
    count = len(handover.notes.files)
    (handover.exchange_is_done if is_done else handover.exchange_is_not_done)()

    assert (None, count) == (handover.notes.exchange, len(handover.notes.files))
    handover.close()
