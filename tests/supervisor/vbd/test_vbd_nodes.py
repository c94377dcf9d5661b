"""What is read and written of one vbd in a simulated xenstored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest
from pyxs.connection import Packet

from tests.supervisor.helpers import PATH, write_like_libxl
from xenbackend.blkif.handshake import XenbusState
from xenbackend.errors import StoreError
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.vbd.events import Write
from xenbackend.supervisor.vbd.kept_files import key_of
from xenbackend.supervisor.vbd.vbd_nodes import NOTES, VbdNodes, forget_notes
from xenbackend.supervisor.xenstore.nodes import Nodes
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.store import ATTEMPTS, Store, Transaction

T = TypeVar("T")

STATE, HOME = f"{PATH.frontend}/state", "/local/domain/0"
S = XenbusState


@pytest.fixture
def nodes(xenstored: Xenstored, toolstack: Store) -> VbdNodes:
    """The nodes of a vbd as libxl makes it."""
    write_like_libxl(toolstack)
    return VbdNodes(Store(xenstored.address), PATH)


def test_both_ends_are_seen(nodes: VbdNodes, toolstack: Store) -> None:
    """A look returns the keys of the backend's directory and the frontend's state; after it the frontend's keys can be
    read.
    """
    keys = nodes.keys()
    assert keys is not None
    assert ("null:1G", XenbusState.INITIALISING) == (keys["params"], nodes.theirs(keys))
    assert PATH.backend == nodes.read_frontend("backend")
    toolstack.remove(PATH.backend)

    assert nodes.keys() is None
    assert XenbusState.UNKNOWN is nodes.theirs({})


def test_who_takes_the_frontend_away_is_heard(nodes: VbdNodes, toolstack: Store) -> None:
    """If a toolstack removes the frontend's directory and changes the node in one transaction, a look that finds the
    directory gone reads the node's keys again.
    """
    before = nodes.look(nodes.keys())
    assert before.keys is not None

    def take_away(nodes: Nodes) -> None:
        nodes.remove(PATH.frontend)
        nodes.write(f"{PATH.backend}/online", "0")
        nodes.write(f"{PATH.backend}/state", "5")

    toolstack.transact(take_away)
    seen = nodes.look(before.keys)

    assert seen.keys is not None
    assert ("1", S.INITIALISING) == (before.keys["online"], before.theirs)
    assert ("0", "5", S.UNKNOWN) == (seen.keys["online"], seen.keys["state"], seen.theirs)


def test_a_look_that_finds_no_frontend_reads_the_node_once(nodes: VbdNodes, toolstack: Store) -> None:
    """A look reads the node's keys again only when it first finds the frontend gone, since that costs a transaction."""
    keys = nodes.keys()
    toolstack.write(f"{PATH.backend}/online", "0")
    assert nodes.look(keys).keys is keys
    toolstack.remove(PATH.frontend)
    assert nodes.look(keys).keys is not keys
    assert nodes.look(keys).keys is keys


def test_a_guest_that_writes_without_end_holds_nobody_up(xenstored: Xenstored, toolstack: Store) -> None:
    """A guest that writes without end can make each look at its state fail, but not the write of ours; the service
    tries a few times only. If the guest pauses, its former driver's ring keys are removed.
    """
    pauses: list[float] = []
    busy: list[bool] = []

    class Beside(Store):
        """A store in whose transactions the guest writes once more before the commit, while it is `busy`."""

        def transact(self, body: Callable[[Transaction], T], attempts: int = ATTEMPTS) -> T:
            def and_the_guest(nodes: Transaction) -> T:
                result = body(nodes)
                if busy:
                    toolstack.write(STATE, "1")
                return result

            return super().transact(and_the_guest, attempts)

    write_like_libxl(toolstack, state="6")
    with Beside(xenstored.address, pause=pauses.append) as store:
        nodes = VbdNodes(store, PATH)
        nodes.theirs(nodes.keys() or {})
        found = []
        for each in ([True], []):
            busy[:] = each
            toolstack.write(f"{PATH.frontend}/ring-page-order", "2")
            toolstack.write(f"{PATH.backend}/state", "6")
            was_written = nodes.write(Write({"state": "2"}, S.CLOSED))
            order = toolstack.read_optional(f"{PATH.frontend}/ring-page-order")
            found.append((was_written, toolstack.read(f"{PATH.backend}/state"), order))

    assert [(True, "2", "2"), (True, "2", None)] == found
    assert len(pauses) < 5


def test_a_vbd_that_is_removed_as_a_whole_is_watched_no_more(nodes: VbdNodes, toolstack: Store) -> None:
    """If a vbd is removed as a whole, it has no keys, its frontend is not watched any more, and the guest does not
    count as migrated.
    """
    before = nodes.look(nodes.keys())
    toolstack.write("/local/domain/5/name", "db--migratedaway")
    toolstack.remove(PATH.frontend)
    toolstack.remove(PATH.backend)
    for keys in (before.keys, None):
        seen = nodes.look(keys)
        assert (None, S.UNKNOWN, False, "") == (seen.keys, seen.theirs, seen.has_left, nodes.frontend)


def test_a_guest_has_not_left_while_its_disk_is_wanted(nodes: VbdNodes, toolstack: Store) -> None:
    """While a node is online, a frontend that is gone will come again, whatever the guest's name."""
    toolstack.write("/local/domain/5/name", "db--migratedaway")
    toolstack.remove(PATH.frontend)

    assert not nodes.look(nodes.keys()).has_left


def test_a_change_of_the_frontend_wakes_us(nodes: VbdNodes, toolstack: Store) -> None:
    """The first look sets a watch on the frontend, once. If the frontend moves, the watch moves too; `forget` removes
    it.
    """
    store = nodes._store
    nodes.theirs(nodes.keys() or {})
    nodes.theirs(nodes.keys() or {})
    store.events()
    toolstack.write(STATE, "3")
    store.own_domid()  # its answer comes after the event
    assert [(STATE, nodes.token)] == store.events()
    nodes.theirs({"frontend": "/local/domain/5/device/vbd/1"})
    store.events()
    toolstack.write(STATE, "4")
    store.own_domid()
    assert [] == store.events()
    nodes.forget()
    toolstack.write("/local/domain/5/device/vbd/1/state", "4")
    store.own_domid()

    assert [] == store.events()


def test_a_watch_that_is_lost_with_the_connection_is_set_by_the_next_look(
    xenstored: Xenstored, toolstack: Store
) -> None:
    """If xenstored goes away while the frontend's watch is being set, the look fails, and the next one sets it."""

    class Lost(Store):
        """A store that is lost before its first watch."""

        def watch(self, path: str, token: str) -> None:
            if not self.why_lost:
                self._lost("the test wants that")
            super().watch(path, token)

    write_like_libxl(toolstack)
    with Lost(xenstored.address) as store:
        nodes = VbdNodes(store, PATH)
        keys = nodes.keys()
        with pytest.raises(StoreError, match="not connected"):
            nodes.look(keys)
        store.reconnect()
        nodes.doubt()
        nodes.look(keys)
        store.events()
        toolstack.write(STATE, "3")
        store.own_domid()  # its answer comes after the event

        assert [(STATE, nodes.token)] == store.events()


def test_what_stays_as_it_is_is_read_once(nodes: VbdNodes, toolstack: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that a toolstack writes only with the node are read once in its life; for a node that is made anew all are
    read.
    """
    nodes.write(Write({"feature-persistent": "1"}, S.INITIALISING))
    first = nodes.keys()
    read: list[str] = []
    read_many = Nodes.read_many

    def note(self: Nodes, path: str, keys: Iterable[str]) -> dict[str, str]:
        read.extend(keys := list(keys))
        return read_many(self, path, keys)

    monkeypatch.setattr(Nodes, "read_many", note)
    toolstack.write(f"{PATH.backend}/online", "0")
    second, read_again = nodes.keys(), set(read)
    toolstack.remove(PATH.backend)
    write_like_libxl(toolstack, script="/etc/xen/scripts/tap2")
    third = nodes.keys()

    assert first is not None
    assert {**first, "online": "0"} == second
    assert {"online", "state", "params"} <= read_again
    assert not read_again & {"frontend", "script", "device-type"}
    assert third is not None
    assert "/etc/xen/scripts/tap2" == third["script"]


@pytest.mark.rows("C2")
def test_what_a_guest_makes_beside_its_keys_is_not_read(
    nodes: VbdNodes, toolstack: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look costs the same number of answers and bytes, whatever else is in the frontend's directory (XSA-354)."""
    store = nodes._store
    receive = store._receive
    received: list[int] = []

    def count() -> Packet:
        packet = receive()
        received.append(len(packet.payload))
        return packet

    def look() -> list[int]:
        received.clear()
        nodes.theirs(nodes.keys() or {})
        nodes.read_frontend("ring-ref")
        store.events()
        return list(received)

    look()
    monkeypatch.setattr(store, "_receive", count)
    before = look()
    for number in range(300):
        toolstack.write(f"{PATH.frontend}/{number}", "x" * 2000)

    assert before == look()
    assert len(before) > 2


@pytest.mark.rows("C4", "R15")
def test_a_frontend_of_another_domain_is_not_looked_at(nodes: VbdNodes) -> None:
    """R15: a frontend path in another domain counts as no frontend."""
    assert XenbusState.UNKNOWN is nodes.theirs({"frontend": "/local/domain/0/device/vbd/51712"})
    assert "" == nodes.frontend


def test_keys_are_written_for_the_node_that_they_were_decided_on(nodes: VbdNodes, toolstack: Store) -> None:
    """Nothing is written if the state or `params` has changed, or if the node is another one or gone."""
    written = nodes.write(Write({"sectors": "8", "mode": None}, S.INITIALISING, "null:1G", "script"))
    others = [
        nodes.write(Write({"sectors": "9"}, *changed))
        for changed in ((S.INITIALISING, "null:2G"), (S.CLOSED,), (S.INITIALISING, None, "feature-persistent"))
    ]
    keys = toolstack.dictionary(PATH.backend)
    toolstack.remove(PATH.backend)

    assert (True, [False, False, False]) == (written, others)
    assert ("8", None) == (keys["sectors"], keys.get("mode"))
    assert not nodes.write(Write({"state": "2"}, S.INITIALISING))
    assert toolstack.read_optional(PATH.backend) is None


def test_only_what_changes_is_written(toolstack: Store) -> None:
    """A value that is already there is not written again, unless xenstore was away."""
    shown = VbdNodes(toolstack, PATH)
    shown.show_status({"phase": "open", "error": ""})
    toolstack.remove(f"{HOME}/xenbackend")
    shown.show_status({"phase": "serving", "error": ""})
    assert {"phase": "serving"} == toolstack.dictionary(f"{HOME}/xenbackend/{PATH}")
    shown.doubt()
    shown.show_status({"phase": "serving", "error": ""})

    assert {"phase": "serving", "error": ""} == toolstack.dictionary(f"{HOME}/xenbackend/{PATH}")


def test_an_error_is_shown_as_the_kernel_shows_it(toolstack: Store) -> None:
    """An error is written with its errno before the sentence; when it is over, no node is left."""
    shown = VbdNodes(toolstack, PATH)
    shown.show_error("it broke")
    text = toolstack.read(f"{HOME}/error/backend/{PATH}/error")
    shown.show_error("")

    assert "22 it broke" == text
    assert [] == toolstack.directory(f"{HOME}/error")


def test_no_error_costs_one_question(toolstack: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no error to remove, nothing is removed, since every new disk would do that."""
    monkeypatch.setattr(toolstack, "remove", pytest.fail)
    VbdNodes(toolstack, PATH).show_error("")


def test_an_error_of_an_earlier_service_is_over(toolstack: Store) -> None:
    """An error node that an earlier service has left is removed when the disk is first reported to be well."""
    VbdNodes(toolstack, PATH).show_error("it broke")
    VbdNodes(toolstack, PATH).show_error("")

    assert [] == toolstack.directory(f"{HOME}/error")


def test_the_last_vbd_takes_the_directories_along(toolstack: Store) -> None:
    """Removing one vbd leaves the nodes of others; removing the last one leaves nothing of ours."""
    one, other = VbdNodes(toolstack, PATH), VbdNodes(toolstack, VbdPath("vbd", 0, 6, 51712))
    one.show_status({"phase": "open"})
    other.show_status({"phase": "open"})
    other.show_error("it broke")
    one.forget()
    assert ["6"] == toolstack.directory(f"{HOME}/xenbackend/vbd")
    other.forget()

    assert "error" not in toolstack.directory(HOME)
    assert [] == toolstack.directory(f"{HOME}/xenbackend")  # that one is the service's


@pytest.mark.parametrize(("name", "expected"), [("db--incoming", True), ("db", False), ("db--migratedaway", False)])
def test_a_guest_on_its_way_here_is_known_by_its_name(toolstack: Store, name: str, *, expected: bool) -> None:
    """A guest is migrating here only if it has the name that xl gives to the receiving end."""
    toolstack.write("/local/domain/5/name", name)

    assert expected is VbdNodes(toolstack, PATH).may_be_incoming(S.CONNECTED)


@pytest.mark.parametrize(("name", "expected"), [("db--migratedaway", True), ("db", False), ("db--incoming", False)])
def test_a_guest_that_runs_elsewhere_is_known_by_its_name(toolstack: Store, name: str, *, expected: bool) -> None:
    """A guest has left only if it has the name that xl gives after a migration and its frontend is gone."""
    write_like_libxl(toolstack)
    toolstack.write("/local/domain/5/name", name)
    nodes = VbdNodes(toolstack, PATH)
    toolstack.write(f"{PATH.backend}/online", "0")
    before = nodes.look(nodes.keys())
    toolstack.remove(PATH.frontend)

    assert (False, expected) == (before.has_left, nodes.look(nodes.keys()).has_left)


@pytest.mark.parametrize(("kind", "expected"), [("hvm", True), ("pv", False), ("pvh", False)])
def test_only_hvm_guests_boot_by_a_device_model(toolstack: Store, kind: str, *, expected: bool) -> None:
    """Only HVM guests boot by a device model: PV and PVH guests have no emulated disk."""
    toolstack.write("/libxl/5/type", kind)

    assert expected is VbdNodes(toolstack, PATH).boots_by_device_model()


def test_what_cannot_be_read_of_a_domain_is_not_so(toolstack: Store) -> None:
    """If these nodes are missing, or xenstore is away, a guest is treated like most: neither migrating nor HVM."""
    nodes = VbdNodes(toolstack, PATH)
    assert (False, False) == (nodes.may_be_incoming(S.INIT_WAIT), nodes.boots_by_device_model())
    toolstack.close()
    assert (False, False) == (nodes.may_be_incoming(S.INIT_WAIT), nodes.boots_by_device_model())


def test_the_next_service_finds_which_files_the_disk_had(nodes: VbdNodes, toolstack: Store) -> None:
    """A service that has nothing else finds the identities of the disk's files, even for names with a bar or too long
    for a value. For a new vbd in the same place, or another chain, it finds nothing.
    """
    long = "/" + "x" * 4000
    files = {"/a|b \udcff": "file device=1 inode=2", long: "file device=1 inode=3"}
    nodes.show_status({"worker": "7"})
    nodes.note_files("null:1G", {"/former": "file device=1 inode=1", **files, "/more": "file device=1 inode=4"})
    nodes.note_files("null:1G", files)
    nodes.forget(goes_on=True)
    heir = VbdNodes(nodes._store, PATH)
    wanted = {key_of(name): identity for name, identity in files.items()}

    assert ([], 2) == (toolstack.directory(f"{HOME}/xenbackend"), len(wanted))
    assert wanted == heir.noted_files({"state": "4"}, "null:1G")
    assert {} == heir.noted_files({"state": "1"}, "null:1G")
    assert {} == heir.noted_files({"state": "4"}, "null:2G")
    heir.note_files("null:1G", {})
    assert {} == heir.noted_files({"state": "4"}, "null:1G")


def test_what_was_noted_of_a_vbd_goes_with_it(nodes: VbdNodes, toolstack: Store) -> None:
    """Nothing is left of the notes of a vbd that has ended, even if no service ran at that time."""
    noted = f"{HOME}/{NOTES}"
    nodes.note_files("null:1G", {"/a": "file device=1 inode=2"})
    forget_notes(toolstack, 0)
    assert ["vbd"] == toolstack.directory(noted)
    for key in ("", "/chain", "/1"):  # names of the host's files are not for guests
        assert ["n0"] == toolstack.get_permissions(f"{noted}/{PATH}{key}")
    nodes.forget()
    assert [] == toolstack.directory(noted)
    VbdNodes(nodes._store, PATH).note_files("null:1G", {"/a": "file device=1 inode=2"})
    VbdNodes(nodes._store, VbdPath("vbd", 0, 6, 768)).note_files("null:1G", {"/a": "file device=1 inode=2"})
    forget_notes(toolstack, 0)

    assert ["5"] == toolstack.directory(f"{noted}/vbd")
    toolstack.remove(PATH.backend)
    forget_notes(toolstack, 0)
    assert NOTES not in toolstack.directory(HOME)
