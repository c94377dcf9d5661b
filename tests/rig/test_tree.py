"""The nodes of the rig's xenstore: permissions, quotas and transactions."""

import errno
import random

import pytest

from xenbackend.rig.tree import Quota, Tree, resolve, walk


@pytest.fixture
def tree() -> Tree:
    """A tree where domain 5 owns /guest, may read /readable, and cannot see /hidden."""
    tree = Tree(quota=Quota(nodes=5, value_size=10, transaction_nodes=4))
    for path, permissions in (("/guest", ["n5"]), ("/readable", ["n0", "r5"]), ("/hidden", ["n0"])):
        tree.write(0, path, b"value")
        tree.set_permissions(0, path, permissions)
    return tree


def refusal(code: int) -> pytest.RaisesExc[OSError]:
    """Expect an OSError with a certain errno."""
    return pytest.raises(OSError, check=lambda error: error.errno == code)


@pytest.mark.parametrize(
    "path", ["", "/a/", "//a", "/a//b", "a/", "/a b", "/a:b", "/ä", "/a\n", "/" + "a" * 3072, "a" * 2049]
)
def test_what_is_no_path_is_refused(path: str) -> None:
    """A path has names of letters, digits and -_@, single slashes, none at its end, and a limited length."""
    with refusal(errno.EINVAL):
        resolve(5, path)


def test_a_relative_path_is_the_domains_own() -> None:
    """A path without a leading slash lies below the caller's own directory."""
    assert resolve(5, "device/vbd") == "/local/domain/5/device/vbd"
    assert resolve(5, "/") == "/"


def test_a_guest_is_held_to_permissions(tree: Tree) -> None:
    """A guest reads and writes its own nodes, reads those that are open to it, and is refused all others."""
    assert tree.get(5, "/guest").value == b"value"
    assert tree.get(5, "/readable").value == b"value"
    tree.write(5, "/guest/a", b"x")
    for path in ("/hidden", "/hidden/missing"):
        with refusal(errno.EACCES):
            tree.get(5, path)
    for path in ("/readable", "/readable/new", "/new"):
        with refusal(errno.EACCES):
            tree.write(5, path, b"x")
    with refusal(errno.EACCES):
        tree.remove(5, "/readable")
    with refusal(errno.ENOENT):
        tree.get(5, "/readable/missing")


def test_a_guest_owns_what_it_makes_and_cannot_give_it_away(tree: Tree) -> None:
    """A new node has its parent's permissions with its creator as owner; only domain 0 may change the owner."""
    tree.set_permissions(0, "/readable", ["n0", "b5"])
    tree.write(5, "/readable/a", b"x")
    assert tree.get(0, "/readable/a").permissions == (("n", 5), ("b", 5))

    with refusal(errno.EPERM):
        tree.set_permissions(5, "/readable/a", ["n6"])
    with refusal(errno.EACCES):
        tree.set_permissions(5, "/readable", ["n5"])
    with refusal(errno.EINVAL):
        tree.set_permissions(5, "/readable/a", ["x5"])


def test_a_guest_is_held_to_quotas_and_domain_0_is_not(tree: Tree) -> None:
    """Number of nodes, size of values and length of permissions are limited for guests only."""
    with refusal(errno.ENOSPC):
        tree.write(5, "/guest/a", b"x" * 11)
    with refusal(errno.ENOSPC):
        tree.set_permissions(5, "/guest", ["n5", "r1", "r2", "r3", "r4", "r6"])
    with refusal(errno.ENOSPC):
        tree.write(5, "/guest/1/2/3/4/5", b"")
    for number in range(4):
        tree.mkdir(5, f"/guest/{number}")
    with refusal(errno.ENOSPC):
        tree.mkdir(5, "/guest/5")

    for number in range(9):
        tree.write(0, f"/guest/more{number}", b"x" * 11)


def test_removing_goes_by_the_parent(tree: Tree) -> None:
    """Removing a missing node succeeds if its parent exists; the root cannot be removed."""
    tree.remove(0, "/guest/missing")
    with refusal(errno.ENOENT):
        tree.remove(0, "/missing/missing")
    with refusal(errno.EINVAL):
        tree.remove(0, "/")


def test_a_refused_commit_changes_nothing(tree: Tree) -> None:
    """A commit is all or nothing, even if a quota is reached half way."""
    transaction = tree.begin(5)
    transaction.mkdir(5, "/guest/a")
    transaction.mkdir(5, "/guest/b")
    tree.write(0, "/elsewhere", b"")
    tree.set_permissions(0, "/elsewhere", ["n5"])
    tree.write(0, "/elsewhere/1", b"")
    tree.write(0, "/elsewhere/2", b"")
    before = list(walk("/", tree.root))

    with refusal(errno.ENOSPC):
        tree.commit(transaction)

    assert before == list(walk("/", tree.root))


def test_a_transaction_of_a_guest_touches_a_limited_number_of_nodes(tree: Tree) -> None:
    """A guest's transaction may touch only a limited number of nodes."""
    transaction = tree.begin(5)
    for number in range(4):
        with refusal(errno.ENOENT):
            transaction.get(5, f"/guest/{number}")
    with refusal(errno.ENOSPC):
        transaction.get(5, "/guest/4")


@pytest.mark.parametrize(
    ("look", "interfere", "collides"),
    [
        (lambda t: t.get(0, "/guest"), lambda t: t.write(0, "/guest", b""), True),
        (lambda t: t.get(0, "/guest"), lambda t: t.write(0, "/guest/new", b""), True),
        (lambda t: t.get(0, "/guest"), lambda t: t.set_permissions(0, "/guest", ["n6"]), True),
        (lambda t: t.get(0, "/guest"), lambda t: t.remove(0, "/guest"), True),
        (lambda t: t.write(0, "/guest/a", b"1"), lambda t: t.write(0, "/guest/a", b"2"), True),
        (lambda t: t.write(0, "/guest/a/b", b"1"), lambda t: t.mkdir(0, "/guest/a"), True),
        (lambda t: t.remove(0, "/guest"), lambda t: t.write(0, "/guest", b"2"), True),
        (lambda t: t.get(0, "/guest"), lambda t: t.write(0, "/hidden", b""), False),
        (lambda t: t.write(0, "/guest", b"1"), lambda t: t.write(0, "/hidden/a", b""), False),
        (lambda t: t.get(0, "/guest"), lambda t: t.get(0, "/guest"), False),
    ],
)  # fmt: skip
def test_a_commit_collides_when_what_it_used_has_changed(tree: Tree, look, interfere, collides) -> None:
    """A transaction fails with EAGAIN exactly when a node that it read or changed was changed by another."""
    transaction = tree.begin(0)
    look(transaction)
    interfere(tree)

    if collides:
        with refusal(errno.EAGAIN):
            tree.commit(transaction)
    else:
        tree.commit(transaction)


def test_a_missing_node_that_appears_collides(tree: Tree) -> None:
    """A transaction that has found a node missing fails if that node appears."""
    transaction = tree.begin(0)
    with refusal(errno.ENOENT):
        transaction.get(0, "/guest/state")
    tree.write(0, "/guest/state", b"")

    with refusal(errno.EAGAIN):
        tree.commit(transaction)


def test_random_transactions_are_serial(tree: Tree) -> None:
    """Counters moved from node to node by interleaved transactions never lose or invent a unit."""
    dice = random.Random(1)
    places = [f"/{name}" for name in "abcd"]
    for place in places:
        tree.write(0, place, b"100")
    open_ones = []
    committed = 0
    for _ in range(1000):
        if len(open_ones) < 3:
            transaction, (one, two) = tree.begin(0), dice.sample(places, 2)
            transaction.write(0, one, b"%d" % (int(transaction.get(0, one).value) - 1))
            transaction.write(0, two, b"%d" % (int(transaction.get(0, two).value) + 1))
            open_ones.append(transaction)
        else:
            try:
                tree.commit(open_ones.pop(dice.randrange(3)))
                committed += 1
            except BlockingIOError:
                continue

    assert sum(int(tree.get(0, place).value) for place in places) == 400
    assert committed > 100


def test_changes_are_told_for_the_named_node_only(tree: Tree) -> None:
    """A change is reported for the node that was named, not for parents created on the way, and never if refused."""
    tree.changes.clear()
    tree.write(0, "/new/deep/node", b"1")
    tree.mkdir(0, "/new/deep/node")
    tree.remove(0, "/new/deep")
    tree.remove(0, "/new/deep")

    assert [change.path for change in tree.changes] == ["/new/deep/node", "/new/deep"]
