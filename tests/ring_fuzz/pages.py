"""The pages that messages name: a guest's, good and bad ones, and one list page for each slot.

Must not be granted after anything else of the guest: messages name pages by their grefs.
"""

from __future__ import annotations

from tests.ring_fuzz.judge import Agreement, Verdict
from tests.ring_fuzz.messages import ATTACKED, FIRST, POOL, SECTORS
from xenbackend.blkif.abi import Layout
from xenbackend.rig.guest import Guest
from xenbackend.rig.table import ENTRIES
from xenbackend.units import PAGE, SECTOR

LISTS = 512  # list pages, one for each slot of the largest ring that is used
GNTST = (-1, -2, -3, -8, -9, -10, -11, -12)  # grant_table.h
SILENCE = (b"canary" * 1024)[:PAGE]  # of a page that nobody may write to


class Pages:
    """Good pages first, then ones that fail in every way there is.

    silent   pages that nobody may write to
    """

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        frames = guest.allocate(POOL + LISTS)
        self.frames: dict[int, int] = {}
        self.writable: set[int] = set()
        self.readable: set[int] = set()
        self.silent: list[memoryview] = []
        for place, frame in enumerate(frames[:POOL]):
            only_read = 40 <= place < 48
            foreign = 48 <= place < 52
            gref = guest.grant(frame, read_only=only_read, domid=7 if foreign else 0)
            assert gref == FIRST + place, "messages name pages by their grefs"
            self.frames[gref] = frame
            if place >= 52 and place < 52 + len(GNTST):
                guest.fail(gref, GNTST[place - 52])
            elif place < 40 or place >= 60:
                self.writable.add(gref)
                self.readable.add(gref)
            elif only_read:
                self.readable.add(gref)
            if gref not in self.writable:
                guest.page(frame)[:] = SILENCE
                self.silent.append(guest.page(frame))
        self.lists: list[int] = []
        self.list_pages: list[memoryview] = []
        for frame in frames[POOL:]:
            gref = guest.grant(frame, read_only=True)
            self.lists.append(gref)
            self.list_pages.append(guest.page(frame))
            self.frames[gref] = frame
            self.readable.add(gref)

    def agree(self, layout: Layout, *, read_only: bool, can_flush: bool, can_discard: bool) -> Agreement:
        """Return what a connection of this guest's has agreed on."""
        return Agreement(
            layout, SECTORS, read_only, can_flush, can_discard, 256,
            frozenset(self.frames), frozenset(self.readable), frozenset(self.writable), frozenset(self.lists),
            lambda gref: self.guest.page(self.frames[gref]), self._is_strange,
        )  # fmt: skip

    def are_touched(self) -> bool:
        """Return whether a page was written to that the guest has not granted for it."""
        return any(bytes(page) != SILENCE for page in self.silent)

    def _is_strange(self, gref: int) -> bool:
        return gref not in self.frames and gref < ENTRIES and self.guest.table.entries[gref] != 0


def is_harmless(verdict: Verdict, agreed: Agreement) -> bool:
    """Return whether what it does to the disk is not what a guest does to its own first half."""
    if verdict.is_strange:
        return False
    if verdict.is_open:
        return verdict.operation == 0 or agreed.read_only
    if verdict.disk is None or verdict.disk[0] in (0, 2):
        return True
    return verdict.disk[1] >= ATTACKED * SECTOR
