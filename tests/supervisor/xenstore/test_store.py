"""The xenstore client when things go wrong; what both xenstoreds must do alike is in contract/test_store.py."""

import errno
import os
import select
import socket
import struct
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyxs import connection
from pyxs._internal import Op, Packet

from xenbackend.errors import StoreError
from xenbackend.rig.store import Xenstored
from xenbackend.rig.tree import Quota
from xenbackend.supervisor.xenstore import store as module
from xenbackend.supervisor.xenstore.nodes import Nodes
from xenbackend.supervisor.xenstore.store import Store, find_address

Peer = Callable[[socket.socket], None]
REQUEST = 16 + len("/a\0")  # bytes of the request that the scripted peers answer


@pytest.fixture
def xenstored(tmp_path: Path) -> Iterator[Xenstored]:
    """A rig's xenstored with domain 5."""
    with Xenstored(tmp_path / "store") as running:
        running.add_domain_socket(5)
        yield running


@pytest.fixture
def store(xenstored: Xenstored) -> Iterator[Store]:
    """A client of domain 0, which does not pause between attempts."""
    with Store(xenstored.address, pause=lambda _: None) as client:
        yield client


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Callable[[Peer], str]]:
    """Return a function that starts a xenstored with a given behaviour towards its one connection."""
    threads = []

    def start(behave: Peer) -> str:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "peer"))
        listener.listen()

        def run() -> None:
            with listener, listener.accept()[0] as near:
                behave(near)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return str(tmp_path / "peer")

    yield start
    for thread in threads:
        thread.join()


def packet(op: int, request: int, payload: bytes, size: int | None = None) -> bytes:
    """Return a packet as a xenstored sends it."""
    return struct.pack("=IIII", op, request, 0, len(payload) if size is None else size) + payload


def until_gone(near: socket.socket) -> None:
    """Read until the client hangs up."""
    while near.recv(65536):
        pass


def test_the_names_of_pyxs_that_we_stand_on_are_there() -> None:
    """The public and private parts of pyxs that the client uses are as it expects."""
    assert (Op.DIRECTORY, Op.READ, Op.WRITE, Op.WATCH_EVENT, Op.ERROR) == (1, 2, 11, 15, 16)
    assert {
        "DIRECTORY",
        "READ",
        "GET_PERMS",
        "WATCH",
        "UNWATCH",
        "TRANSACTION_START",
        "TRANSACTION_END",
        "WRITE",
    } < set(Op._fields)
    assert Packet._fields == ("op", "rq_id", "tx_id", "size", "payload")
    assert Packet._struct.size == module._HEADER.size
    assert connection.PacketConnection.transport is None
    assert {"connect", "close", "send", "fileno", "is_connected"} <= set(vars(connection.PacketConnection))


def test_the_address_is_where_libxenstore_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XENSTORED_PATH names the socket, else XENSTORED_RUNDIR its directory."""
    (tmp_path / "socket").touch()
    monkeypatch.delenv("XENSTORED_PATH", raising=False)
    monkeypatch.setenv("XENSTORED_RUNDIR", str(tmp_path))
    assert find_address() == f"{tmp_path}/socket"

    monkeypatch.setenv("XENSTORED_PATH", "/elsewhere")
    assert find_address() == "/elsewhere"


def test_connecting_to_nothing_is_a_sentence(tmp_path: Path) -> None:
    """Without a xenstored the error names the address; nothing stays open, even if the socket has no listener."""
    with pytest.raises(StoreError, match=f"{tmp_path}/none: cannot connect: No such file"):
        Store(f"{tmp_path}/none")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{tmp_path}/stale")
    with pytest.raises(StoreError, match="Connection refused"):
        Store(f"{tmp_path}/stale")


def test_a_device_is_spoken_to_as_well_as_a_socket() -> None:
    """An address that is not a socket is opened as the kernel's xenbus device, without blocking."""
    controller, terminal = os.openpty()
    with Store(os.ttyname(terminal), timeout_s=0.01) as store:
        assert store.is_connected
        assert not os.get_blocking(store._connection.fileno())
    os.close(controller)
    os.close(terminal)


def test_a_device_gets_one_request_at_a_time() -> None:
    """Linux' device keeps only one payload, so that a second write would overwrite that of a request which it has not
    sent yet. Over a device, each request is sent after the answer to the one before.
    """
    controller, terminal = os.openpty()
    tty.setraw(terminal)
    keys = [f"key{number}" for number in range(4)]
    written: list[bytes] = []
    device = threading.Thread(target=be_the_device, args=(controller, 2 * len(keys), written), daemon=True)
    device.start()
    with Store(os.ttyname(terminal)) as store:
        store.write_many("/a", {key: f"to {key}" for key in keys})
        found = store.read_many("/a", keys)
    device.join()
    os.close(controller)
    os.close(terminal)

    assert [f"/a/{key}\0to {key}".encode() for key in keys] == written
    assert {key: f"of /a/{key}" for key in keys} == found


def be_the_device(fd: int, count: int, written: list[bytes]) -> None:
    """Answer `count` requests as a busy Linux does: by the payload that came last, cut to the length of the request."""
    while count:
        heads, payload = [], b""
        while not heads or select.select([fd], [], [], 0.05)[0]:
            heads.append(struct.unpack("=IIII", read_exactly(fd, 16)))
            payload = read_exactly(fd, heads[-1][3])
        for operation, request, _, size in heads:
            count -= 1
            found = payload.ljust(size, b"\0")[:size]
            if operation == Op.WRITE:
                written.append(found)
            answer = b"of " + found.rstrip(b"\0") if operation == Op.READ else b"OK\0"
            os.write(fd, packet(operation, request, answer))


def read_exactly(fd: int, size: int) -> bytes:
    """Read exactly `size` bytes."""
    data = b""
    while len(data) < size:
        data += os.read(fd, size - len(data))
    return data


@pytest.mark.rows("C9")
def test_silence_ends_at_the_deadline(peer: Callable[[Peer], str]) -> None:
    """If xenstored does not answer in time, the connection counts as lost, and the next call fails at once."""
    store = Store(peer(until_gone), timeout_s=0.02)

    with pytest.raises(StoreError, match="did not answer in time") as caught:
        store.read("/a")

    assert caught.value.errno == errno.EIO
    assert not store.is_connected
    with pytest.raises(StoreError, match="not connected"):
        store.read("/a")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "closed the connection"),
        (packet(Op.READ, 1, b"", size=10) + b"short", "closed the connection"),
        (packet(Op.READ, 1, b"", size=(1 << 20) + 1), "1048577 bytes"),
        (packet(Op.READ, 99, b"x"), "was not asked for"),
        (packet(Op.WRITE, 1, b"OK\0"), "was not asked for"),
    ],
    ids=["end of file", "cut off", "too long", "another request's", "another operation's"],
)
def test_a_broken_answer_loses_the_connection(peer: Callable[[Peer], str], answer: bytes, reason: str) -> None:
    """If xenstored goes away or is out of step, a call in flight raises an error at once and never hangs."""

    def behave(near: socket.socket) -> None:
        near.recv(REQUEST, socket.MSG_WAITALL)
        near.sendall(answer)

    store = Store(peer(behave))
    with pytest.raises(StoreError, match=reason):
        store.read("/a")

    assert not store.is_connected


def test_an_unknown_error_name_is_an_io_error_of_a_living_connection(peer: Callable[[Peer], str]) -> None:
    """An unknown error word fails the call, and not the connection."""

    def behave(near: socket.socket) -> None:
        near.recv(REQUEST, socket.MSG_WAITALL)
        near.sendall(packet(Op.ERROR, 1, b"EWHATEVER\0"))
        until_gone(near)

    with Store(peer(behave)) as store:
        with pytest.raises(StoreError, match="xenstore: read /a: "):
            store.read("/a")
        assert store.is_connected


def test_losing_xenstored_shows_at_the_descriptor(xenstored: Xenstored, store: Store) -> None:
    """If xenstored goes away while nothing is asked, the descriptor becomes readable and `events` raises."""
    xenstored.stop()

    assert [(store.fileno(), select.POLLIN)] == [(fd, what & select.POLLIN) for fd, what in polled(store)]
    with pytest.raises(StoreError, match="connection lost"):
        store.events()


def test_the_descriptor_is_the_same_for_ever(xenstored: Xenstored, store: Store) -> None:
    """The client's descriptor stays the same over all connections. Without one it is never readable, even if something
    else gets the former connection's number.
    """
    number = store.fileno()
    poll = select.poll()
    poll.register(number, select.POLLIN)
    store.watch("/a", "token")
    assert [("/a", "token")] == drained(store)
    lost = store._connection.fileno()
    held = os.dup(lost)  # as a program has it that is being started
    xenstored.stop()
    with pytest.raises(StoreError):
        store.read("/a")
    event = os.eventfd(1)
    os.dup2(event, lost)  # a readable descriptor gets the free number
    before = poll.poll(0)
    os.close(lost)
    os.close(held)
    xenstored.start()
    store.reconnect()
    drained(store)
    with Store(xenstored.address) as other:
        other.write("/a", "1")
    after = poll.poll(5000)
    os.close(event)

    assert [] == before
    assert ([(number, select.POLLIN)], number) == (after, store.fileno())


@pytest.mark.usefixtures("descriptors")
def test_nothing_is_left_of_a_store_that_was_closed(xenstored: Xenstored) -> None:
    """A closed store leaves no descriptor, even if its connection was lost before."""
    for lose in (False, True):
        store = Store(xenstored.address)
        store.fileno()
        if lose:
            store.disconnect()
        store.close()


def test_many_keys_are_asked_for_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many keys are read without waiting for each of them, even more than fit into one round; missing ones are left
    out.
    """
    wanted = {f"key{number}": str(number) for number in range(2 * module._AT_ONCE + 1)}
    store.write_many("/many", wanted)
    moves = []
    for name in ("_send", "_receive"):
        former = getattr(store, name)
        monkeypatch.setattr(store, name, lambda *a, n=name, f=former: (moves.append(n), f(*a))[1])
    found = store.transact(lambda nodes: nodes.read_many("/many", ["none", *wanted]))

    assert wanted == found
    ahead = [moves[: place + 1].count("_send") - moves[: place + 1].count("_receive") for place in range(len(moves))]
    assert module._AT_ONCE == max(ahead)


def test_an_error_over_one_of_many_keys_leaves_the_connection_in_step(xenstored: Xenstored, store: Store) -> None:
    """If one of many keys may not be read or written, the error comes after every answer has been read."""
    store.write("/a/x", "1")
    with Store(f"{xenstored.address}.5") as guest:
        with pytest.raises(StoreError, match="write /a/y: Permission denied"):
            guest.write_many("/a", {"y": "1", "x": "2"})
        with pytest.raises(StoreError, match="read /a/none: Permission denied"):
            guest.read_many("/a", ["none", "x", "y"])
        assert guest.is_connected
        assert 5 == guest.own_domid()


def test_xenstored_that_goes_while_many_are_asked(peer: Callable[[Peer], str]) -> None:
    """If xenstored goes away while many keys are read, the call fails, and no part of it counts as an answer."""

    def behave(near: socket.socket) -> None:
        near.recv(2 * (16 + len("/a/1\0")), socket.MSG_WAITALL)
        near.sendall(packet(Op.READ, 1, b"1"))

    with Store(peer(behave)) as store:
        with pytest.raises(StoreError, match="closed the connection"):
            store.read_many("/a", ["1", "2"])
        assert not store.is_connected


def test_as_much_as_the_wire_carries_is_written_at_once(store: Store) -> None:
    """Writing many long values at once does not make both sides wait for each other."""
    values = {f"{number:02}": "x" * 4000 for number in range(3 * module._AT_ONCE)}
    store.write_many("/long", values)

    assert values == store.dictionary("/long")


def test_an_event_costs_the_same_however_many_watches_there_are(store: Store) -> None:
    """An event is handled without going through all watches."""

    class Counted(dict[str, dict[str, None]]):
        looks = 0

        def __iter__(self) -> Iterator[str]:
            self.looks += 1
            return super().__iter__()

    for number in range(100):
        store.watch(f"/{number}", f"token {number}")
    drained(store)
    store._watches = watches = Counted(store._watches)
    store.write("/7/x", "1")
    store.unwatch("/8", "token 8")

    assert [("/7/x", "token 7")] == drained(store)
    assert watches.looks == 0


def polled(store: Store) -> list[tuple[int, int]]:
    """Wait until the client's descriptor is readable."""
    poll = select.poll()
    poll.register(store, select.POLLIN)
    return poll.poll(5000)


def drained(store: Store) -> list[tuple[str, str]]:
    """Return all events caused by earlier operations."""
    store.read("domid")  # its reply comes after the events of earlier requests
    return store.events()


def test_after_reconnecting_every_watch_is_there_and_fires(xenstored: Xenstored, store: Store) -> None:
    """After a restart of xenstored `reconnect` sets all watches again, and each fires once."""
    store.watch("/a", "one")
    store.watch("backend/vbd", "two")
    store.watch("/gone", "three")
    store.unwatch("/gone", "three")
    store.write("/a/old", "an event that nobody took")
    xenstored.stop(forget=True)
    with pytest.raises(StoreError):
        store.read("/a")
    with pytest.raises(StoreError, match="cannot connect"):
        store.reconnect()
    xenstored.start()

    store.reconnect()

    assert drained(store) == [("/a", "one"), ("backend/vbd", "two")]
    store.write("/a/b", "x")
    assert drained(store) == [("/a/b", "one")]


@pytest.mark.rows("C1", "R14")
def test_a_node_written_often_is_one_event(store: Store) -> None:
    """Events are a set: a node that changes a thousand times while nobody looks is reported once."""
    store.watch("/a", "token")
    for number in range(100):
        store.write("/a/b", str(number))

    assert drained(store) == [("/a", "token"), ("/a/b", "token")]
    assert drained(store) == []


@pytest.mark.rows("C1", "R14")
def test_a_flood_of_nodes_is_bounded_by_the_watches(store: Store) -> None:
    """R12: the list of events does not grow with what a guest does: too many changed paths collapse into the watched
    one.
    """
    store.watch("/a", "flood")
    store.watch("/b", "calm")
    for number in range(300):
        store.write(f"/a/{number}", "")
        store.remove(f"/a/{number}")
    store.write("/b", "")

    events = drained(store)

    assert len(events) <= 2 * module._PATHS_PER_TOKEN
    assert ("/a", "flood") in events
    assert [event for event in events if event[1] == "calm"] == [("/b", "calm")]


@pytest.mark.rows("C1", "R14")
def test_one_call_reads_no_more_than_its_share_of_a_flood(peer: Callable[[Peer], str]) -> None:
    """R14: a call takes a bounded number of packets, however many events wait; later ones are in the next call."""
    are_sent = threading.Event()
    flood = packet(Op.WATCH_EVENT, 0, b"/a\0t\0")

    def behave(near: socket.socket) -> None:
        near.recv(REQUEST + len("t\0"), socket.MSG_WAITALL)
        near.sendall(packet(Op.WATCH, 1, b"OK\0") + module._EVENTS_PER_CALL * flood)
        near.sendall(packet(Op.WATCH_EVENT, 0, b"/a/late\0t\0"))
        are_sent.set()
        until_gone(near)

    with Store(peer(behave)) as store:
        store.watch("/a", "t")
        assert are_sent.wait(10)

        assert [("/a", "t")] == store.events()
        assert [("/a/late", "t")] == store.events()


def test_a_muted_watch_is_silent_and_fires_when_it_is_set_again(xenstored: Xenstored, store: Store) -> None:
    """A muted token has no events, even after a reconnection; its watches may be changed meanwhile, and fire when it is
    unmuted.
    """
    for path in ("/a", "/b"):
        store.watch(path, "loud")
    store.watch("/a", "other")
    drained(store)
    store.mute("loud")
    store.watch("/c", "loud")
    store.unwatch("/b", "loud")
    for path in ("/a", "/b", "/c"):
        store.write(path, "1")
    assert drained(store) == [("/a", "other")]
    xenstored.stop()
    xenstored.start()
    store.reconnect()
    assert drained(store) == [("/a", "other")]

    store.unmute("loud")
    assert drained(store) == [("/a", "loud"), ("/c", "loud")]
    store.write("/c", "2")
    assert drained(store) == [("/c", "loud")]
    store.mute("loud")
    for path in ("/a", "/c"):
        store.unwatch(path, "loud")
    store.watch("/a", "loud")
    assert drained(store) == [("/a", "loud")]


def test_events_are_counted_by_watch(store: Store) -> None:
    """R11: the number of events of each token is counted before events are merged."""
    store.watch("/a", "one")
    store.watch("/b", "two")
    for _ in range(10):
        store.write("/a/x", "")
    drained(store)
    store.unwatch("/b", "two")

    assert {"one": 11} == store.counts


def test_an_event_of_a_removed_watch_is_dropped(store: Store) -> None:
    """After `unwatch` no event of that watch is returned, not even one that was already on its way."""
    store.watch("/a", "token")
    store.write("/a", "1")
    store.unwatch("/a", "token")
    store.write("/a", "2")

    assert drained(store) == []


def test_a_watch_is_set_once(store: Store) -> None:
    """Setting a watch again, or removing one that does not exist, is no error."""
    store.watch("/a", "token")
    store.watch("/a", "token")
    store.unwatch("/a", "token")
    store.unwatch("/a", "token")

    assert drained(store) == []


def test_a_refused_watch_is_not_set_again_later(xenstored: Xenstored, store: Store) -> None:
    """A watch that xenstored refused is forgotten, so that `reconnect` does not fail on it for ever."""
    with pytest.raises(StoreError, match="watch /a//b"):
        store.watch("/a//b", "token")

    store.reconnect()

    assert drained(store) == []


def test_a_watch_that_is_refused_after_all_can_be_set_anew(tmp_path: Path) -> None:
    """A watch for which there is no room any more, when it is set again, is forgotten: it is set anew once there is
    room, and the others are there as before.
    """
    with (
        Xenstored(tmp_path / "small", quota=Quota(watches=2)) as xenstored,
        Store(xenstored.add_domain_socket(5)) as store,
        Store(xenstored.address) as toolstack,
    ):
        toolstack.mkdir("/a")
        toolstack.set_permissions("/a", ["n5"])
        for path in ("/a/kept", "/a/muted"):
            store.watch(path, path)
        store.mute("/a/muted")
        store.watch("/a/third", "third")
        with pytest.raises(StoreError, match="watch /a/muted"):
            store.unmute("/a/muted")
        store.reconnect()
        store.unwatch("/a/third", "third")
        store.watch("/a/muted", "/a/muted")

        assert [(path, path) for path in ("/a/kept", "/a/muted")] == sorted(drained(store))


def test_what_the_wire_cannot_carry_is_refused_before_sending(store: Store) -> None:
    """A value beyond XENSTORE_PAYLOAD_MAX, or a NUL in a path, is an error, and the connection stays."""
    store.write("/a", "x" * (4096 - 3))
    with pytest.raises(StoreError, match="4097 bytes of path and value; xenstore carries at most 4096") as caught:
        store.write("/a", "x" * (4096 - 2))
    assert caught.value.errno == errno.E2BIG
    with pytest.raises(StoreError, match="NUL"):
        store.read("/a\0/b")

    assert store.is_connected


def test_a_transaction_is_tried_again_until_nobody_interferes(xenstored: Xenstored, store: Store) -> None:
    """A transaction whose commit meets EAGAIN is run again and sees what the other client wrote."""
    store.write("/n", "0")
    others = Store(xenstored.address)
    seen = []

    def body(transaction: Nodes) -> str:
        seen.append(transaction.read("/n"))
        if len(seen) < 3:
            others.write("/n", str(len(seen)))
        transaction.write("/n", "mine")
        return "done"

    assert store.transact(body) == "done"
    assert seen == ["0", "1", "2"]
    assert store.read("/n") == "mine"
    others.close()


@pytest.mark.rows("C10")
def test_a_transaction_that_always_collides_is_given_up_with_growing_pauses(xenstored: Xenstored) -> None:
    """A transaction is retried a limited number of times, with growing, random pauses."""
    pauses: list[float] = []
    store, others = Store(xenstored.address, pause=pauses.append), Store(xenstored.address)

    def body(transaction: Nodes) -> None:
        transaction.read_optional("/n")
        others.write("/n", "x")

    with pytest.raises(StoreError) as caught:
        store.transact(body, attempts=9)

    assert caught.value.errno == errno.EAGAIN
    assert len(pauses) == 8
    assert all(pause <= module._PAUSE_MAX_S for pause in pauses)
    assert sum(pauses[4:]) > sum(pauses[:2])
    store.close()
    others.close()


def test_an_exception_aborts_the_transaction(store: Store) -> None:
    """An exception in the body is raised, and nothing of the transaction is kept."""

    def body(transaction: Nodes) -> None:
        transaction.write("/a", "x")
        raise KeyError("mine")

    with pytest.raises(KeyError):
        store.transact(body)

    assert store.read_optional("/a") is None
    assert store.transact(lambda transaction: transaction.read_optional("/a")) is None


def test_a_domain_knows_its_number(xenstored: Xenstored, store: Store) -> None:
    """The number of our own domain is read from the node `domid`; any other content is refused."""
    with Store(f"{xenstored.address}.5") as guest:
        assert guest.own_domid() == 5
    store.write("domid", "0x1")

    with pytest.raises(StoreError, match="'0x1', which is not a domain number"):
        store.own_domid()
