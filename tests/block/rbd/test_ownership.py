"""Tests of `xenbackend.block.rbd.ownership`: whom a worker blocklists before it takes a lock, and in which order."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from xenbackend.block.rbd.noted import SIZE, Noted
from xenbackend.block.rbd.ownership import DEAD_S, SILENT_S, mark, take
from xenbackend.ceph.image import Owner
from xenbackend.errors import DriverError

FORMER = Owner("client.1", "auto 1", "10.0.0.1:0/1")
OTHER = Owner("client.2", "auto 2", "10.0.0.2:0/2")
MINE = "10.0.0.1:0/9"


class Place:
    """A cluster with one image, which records each step. It can end the process before any of them.

    fails    the errno with which a step ends, by its first word
    """

    user = "xen"

    def __init__(self, *owners: Owner, watchers: tuple[str, ...] = (), ends_before: int = 99) -> None:
        self.held = list(owners)
        self.seen = list(watchers)
        self.steps: list[str] = []
        self.marked = ""
        self.fails: dict[str, int] = {}
        self.noted = Noted(memoryview(bytearray(SIZE)))
        self._ends_before = ends_before

    def address(self) -> str:
        """Return our own address."""
        return MINE

    def refuse(self, address: str, seconds: float) -> None:
        """Record the step."""
        self._do(f"refuse {address} {seconds:g}")

    def owners(self) -> list[Owner]:
        """Return the owners of the lock."""
        return self.held

    def watchers(self) -> list[str]:
        """Return the clients that watch the image."""
        return self.seen

    def break_lock(self, owner: Owner) -> None:
        """Record the step."""
        self._do(f"break {owner.address}")
        self.held = []

    def acquire(self) -> None:
        """Record the step, with the address that is noted by then."""
        self._do(f"acquire {self.noted.text}")

    def mark(self) -> str:
        """Return which disk was served from the image last."""
        return self.marked

    def set_mark(self, disk: str) -> None:
        """Record the step."""
        self._do(f"mark {disk}")
        self.marked = disk

    def take(self) -> list[str]:
        """Take the lock, and return the steps."""
        take(self, self, self.noted)
        return self.steps

    def _do(self, step: str) -> None:
        if len(self.steps) == self._ends_before:
            raise KeyboardInterrupt
        self.steps.append(step)
        if code := self.fails.get(step.split(maxsplit=1)[0]):
            raise DriverError(step, errno=code)


def test_a_predecessor_is_refused_before_its_lock_is_taken() -> None:
    """A predecessor is blocklisted before its lock is broken, and our own address is noted before we take the lock."""
    place = Place(FORMER, watchers=(FORMER.address,))
    place.noted.text = FORMER.address
    fence = f"refuse {FORMER.address} {DEAD_S:g}"
    assert [fence, f"break {FORMER.address}", f"acquire {MINE}"] == place.take()


def test_a_predecessor_without_the_lock_is_refused_all_the_same() -> None:
    """A predecessor without the lock is blocklisted too, because its last requests may still be on their way."""
    place = Place()
    place.noted.text = FORMER.address
    assert [f"refuse {FORMER.address} {DEAD_S:g}", f"acquire {MINE}"] == place.take()


def test_nobody_is_kept_out_where_nobody_was() -> None:
    """With a free lock and no predecessor, the right to blocklist is tested with an address that nobody has."""
    assert ["refuse 192.0.2.1:0/9 1", f"acquire {MINE}"] == Place().take()


def test_a_stranger_who_is_alive_is_left_alone() -> None:
    """If another client that is alive has the lock, opening is refused with its name before anything is done, even if
    there is a predecessor.
    """
    for text in ("", FORMER.address):
        place = Place(OTHER, watchers=(OTHER.address,))
        place.noted.text = text
        with pytest.raises(DriverError, match=r"in use by client\.2 at 10\.0\.0\.2:0/2") as caught:
            place.take()
        assert errno.EBUSY == caught.value.errno
        assert [] == place.steps
        assert text == place.noted.text


def test_a_stranger_who_is_silent_is_kept_out() -> None:
    """An owner that no longer watches the image is blocklisted before its lock is taken, longer than a predecessor."""
    fence = f"refuse {OTHER.address} {SILENT_S:g}"
    assert SILENT_S > DEAD_S
    assert [fence, f"break {OTHER.address}", f"acquire {MINE}"] == Place(OTHER).take()


def test_a_lock_that_was_made_by_hand_is_left_alone() -> None:
    """The owner of a lock made by `rbd lock add` never watches, but does not count as silent: the error names it."""
    place = Place(Owner("client.3", "maintenance", "10.0.0.3:0/3"))
    with pytest.raises(DriverError, match=r"the lock 'maintenance', which client\.3 at 10\.0\.0\.3:0/3") as caught:
        place.take()
    assert errno.EBUSY == caught.value.errno
    assert [] == place.steps


def test_whoever_took_too_long_takes_no_lock() -> None:
    """If the note belongs to another opening by now, it is left unchanged, and the lock is not taken."""

    @contextmanager
    def refuse() -> Iterator[None]:
        raise DriverError("somebody else opens it")
        yield

    place = Place(FORMER)
    place.noted.text = FORMER.address
    with pytest.raises(DriverError, match="somebody else"):
        take(place, place, place.noted, refuse)
    assert FORMER.address == place.noted.text
    assert not any(step.startswith("acquire") for step in place.steps)


def test_one_that_was_quicker_is_named() -> None:
    """If another client takes the lock in between, opening is refused as if it had had it before."""
    place = Place()
    place.fails["acquire"] = errno.EROFS
    place.held = []
    with pytest.raises(DriverError, match="in use by somebody") as caught:
        place.take()
    assert errno.EBUSY == caught.value.errno


@pytest.mark.parametrize("text", ["", FORMER.address])
def test_a_key_that_keeps_nobody_out_takes_no_lock(text: str) -> None:
    """Without the right to blocklist, the lock is neither broken nor taken, and the error names the right."""
    place = Place(*([FORMER] if text else []))
    place.noted.text = text
    place.fails["refuse"] = errno.EACCES
    with pytest.raises(DriverError, match="mon 'profile rbd'"):
        place.take()
    assert 1 == len(place.steps)
    assert text == place.noted.text


@pytest.mark.parametrize("steps", range(3))
def test_killed_on_the_way(steps: int) -> None:
    """If a worker dies before it has the lock, the next one still blocklists the former owner."""
    place = Place(FORMER, ends_before=steps)
    place.noted.text = FORMER.address
    with pytest.raises(KeyboardInterrupt):
        place.take()
    has_refused = bool(place.steps)
    assert place.noted.text == (FORMER.address if steps < 2 else MINE)
    assert has_refused or place.noted.text == FORMER.address


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("marked", ["", "ours", "theirs"])
def test_an_image_says_which_disk_it_serves(marked: str, *, goes_on: bool) -> None:
    """A disk that begins marks its image. One that goes on is refused if another disk has been served from it."""
    place = Place()
    place.marked = marked
    if goes_on and marked != "ours":
        why = (
            r"the image has meanwhile been served as another disk \(theirs\).* 'ours'"
            if marked
            else "has not been served as any disk yet"
        )
        with pytest.raises(DriverError, match=why) as caught:
            mark(place, "ours", goes_on=goes_on)
        assert errno.ESTALE == caught.value.errno
        assert [] == place.steps
    else:
        mark(place, "ours", goes_on=goes_on)
        assert ([] if marked == "ours" else ["mark ours"]) == place.steps
