"""Descriptors in slots: in the keeper, in the notes, and open."""

from __future__ import annotations

import os

import pytest

from tests.descriptors import open_descriptors
from xenbackend.supervisor.vbd.slots import Slots


class Place:
    """Notes and a keeper, as far as slots use them."""

    def __init__(self) -> None:
        self.noted: dict[str, str] = {}
        self.kept: dict[str, int] = {}
        self.slots = Slots("f", lambda: self.noted, self._note, self.kept.__setitem__, self.kept.__delitem__)

    def _note(self, texts: dict[str, str]) -> None:
        self.noted = texts


@pytest.fixture
def place() -> Place:
    """Return a place with no slot in use."""
    return Place()


def descriptor() -> int:
    """Return a new descriptor."""
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def test_a_slot_is_free_that_neither_notes_nor_descriptors_use(place: Place) -> None:
    """A slot is free if it is neither noted nor has an open descriptor."""
    place.noted = {"f0": "of an earlier service"}
    place.slots.put("f1", descriptor())
    place.noted |= {"f2": ""}

    assert "f3" == place.slots.free()
    place.slots.leave()


def test_another_descriptor_takes_the_place_of_the_former(place: Place) -> None:
    """Another descriptor in a slot replaces the former one in the keeper, and the former is closed."""
    before = open_descriptors()
    place.slots.put("f0", descriptor())
    second = descriptor()
    place.slots.put("f0", second)

    assert ({"f0": second}, second, True) == (place.kept, place.slots["f0"], "f0" in place.slots)
    place.slots.drop("f0")
    assert ({}, before) == (place.kept, open_descriptors())
    place.slots.drop("f0")


def test_what_is_not_noted_is_let_go(place: Place) -> None:
    """`drop_unnoted` drops the descriptors whose slots are not noted."""
    for slot in ("f0", "f1"):
        place.slots.put(slot, descriptor())
    place.slots.note({"f1": "still there"})
    place.slots.drop_unnoted()

    assert ["f1"] == [*place.kept] == [*place.slots.descriptors()]
    place.slots.leave()


def test_a_service_that_leaves_closes_its_own_only(place: Place) -> None:
    """A service that leaves closes its own copies; the keeper has the descriptors for the next one, by slot."""
    before = open_descriptors()
    place.slots.put("f0", descriptor())
    place.slots.leave()

    assert (["f0"], {}, before) == ([*place.kept], place.slots.descriptors(), open_descriptors())
    found = descriptor()
    place.slots.find("f0", found)
    assert found == place.slots["f0"]
    place.slots.leave()
