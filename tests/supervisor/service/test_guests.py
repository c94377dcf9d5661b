"""The names of guests, from a simulated xenstored and from one that does not answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.descriptors import open_descriptors
from xenbackend.errors import StoreError
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service import guests as guests_module
from xenbackend.supervisor.service.guests import REST_S, Guests
from xenbackend.supervisor.xenstore.store import Store


@pytest.fixture
def xenstored(tmp_path: Path) -> Iterator[Xenstored]:
    """A xenstored with 200 guests."""
    with Xenstored(tmp_path / "store") as started, Store(started.address) as store:
        for domid in range(1, 201):
            store.write(f"/local/domain/{domid}/name", f"guest-{domid}")
        yield started


def test_all_that_there_are_have_their_names(xenstored: Xenstored) -> None:
    """All names are found, however many there are; a domain without a name has none. After `close` the next question
    connects again.
    """
    guests = Guests(xenstored.address, time.monotonic)

    assert {domid: f"guest-{domid}" for domid in range(1, 201)} == guests.names_of(range(1, 300))
    assert ("guest-7", None) == (guests.one_by_one()(7), guests.one_by_one()(999))
    guests.close()
    assert {7: "guest-7"} == guests.names_of([7])
    guests.close()


def test_a_xenstored_that_says_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If xenstored does not answer, no guest has a name, and for a while xenstored is not asked again. An order that
    needs a name gets an error.
    """
    monkeypatch.setattr(guests_module, "ANSWER_S", 0.2)
    now = [0.0]
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "store"))
        silent.listen()
        guests = Guests(str(tmp_path / "store"), lambda: now[0])
        begun = time.monotonic()
        names = guests.names_of(range(1000))
        took_s = time.monotonic() - begun
        monkeypatch.setattr(Store, "__init__", pytest.fail)  # it is not asked
        again = guests.names_of([5])
        with pytest.raises(StoreError, match="write a domain's number"):
            guests.one_by_one()(5)
        monkeypatch.undo()

    assert ({}, {}) == (names, again)
    assert took_s < 5
    (tmp_path / "store").unlink()
    with Xenstored(tmp_path / "store") as back, Store(back.address) as store:
        store.write("/local/domain/5/name", "mail")
        now[0] = REST_S + 1
        assert {5: "mail"} == guests.names_of([5])
        guests.close()


def test_no_connection_is_kept(xenstored: Xenstored) -> None:
    """No connection stays open after names were asked for."""
    before = len(open_descriptors())
    guests = Guests(xenstored.address, time.monotonic)
    guests.names_of([5])

    assert before == len(open_descriptors())


def test_one_that_says_no_is_asked_again(xenstored: Xenstored) -> None:
    """If a driver domain may not read a name, that guest has none, and xenstored is asked again the next time."""
    with Store(xenstored.address) as store:
        store.set_permissions("/local/domain/5/name", ["n0"])
    guests = Guests(xenstored.add_domain_socket(7), time.monotonic)

    assert {} == guests.names_of([5])
    assert None is guests.one_by_one()(5)
    with Store(xenstored.address) as store:
        store.set_permissions("/local/domain/5/name", ["n0", "r7"])
    assert {5: "guest-5"} == guests.names_of([5])
    guests.close()


def test_a_name_that_may_not_be_read_is_no_other_ones_loss(xenstored: Xenstored) -> None:
    """A driver domain that may read the names of some guests gets all of those, wherever the others are among them."""
    with Store(xenstored.address) as store:
        for domid in range(1, 201):
            store.set_permissions(f"/local/domain/{domid}/name", ["n0", *["r7"] * (domid % 5 != 0)])
    guests = Guests(xenstored.add_domain_socket(7), time.monotonic)

    assert {domid: f"guest-{domid}" for domid in range(1, 201) if domid % 5} == guests.names_of(range(1, 300))


def test_a_xenstored_that_was_started_anew_is_asked_at_once(tmp_path: Path) -> None:
    """A xenstored that has been restarted is asked at once."""
    guests = Guests(str(tmp_path / "store"), time.monotonic)
    found = []
    for name in ("mail", "news"):
        with Xenstored(tmp_path / "store") as started, Store(started.address) as store:
            store.write("/local/domain/5/name", name)
            found += [guests.names_of([5]), guests.one_by_one()(5)]
            guests.close()

    assert [{5: "mail"}, "mail", {5: "news"}, "news"] == found


def test_a_slow_xenstored_is_asked_no_longer_than_for_one_round_beyond_the_limit(
    xenstored: Xenstored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the time limit has passed, no further round of questions begins, and the names that have arrived are
    returned. A round is small, because it may itself take as long as the limit.
    """
    now = [0.0]
    send = Store._send

    def slow(store: Store, *given: Any) -> int:
        now[0] += guests_module.ANSWER_S / 20
        return send(store, *given)

    guests = Guests(xenstored.address, lambda: now[0])
    monkeypatch.setattr(Store, "_send", slow)
    names = guests.names_of(range(1, 201))
    guests.close()

    assert 1 <= now[0] / guests_module.ANSWER_S < 2
    assert 20 <= len(names) < 40


def test_whose_name_it_is_is_looked_for_no_longer_than_a_while(
    xenstored: Xenstored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search for the guest with a given name is limited in time, and then the order is refused: with hundreds of
    guests a slow xenstored would keep the service busy for minutes.
    """
    now = [0.0]
    send = Store._send

    def slow(store: Store, *given: Any) -> int:
        now[0] += guests_module.ANSWER_S * 0.9
        return send(store, *given)

    guests = Guests(xenstored.address, lambda: now[0])
    name_of = guests.one_by_one()
    monkeypatch.setattr(Store, "_send", slow)
    with pytest.raises(StoreError, match="write a domain's number"):
        list(map(name_of, range(1, 201)))
    found = [guests.one_by_one()(domid) for domid in (1, 2)]
    guests.close()

    assert ["guest-1", "guest-2"] == found
    assert now[0] < 2 * guests_module.FIND_S


def test_where_no_xenstored_can_be_reached_it_is_not_tried_for_a_while(tmp_path: Path) -> None:
    """If no xenstored can be reached, the next try comes after a while, since each may take long. A connection that is
    lost after a success does no harm.
    """
    now = [0.0]
    guests = Guests(str(tmp_path / "store"), lambda: now[0])
    found = [guests.names_of([5])]
    for name in ("mail", "news"):
        with Xenstored(tmp_path / "store") as started, Store(started.address) as store:
            store.write("/local/domain/5/name", name)
            found.append(guests.names_of([5]))
            now[0] += REST_S + 1
            name_of = guests.one_by_one()
            assert name == name_of(5)
        with pytest.raises(StoreError):
            name_of(5)
    now[0] += REST_S + 1
    with Xenstored(tmp_path / "store") as started, Store(started.address) as store:
        store.write("/local/domain/5/name", "late")
        assert "late" == guests.one_by_one()(5)
        guests.close()

    assert [{}, {}, {}] == found


def test_many_are_asked_for_at_once(xenstored: Xenstored, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen names are asked for in one round trip, which takes most of the time."""
    sent: list[int] = []
    waits: list[int] = []
    send, take = Store._send, Store._take_reply

    def sending(store: Store, *given: Any) -> int:
        sent.append(len(sent))
        return send(store, *given)

    def taking(store: Store, *given: Any) -> bytes:
        waits.append(len(sent))
        return take(store, *given)

    monkeypatch.setattr(Store, "_send", sending)
    monkeypatch.setattr(Store, "_take_reply", taking)

    assert 32 == len(Guests(xenstored.address, time.monotonic).names_of(range(1, 33)))
    assert {16, 32} == set(waits)
