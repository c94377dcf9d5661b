"""What was seen of a vbd: which life it belongs to, what has started anew, and which chain `params` should name."""

from __future__ import annotations

import pytest

from tests.supervisor.world import NODE, PATH
from xenbackend.blkif.features import Limits, publish_at_probe
from xenbackend.blkif.handshake import XenbusState
from xenbackend.supervisor.vbd.events import Exchanged, Seen
from xenbackend.supervisor.vbd.reasons import Cause
from xenbackend.supervisor.vbd.sight import Sight

S = XenbusState
OURS = publish_at_probe(Limits())
SERVED = {**NODE, **OURS, "state": "4"}


def seen(*looks: dict[str, str] | None, has_past: bool = False) -> Sight:
    """Return a sight after some looks."""
    sight = Sight(PATH, has_past=has_past)
    for keys in looks:
        sight.look(Seen(keys, S.CONNECTED))
    return sight


@pytest.mark.parametrize(
    ("looks", "is_over"),
    [
        ([None], True),
        ([NODE], False),
        ([NODE, NODE], False),
        ([NODE, {**NODE, "state": "2"}], False),  # our state was written, and our keys were not
        ([SERVED, SERVED], False),
        ([SERVED, {**SERVED, "state": "2"}], False),  # as a claim puts it back
        ([SERVED, {key: text for key, text in SERVED.items() if key != "state"}], False),  # not a new one
        ([SERVED, {**SERVED, "state": "1"}], True),
        ([SERVED, {**NODE, "state": "4"}], True),
        ([SERVED, {**NODE, "state": "4", next(iter(OURS)): "1"}], False),
        ([SERVED, None, SERVED], True),
    ],
)
def test_a_life_ends_when_the_node_is_gone_or_made_anew(looks: list[dict[str, str] | None], *, is_over: bool) -> None:
    """A life ends when the node is gone, is back in Initialising, or has lost our keys: a toolstack does that only when
    it makes a vbd.
    """
    sight = seen(*looks)

    assert is_over == sight.is_over
    assert is_over == (sight.keys is None)


@pytest.mark.parametrize(("keys", "is_over"), [({**OURS, "state": "2"}, True), (OURS, True), ({"params": "x"}, False)])
def test_what_xenstore_has_taken_tells_a_node_from_one_that_was_made_anew(
    keys: dict[str, str], *, is_over: bool
) -> None:
    """Once our keys were written, a node without them is another vbd, even if they were never seen."""
    sight = seen(NODE)
    sight.was_written(keys)
    sight.look(Seen(NODE, S.CONNECTED))

    assert is_over == sight.is_over


@pytest.mark.parametrize(("node", "is_over"), [(SERVED, False), (NODE, True), ({**NODE, "state": "2"}, True)])
def test_a_past_is_that_of_a_node_with_our_keys(node: dict[str, str], *, is_over: bool) -> None:
    """What an earlier service has left belongs only to a node that has our keys."""
    assert is_over == seen(node, has_past=True).is_over


def test_the_mark_is_a_key_of_ours_that_was_seen() -> None:
    """The mark, which a write requires to exist, is one of our keys, and only once it was seen."""
    sight = seen(NODE)
    before = sight.mark
    sight.take_as_written(OURS)
    written = sight.mark
    sight.look(Seen(SERVED, S.CONNECTED))

    assert (None, None, True) == (before, written, sight.mark in OURS)


@pytest.mark.parametrize(
    ("before", "after", "causes"),
    [
        (S.UNKNOWN, S.INITIALISING, {Cause.ANEW, Cause.LET_GO}),
        (S.CONNECTED, S.INITIALISING, {Cause.ANEW, Cause.LET_GO}),
        (S.CLOSED, S.INITIALISED, {Cause.ANEW}),
        (S.INITIALISING, S.INITIALISED, set()),
        (S.CONNECTED, S.CLOSED, {Cause.LET_GO}),
        (S.CONNECTED, S.UNKNOWN, {Cause.LET_GO}),
        (S.CONNECTED, S.CLOSING, set()),
    ],
)
def test_what_a_frontend_does_takes_reasons_away(before: S, after: S, causes: set[Cause]) -> None:
    """Reasons are cleared when a frontend starts anew, even between two looks, or has no rings any more."""
    sight = Sight(PATH, has_past=False)
    first = sight.look(Seen(SERVED, before))

    assert Cause.KEYS in first
    assert causes == sight.look(Seen(SERVED, after))


def test_params_are_wanted_while_they_are_what_they_were() -> None:
    """After an exchange, `params` should name the new chain until that is seen; later values are the toolstack's."""
    sight = seen({**SERVED, "params": "null:2G"})
    sight.exchange(Exchanged(("null:2G",), "null:3G"))
    wanted = (sight.params, sight.spec and sight.spec.chain)
    sight.look(Seen({**SERVED, "params": "null:2G"}, S.CONNECTED))
    still = (sight.params, sight.spec and sight.spec.chain)
    sight.look(Seen({**SERVED, "params": "null:3G"}, S.CONNECTED))
    done = (sight.params, sight.spec and sight.spec.chain)
    sight.look(Seen({**SERVED, "params": "null:2G"}, S.CONNECTED))

    assert ("null:3G", "null:3G") == wanted == still
    assert (None, "null:3G") == done
    assert (None, "null:2G") == (sight.params, sight.spec and sight.spec.chain)


def test_a_chain_that_was_put_back_is_no_riddle() -> None:
    """After two exchanges that lead back to the first chain, nothing is left to write once that chain is seen."""
    sight = seen(SERVED)
    sight.exchange(Exchanged(("null:1G",), "null:2G"))
    sight.exchange(Exchanged(("null:2G",), "null:1G"))
    sight.look(Seen(SERVED, S.CONNECTED))

    assert sight.params is None
    sight.look(Seen({**SERVED, "params": "null:2G"}, S.CONNECTED))
    assert (None, "null:2G") == (sight.params, sight.spec and sight.spec.chain)


def test_an_exchange_that_was_known_before_the_first_look_counts() -> None:
    """An exchange that a new service knows of from the notes or the journal counts from its first look on."""
    sight = Sight(PATH, has_past=True)
    sight.exchange(Exchanged(("null:1G",), "null:2G"))
    sight.look(Seen(SERVED, S.CONNECTED))

    assert ("null:2G", "null:2G") == (sight.params, sight.spec and sight.spec.chain)


def test_params_of_a_node_that_is_being_made_are_its_own() -> None:
    """The `params` of a node in Initialising are kept: the toolstack has just written them."""
    sight = Sight(PATH, has_past=False)
    sight.exchange(Exchanged(("null:1G",), "null:2G"))
    sight.look(Seen(dict(NODE), S.CONNECTED))

    assert (None, "null:1G") == (sight.params, sight.spec and sight.spec.chain)
