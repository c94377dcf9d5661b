"""What is seen of one vbd in a simulated xenstored."""

from __future__ import annotations

import pytest

from tests.supervisor.helpers import PATH, write_like_libxl
from xenbackend.blkif.handshake import XenbusState
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.xenstore.lookout import Lookout
from xenbackend.supervisor.xenstore.store import Store

STATE = f"{PATH.frontend}/state"


@pytest.fixture
def lookout(xenstored: Xenstored, toolstack: Store) -> Lookout:
    """A lookout for a vbd as libxl makes it."""
    write_like_libxl(toolstack)
    return Lookout(Store(xenstored.address), PATH)


def test_both_ends_are_seen(lookout: Lookout, toolstack: Store) -> None:
    """The keys are those of the backend's directory; the state is the frontend's, whose keys can be read then."""
    keys = lookout.keys()
    assert keys is not None
    assert ("null:1G", XenbusState.INITIALISING) == (keys["params"], lookout.theirs(keys))
    assert PATH.backend == lookout.read_frontend("backend")
    toolstack.remove(PATH.backend)

    assert lookout.keys() is None
    assert XenbusState.UNKNOWN is lookout.theirs({})


def test_a_change_of_the_frontend_wakes_us(lookout: Lookout, toolstack: Store) -> None:
    """The first look sets a watch, and only once; a frontend elsewhere is watched instead; in the end nobody is."""
    store = lookout._store
    lookout.theirs(lookout.keys() or {})
    lookout.theirs(lookout.keys() or {})
    store.events()
    toolstack.write(STATE, "3")
    store.own_domid()  # its answer comes after the event
    assert [(STATE, lookout.token)] == store.events()
    lookout.theirs({"frontend": "/local/domain/5/device/vbd/1"})
    store.events()
    toolstack.write(STATE, "4")
    store.own_domid()
    assert [] == store.events()
    lookout.forget()
    toolstack.write("/local/domain/5/device/vbd/1/state", "4")
    store.own_domid()

    assert [] == store.events()


def test_a_frontend_of_another_domain_is_not_looked_at(lookout: Lookout) -> None:
    """R15: a path that leads elsewhere is as good as none."""
    assert XenbusState.UNKNOWN is lookout.theirs({"frontend": "/local/domain/0/device/vbd/51712"})
    assert "" == lookout.frontend


def test_the_chain_gets_its_name(lookout: Lookout, toolstack: Store) -> None:
    """Params name the chain that took the other one's place; what the toolstack has changed meanwhile stays its own."""
    toolstack.write(f"{PATH.backend}/state", "4")
    lookout.rename_chain("null:1G", "null:2G")
    named = toolstack.read(f"{PATH.backend}/params")
    lookout.rename_chain("null:1G", "null:3G")

    assert "null:2G" == named == toolstack.read(f"{PATH.backend}/params")


def test_a_vbd_that_was_made_anew_or_is_gone_gets_no_name(lookout: Lookout, toolstack: Store) -> None:
    """A new vbd in the same place has the disk that its toolstack gave it; one that is gone does not come back."""
    lookout.rename_chain("null:1G", "null:2G")
    assert "null:1G" == toolstack.read(f"{PATH.backend}/params")
    toolstack.remove(PATH.backend)
    lookout.rename_chain("null:1G", "null:2G")

    assert toolstack.read_optional(PATH.backend) is None
