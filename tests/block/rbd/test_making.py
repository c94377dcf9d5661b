"""Tests of `xenbackend.block.rbd.making`: the names of images that are being made, and whose lock may be taken."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from tests.block.rbd.test_ownership import FORMER, OTHER, Place
from xenbackend.block.rbd.making import _take_from, partial_of
from xenbackend.block.rbd.ownership import SILENT_S
from xenbackend.block.spec import parse_chain
from xenbackend.ceph.image import Owner
from xenbackend.errors import DriverError


@pytest.mark.parametrize(
    ("text", "partial"),
    [
        ("rbd:rbd/a", "rbd:rbd/a.partial"),
        ("rbd:p/n/a,id=x,conf=/c", "rbd:p/n/a.partial,id=x,conf=/c"),
        (r"rbd:a\,b/c\|d,id=x", r"rbd:a\,b/c\|d.partial,id=x"),
    ],
)
def test_what_is_being_made_is_called_otherwise(text: str, partial: str) -> None:
    """An image that is being made has `.partial` behind its name. Options and escapes are kept."""
    assert partial == partial_of(parse_chain(text).layers[0])


def test_a_snapshot_is_not_made() -> None:
    """A snapshot cannot be made, since it can only be opened read-only."""
    with pytest.raises(DriverError, match="can only be opened read-only"):
        partial_of(parse_chain("rbd:a/b@c").layers[0])


def take(place: Place, owner: str) -> Owner:
    """Take the lock."""
    it: Any = place
    return _take_from(it, it, owner)


@pytest.mark.parametrize("name", [FORMER.client, FORMER.address])
def test_an_owner_that_is_named_is_kept_out_first(name: str) -> None:
    """The owner that is named is blocklisted first, whether it still watches or not. Then its lock is broken."""
    place = Place(FORMER, watchers=(FORMER.address,))
    assert FORMER == take(place, name)
    assert [f"refuse {FORMER.address} {SILENT_S:g}", f"break {FORMER.address}"] == place.steps


@pytest.mark.parametrize(("owner", "code"), [(OTHER, errno.EBUSY), (None, errno.ENOENT)])
@pytest.mark.parametrize("named", ["", FORMER.client, "client.", "client.11"])
def test_nobody_else_is_touched(owner: Owner | None, code: int, named: str) -> None:
    """If the owner is not the one that was named, or there is none, nothing is done, and the error says which it is."""
    place = Place(*([owner] if owner else []))
    with pytest.raises(DriverError, match=OTHER.client if owner else "no client") as caught:
        take(place, named)
    assert code == caught.value.errno
    assert [] == place.steps


def test_a_lock_by_hand_is_left_to_who_made_it() -> None:
    """A lock made by `rbd lock add` is left alone, because its owner is not a client that could be kept out."""
    place = Place(Owner("client.3", "maintenance", "10.0.0.3:0/3"))
    with pytest.raises(DriverError, match="rbd lock rm"):
        take(place, "client.3")
    assert [] == place.steps


def test_a_key_that_may_keep_nobody_out_takes_nothing() -> None:
    """If the key may not blocklist clients, the lock is not broken."""
    place = Place(FORMER)
    place.fails["refuse"] = errno.EACCES
    with pytest.raises(DriverError, match="mon 'profile rbd'"):
        take(place, FORMER.client)
    assert not any(step.startswith("break") for step in place.steps)
