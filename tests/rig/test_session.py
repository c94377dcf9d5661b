"""The rig's xenstored on the wire, without a socket."""

import random
import struct
from itertools import product

import pytest

from xenbackend.rig import session as wire
from xenbackend.rig.session import Registry, Session
from xenbackend.rig.tree import Change, Node, Quota, Tree, may

Packet = tuple[int, int, int, bytes]


@pytest.fixture
def registry() -> Registry:
    """An xenstore with domains 0 and 5; domain 5 owns /guest."""
    registry = Registry(Tree(quota=Quota(watches=3, transactions=2)))
    registry.introduce(5)
    registry.tree.write(0, "/guest", b"")
    registry.tree.set_permissions(0, "/guest", ["n5"])
    registry.publish()
    return registry


def packet(op: int, payload: bytes, request: int = 7, transaction: int = 0) -> bytes:
    """Return a request."""
    return struct.pack("=IIII", op, request, transaction, len(payload)) + payload


def heard(session: Session) -> list[Packet]:
    """Return the packets that a session would send, as (op, request, transaction, payload)."""
    packets = []
    while session.outgoing:
        op, request, transaction, size = struct.unpack_from("=IIII", session.outgoing)
        packets.append((op, request, transaction, bytes(session.outgoing[16 : 16 + size])))
        del session.outgoing[: 16 + size]
    return packets


def ask(session: Session, op: int, payload: bytes, transaction: int = 0) -> bytes:
    """Send one request and return the payload of its reply, or of the error."""
    session.feed(packet(op, payload, transaction=transaction))
    return next(payload for number, _, _, payload in heard(session) if number != wire.XS_WATCH_EVENT)


def test_the_numbers_are_those_of_the_header() -> None:
    """Operation numbers are those of io/xs_wire.h."""
    assert (wire.XS_DIRECTORY, wire.XS_WATCH, wire.XS_WRITE, wire.XS_SET_PERMS) == (1, 4, 11, 14)
    assert (wire.XS_WATCH_EVENT, wire.XS_ERROR, wire.XS_IS_DOMAIN_INTRODUCED) == (15, 16, 17)


def test_requests_are_served_however_they_are_cut(registry: Registry) -> None:
    """Requests may arrive byte by byte or all at once; each gets one reply with its own numbers."""
    session = Session(registry, 0)
    stream = packet(wire.XS_WRITE, b"/a\0x", request=1) + packet(wire.XS_READ, b"/a\0", request=2)
    for byte in stream:
        session.feed(bytes([byte]))
    session.feed(stream)

    expected = [(wire.XS_WRITE, 1, 0, b"OK\0"), (wire.XS_READ, 2, 0, b"x")]
    assert expected * 2 == heard(session)


@pytest.mark.parametrize(
    ("op", "payload", "error"),
    [
        (wire.XS_READ, b"missing\0", b"ENOENT\0"),
        (wire.XS_READ, b"/no-nul", b"EINVAL\0"),
        (wire.XS_READ, b"/not//a/path\0", b"EINVAL\0"),
        (wire.XS_WATCH, b"/one\0", b"EINVAL\0"),
        (wire.XS_WATCH, b"@nonsense\0token\0", b"EINVAL\0"),
        (wire.XS_UNWATCH, b"/a\0token\0", b"ENOENT\0"),
        (wire.XS_TRANSACTION_END, b"T\0", b"ENOENT\0"),
        (wire.XS_TRANSACTION_END, b"maybe\0", b"EINVAL\0"),
        (wire.XS_INTRODUCE, b"9\0001\0001\0", b"EACCES\0"),
        (wire.XS_WRITE, b"/tool/x\0x", b"EACCES\0"),
        (wire.XS_DIRECTORY_PART, b"/guest\0x\0", b"EINVAL\0"),
        (99, b"", b"ENOSYS\0"),
    ],
)
def test_what_a_guest_may_not_is_answered_with_an_error(
    registry: Registry, op: int, payload: bytes, error: bytes
) -> None:
    """A wrong or forbidden request is answered with the errno's name, and the session continues."""
    session = Session(registry, 5)
    session.feed(packet(op, payload))

    assert heard(session) == [(wire.XS_ERROR, 7, 0, error)]
    assert ask(session, wire.XS_READ, b"domid\0") == b"5"


def test_a_broken_frame_ends_the_session(registry: Registry) -> None:
    """A payload length beyond XENSTORE_PAYLOAD_MAX cannot be skipped, so the session is closed."""
    with pytest.raises(ValueError, match="4097"):
        Session(registry, 5).feed(struct.pack("=IIII", wire.XS_READ, 0, 0, 4097))


def test_garbage_is_answered_or_hung_up_on(registry: Registry) -> None:
    """Whatever a guest sends, each complete request gets one reply; only an error that closes the session is raised."""
    dice = random.Random(2)
    session = Session(registry, 5)
    for _ in range(2000):
        payload = dice.randbytes(dice.randrange(20)) + dice.choice([b"", b"\0", b"/guest/a\0", b"a\0b\0"])
        session.feed(packet(dice.randrange(24), payload, transaction=dice.randrange(3)))
        replies = [each for each in heard(session) if each[0] != wire.XS_WATCH_EVENT]

        assert len(replies) == 1


def test_a_guest_has_limited_watches_and_transactions(registry: Registry) -> None:
    """The numbers of a guest's watches and transactions are limited; domain 0 is exempt."""
    guest, host = Session(registry, 5), Session(registry, 0)
    for session in (guest, host):
        for number in range(3):
            assert ask(session, wire.XS_WATCH, b"/guest\0%d\0" % number) == b"OK\0"
        ask(session, wire.XS_TRANSACTION_START, b"\0")
        ask(session, wire.XS_TRANSACTION_START, b"\0")

    assert ask(guest, wire.XS_WATCH, b"/guest\0more\0") == b"E2BIG\0"
    assert ask(guest, wire.XS_TRANSACTION_START, b"\0") == b"ENOSPC\0"
    assert ask(host, wire.XS_WATCH, b"/guest\0more\0") == b"OK\0"
    assert ask(host, wire.XS_TRANSACTION_START, b"\0") == b"3\0"
    assert ask(guest, wire.XS_RESET_WATCHES, b"\0") == b"OK\0"
    assert ask(guest, wire.XS_TRANSACTION_START, b"\0") == b"3\0"


def test_a_guest_does_not_hear_of_what_it_cannot_read(registry: Registry) -> None:
    """A watch event does not reveal names of nodes that the guest may not read."""
    guest, host = Session(registry, 5), Session(registry, 0)
    ask(guest, wire.XS_WATCH, b"/\0token\0")
    ask(host, wire.XS_WRITE, b"/secret\0x")
    ask(host, wire.XS_WRITE, b"/guest/mine\0x")
    ask(host, wire.XS_RM, b"/secret\0")

    assert heard(guest) == [(wire.XS_WATCH_EVENT, 0, 0, b"/guest/mine\0token\0")]


def test_domains_coming_and_going_are_heard_by_domain_0(registry: Registry) -> None:
    """@introduceDomain and @releaseDomain fire when set and whenever a domain comes or goes, for domain 0 only."""
    guest, host = Session(registry, 5), Session(registry, 0)
    for session in (guest, host):
        ask(session, wire.XS_WATCH, b"@introduceDomain\0in\0")
        ask(session, wire.XS_WATCH, b"@releaseDomain\0out\0")

    assert ask(host, wire.XS_INTRODUCE, b"9\0001\0001\0") == b"OK\0"
    assert ask(host, wire.XS_IS_DOMAIN_INTRODUCED, b"9\0") == b"T\0"
    host.feed(packet(wire.XS_RELEASE, b"9\0"))
    assert (wire.XS_WATCH_EVENT, 0, 0, b"@releaseDomain\0out\0") in heard(host)
    assert ask(host, wire.XS_IS_DOMAIN_INTRODUCED, b"9\0") == b"F\0"
    assert heard(guest) == []


def test_events_come_before_the_writers_own_reply(registry: Registry) -> None:
    """A client that watches what it writes gets the event before the reply, so it must tell the two apart."""
    session = Session(registry, 0)
    ask(session, wire.XS_WATCH, b"/a\0token\0")
    session.feed(packet(wire.XS_WRITE, b"/a\0x"))

    assert [each[0] for each in heard(session)] == [wire.XS_WATCH_EVENT, wire.XS_WRITE]


def test_a_closed_session_is_not_told_anything(registry: Registry) -> None:
    """A closed session gets no events."""
    gone, host = Session(registry, 5), Session(registry, 0)
    ask(gone, wire.XS_WATCH, b"/guest\0token\0")
    gone.close()
    ask(host, wire.XS_WRITE, b"/guest/a\0x")

    assert heard(gone) == []


def due(change: Change, watched: str, before: Node | None, domid: int) -> list[bytes]:
    """Return the events that a watch gets for a change, its path as token; `before` is the watched node before it."""
    told, node = change.path, change.after or change.before
    if not f"{told}/".startswith(f"{watched.rstrip('/')}/"):
        is_gone = change.after is None and watched.startswith(f"{told}/")
        told, node = watched, before if is_gone else None
    return [f"{told}\0{watched}\0".encode()] if node is not None and may(node, domid, "r") else []


def test_a_change_is_heard_by_whoever_watches_there(registry: Registry) -> None:
    """A watch gets one event for each change at or below its path, and one if its node is removed with a parent.

    Older watches get theirs first. A watch that was removed, reset or closed gets none, and leaves nothing behind.
    """
    dice = random.Random(1)
    paths = ["/", "/guest", "/guest/a", "/guest/a/b", "/guest/a/b/c", "/guest/ab", "/other", "/other/a"]
    sessions = [Session(registry, 0), Session(registry, 5), Session(registry, 0)]
    watches: list[tuple[Session, str]] = []
    for _ in range(3000):
        session, path = chosen = dice.choice(sessions), dice.choice(paths)
        request = f"{path}\0{path}\0".encode()
        what = dice.randrange(60)
        if what < 8:
            if ask(session, wire.XS_UNWATCH if chosen in watches else wire.XS_WATCH, request) == b"OK\0":
                watches = [each for each in watches if each != chosen] if chosen in watches else [*watches, chosen]
        elif what == 8:
            ask(session, wire.XS_RESET_WATCHES, b"\0")
            watches = [each for each in watches if each[0] is not session]
        elif what == 9:
            session.close()
            sessions[sessions.index(session)] = Session(registry, session.domid)
            watches = [each for each in watches if each[0] is not session]
        for each in sessions:
            heard(each)
        before = {each: registry.tree.find(each) for each in paths}
        if before[path := dice.choice(paths[1:])] and not dice.randrange(3):
            registry.tree.remove(0, path)
        else:
            registry.tree.write(0, path, b"")
        expected: dict[Session, list[bytes]] = {each: [] for each in sessions}
        for change, (watcher, watched) in product(registry.tree.changes, watches):
            expected[watcher] += due(change, watched, before[watched], watcher.domid)
        registry.publish()

        assert list(expected.values()) == [[payload for _, _, _, payload in heard(each)] for each in sessions]
    for each in sessions:
        each.close()

    assert {} == registry._watches


def test_a_relative_watch_is_told_relative_paths(registry: Registry) -> None:
    """A watch on a relative path gets events with relative paths."""
    guest = Session(registry, 5)
    ask(guest, wire.XS_WATCH, b"data\0short\0")
    ask(guest, wire.XS_WATCH, b"/local/domain/5/data\0long\0")
    heard(guest)
    registry.tree.write(0, "/local/domain/5/data/a", b"")
    registry.publish()

    assert [b"data/a\0short\0", b"/local/domain/5/data/a\0long\0"] == [each[3] for each in heard(guest)][-2:]
