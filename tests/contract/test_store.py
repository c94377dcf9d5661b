"""What the client may expect of a xenstored: of the rig's and, if the host runs one, of the host's.

The host's is used below a directory of its own, which is removed afterwards. The tests cannot start a private
xenstored: without a hypervisor, C xenstored 4.17 crashes at the first write, and oxenstored does not start.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract import real
from tests.model import xenstore
from xenbackend.errors import StoreError
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.xenstore.nodes import Nodes
from xenbackend.supervisor.xenstore.store import Store

REAL = Path("/run/xenstored/socket")
Pair = tuple[Store, Store]


@pytest.fixture(params=["rig", "model", "host"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """Two clients of the same xenstored: the rig's, the same without a socket, the host's."""
    if request.param == "rig":
        with (
            Xenstored(tmp_path / "store") as xenstored,
            Store(xenstored.address) as one,
            Store(xenstored.address) as two,
        ):
            yield one, two
    elif request.param == "model":
        server = xenstore.Xenstored()
        with server.store(0) as one, server.store(0) as two:
            yield one, two
    elif REAL.is_socket():
        with Store(str(REAL)) as one, Store(str(REAL)) as two:
            yield one, two
    else:
        real.is_missing(f"no xenstored runs on this host: {REAL} is missing")


@pytest.fixture
def top(pair: Pair) -> Iterator[str]:
    """A directory that does not exist yet, for one test."""
    path = f"/tool/xenbackend-test-{os.getpid()}"
    yield path
    pair[0].remove(path)


def drained(store: Store) -> list[tuple[str, str]]:
    """Return the events of everything that xenstored has answered so far."""
    store.read_optional("/tool")
    return store.events()


def test_values_come_back_as_written(pair: Pair, top: str) -> None:
    """Any text, including the empty one, is read by every connection as it was written."""
    one, two = pair
    for value in ("log:|aio:/img", "", "größe", "a b\nc", "x" * 2000):
        one.write(f"{top}/value", value)

        assert two.read(f"{top}/value") == value


def test_a_missing_node_is_missing(pair: Pair, top: str) -> None:
    """Reading a missing node gives ENOENT or None, listing it gives nothing, and removing it is no error."""
    store, _ = pair
    with pytest.raises(StoreError) as caught:
        store.read(f"{top}/a")

    assert caught.value.errno == errno.ENOENT
    assert store.read_optional(f"{top}/a") is None
    assert store.directory(f"{top}/a") == []
    assert store.dictionary(f"{top}/a") == {}
    store.remove(f"{top}/a")
    store.remove(f"{top}/a/b/c")


def test_directories_list_their_children(pair: Pair, top: str) -> None:
    """Writing a node creates its parents with empty values. Listing a node gives its direct children only."""
    store, _ = pair
    store.write(f"{top}/a/b", "1")
    store.write(f"{top}/a/c", "2")
    store.mkdir(f"{top}/a/d")
    store.mkdir(f"{top}/a/b")
    store.write(f"{top}/a/c/deep", "3")

    assert sorted(store.directory(f"{top}/a")) == ["b", "c", "d"]
    assert store.dictionary(f"{top}/a") == {"b": "1", "c": "2", "d": ""}
    assert store.read_many(f"{top}/a", ["c", "none"]) == {"c": "2"}
    assert store.read(f"{top}/a") == ""


def test_removing_takes_all_below(pair: Pair, top: str) -> None:
    """If a node is removed, the nodes below it are removed too."""
    store, _ = pair
    store.write(f"{top}/a/b/c", "1")

    store.remove(f"{top}/a")

    assert store.directory(top) == []
    assert store.read_optional(f"{top}/a/b/c") is None


def test_a_listing_longer_than_one_reply_is_complete(pair: Pair, top: str) -> None:
    """A directory whose names exceed XENSTORE_PAYLOAD_MAX is listed completely, in parts (XS_DIRECTORY_PART)."""
    store, _ = pair
    names = [f"a-name-of-some-length-{number:03}" for number in range(400)]
    for name in names:
        store.write(f"{top}/{name}", "")

    assert sorted(store.directory(top)) == names


def test_permissions_come_back_as_set(pair: Pair, top: str) -> None:
    """Permissions are kept in their order, and new nodes inherit those of their parent."""
    store, _ = pair
    store.write(top, "")
    store.set_permissions(top, ["n0", "r5"])
    store.write(f"{top}/below", "")

    assert store.get_permissions(top) == ["n0", "r5"]
    assert store.get_permissions(f"{top}/below") == ["n0", "r5"]


def test_a_watch_fires_once_when_it_is_set(pair: Pair, top: str) -> None:
    """A new watch fires at once, whether its node exists or not."""
    store, _ = pair
    store.watch(top, "token")

    assert drained(store) == [(top, "token")]
    assert drained(store) == []


def test_a_watch_hears_of_its_node_and_below(pair: Pair, top: str) -> None:
    """A watch fires if its node, or a node below it, is written, created or removed. Other nodes do not fire it."""
    one, two = pair
    two.write(f"{top}/a", "")
    one.watch(f"{top}/a", "token")
    drained(one)

    two.write(f"{top}/a", "1")
    two.write(f"{top}/a/b", "1")
    two.write(f"{top}/ab", "1")
    assert drained(one) == [(f"{top}/a", "token"), (f"{top}/a/b", "token")]

    two.mkdir(f"{top}/a/c")
    assert drained(one) == [(f"{top}/a/c", "token")]

    two.remove(f"{top}/a/c")
    assert drained(one) == [(f"{top}/a/c", "token")]


def test_a_watch_hears_that_its_parent_was_removed(pair: Pair, top: str) -> None:
    """If a node is removed, the watches on nodes below it fire too, each with its own path."""
    one, two = pair
    two.write(f"{top}/a/b/c", "1")
    one.watch(f"{top}/a/b/c", "token")
    drained(one)

    two.remove(f"{top}/a")

    assert drained(one) == [(f"{top}/a/b/c", "token")]


def test_a_relative_watch_is_told_relative_paths(pair: Pair) -> None:
    """A watch on a path relative to our own domain reports relative paths in its events."""
    one, two = pair
    name = f"xenbackend-test-{os.getpid()}"
    one.watch(name, "token")
    drained(one)

    two.write(f"{name}/a", "")
    events = drained(one)
    two.remove(name)

    assert events == [(f"{name}/a", "token")]


def test_a_transaction_is_seen_only_when_committed(pair: Pair, top: str) -> None:
    """Others see nothing of a transaction before it is committed. Only then do its watches fire."""
    one, two = pair
    two.watch(top, "token")
    drained(two)

    def body(transaction: Nodes) -> None:
        transaction.write(f"{top}/a", "1")
        assert transaction.read(f"{top}/a") == "1"
        assert two.read_optional(f"{top}/a") is None
        assert drained(two) == []

    one.transact(body)

    assert two.read(f"{top}/a") == "1"
    assert (f"{top}/a", "token") in drained(two)


def test_a_transaction_sees_the_tree_as_it_began(pair: Pair, top: str) -> None:
    """A transaction does not see what others write after its start. If it depends on it, its commit gives EAGAIN."""
    one, two = pair
    one.write(f"{top}/a", "old")
    seen = []

    def body(transaction: Nodes) -> None:
        seen.append(transaction.read(f"{top}/a"))
        two.write(f"{top}/a", "new")
        seen.append(transaction.read(f"{top}/a"))
        transaction.write(f"{top}/b", seen[-1])

    with pytest.raises(StoreError) as caught:
        one.transact(body, attempts=1)

    assert caught.value.errno == errno.EAGAIN
    assert seen == ["old", "old"]
    assert two.read_optional(f"{top}/b") is None


def test_transactions_in_other_places_do_not_collide(pair: Pair, top: str) -> None:
    """Two transactions that touch different nodes are both committed at the first attempt."""
    one, two = pair
    one.write(f"{top}/a", "")
    one.write(f"{top}/b", "")

    def body(transaction: Nodes) -> None:
        transaction.write(f"{top}/a", "1")
        two.transact(lambda other: other.write(f"{top}/b", "2"), attempts=1)

    one.transact(body, attempts=1)

    assert one.dictionary(top) == {"a": "1", "b": "2"}
