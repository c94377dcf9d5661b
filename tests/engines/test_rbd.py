"""The driver rbd with a real Ceph, below real guests: kills, the barrier, locks, names, sizes, settings, keys."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count, pairwise
from pathlib import Path
from random import Random

import pytest

from tests.engines.ceph import POOL, Ceph
from tests.engines.guest import DOMID, Guest
from tests.helpers_block import Machine as Chains
from tests.helpers_block import content, discard, flush, read, write
from tests.until import until
from xenbackend.block.drivers import rbd as driver
from xenbackend.block.rbd import ownership
from xenbackend.block.rbd.noted import SIZE, Noted
from xenbackend.block.spec import parse_chain
from xenbackend.ceph.cluster import Cluster
from xenbackend.cli.main import main
from xenbackend.embedded.machine import Machine
from xenbackend.errors import DriverError, XenbackendError
from xenbackend.image import remote
from xenbackend.protocol.client import ServiceError
from xenbackend.rig.frontend import Wishes

NUMBERS = count()
SECTOR = 512


@pytest.fixture
def name() -> str:
    """Return a name that no other test's image has."""
    return f"disk{next(NUMBERS)}"


@pytest.fixture
def chain(ceph: Ceph, name: str) -> str:
    """Return the chain of a new image."""
    return ceph.create(name)


@pytest.fixture
def guest(machine: Machine, chain: str, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest on a new image."""
    with ExitStack() as stack:
        yield Guest(machine, chain, request.config.getoption("--seed"), stack)


@pytest.fixture
def chains() -> Iterator[Chains]:
    """Return a machine that opens chains in this process."""
    machine = Chains()
    yield machine
    machine.close()


class Client:
    """Another client, which has taken an image's lock."""

    def __init__(self, ceph: Ceph, image: str) -> None:
        command = [sys.executable, "-m", "tests.engines.client", str(ceph.conf), image]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        said, self.client, self.address = self._hear().split()
        assert "locked" == said

    def write(self, byte: str, offset: int, length: int) -> int:
        """Write and flush. Return the errno of the one that failed, or 0."""
        return max(self.write_alone(byte, offset, length))

    def write_alone(self, byte: str, offset: int, length: int) -> list[int]:
        """Write and flush. Return the errno of each."""
        return [int(each) for each in self._ask(f"write {byte} {offset} {length}").split()]

    def close(self) -> None:
        """Give the lock back."""
        assert "closed" == self._ask("close")

    def _ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        return self._hear()

    def _hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextmanager
def client(ceph: Ceph, image: str) -> Iterator[Client]:
    """Start another client, and kill it at the end."""
    found = Client(ceph, image)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.communicate()


def note_as_predecessor(chains: Chains, chain: str, address: str) -> None:
    """Leave the memory of a worker that had this address."""
    Noted(chains.make_env.memory(f"rbd-{zlib.crc32(chain.encode()):08x}:owner", SIZE)).text = address


def owed_s(guest: Guest) -> int:
    """Return for how many seconds the cluster has owed an answer, or 0."""
    found = re.search(r"the oldest for (\d+) s", guest.fact("cluster"))
    return int(found[1]) if found else 0


def go_on_all_the_same(guest: Guest, ceph: Ceph, name: str) -> None:
    """Declare, by the command in the error, that an image has all that its guest wrote, and resume the disk."""
    ours = re.search("image-meta set IMAGE (.*) '(.*)'", guest.error())
    assert ours
    ceph.rbd("image-meta", "set", f"{POOL}/{name}", *ours.groups())
    guest.machine.ask({"verb": "resume", "vbd": "5/xvda"})


def refusal(capsys: pytest.CaptureFixture[str], chain: str, *options: str) -> str:
    """Return why `check` refuses a chain, as one line."""
    capsys.readouterr()
    assert 2 == main(["check", *options, chain])
    return " ".join(capsys.readouterr().err.split())


def test_demo(chain: str) -> None:
    """The demo runs on such a disk and verifies every sector."""
    assert 0 == main(["demo", "--quiet", "--area", "16M", "--seconds", "1", chain])


def test_workers_are_killed_under_load(guest: Guest, ceph: Ceph, request: pytest.FixtureRequest) -> None:
    """If its worker dies amid requests, a guest sees a pause and no error, and each dead worker is blocklisted."""
    random = Random(request.config.getoption("--seed"))
    dead = set()
    for _ in range(5):
        guest.load.run(random.randrange(20, 120))
        guest.load.top_up()
        until(lambda: guest.fact("lock"))
        dead.add(guest.fact("lock").split()[-1])
        guest.kill()
    guest.load.run(200)
    guest.end()
    assert dead <= {line.split()[0] for line in ceph.ceph("osd", "blocklist", "ls").splitlines()}


def test_everything_dies_at_once(guest: Guest) -> None:
    """If worker and service die at the same time, a guest sees only a longer pause."""
    guest.load.run(50)
    guest.load.top_up()
    guest.kill()
    os.kill(guest.machine.service_pid, 9)
    guest.load.run(100)
    guest.end()


def test_a_worker_is_behind_its_walls(guest: Guest) -> None:
    """An rbd worker has all the walls of any other worker, except for the network and what librados needs."""
    guest.machine.attach(DOMID, "xvdb", "ram:1M")
    ours, other = sorted(guest.machine.ask({"verb": "status"})["data"], key=lambda each: str(each["device"]))
    assert (["ceph", "network"], []) == (ours["needs"], other["needs"])
    assert (other["walls"], other["no_walls"]) == (ours["walls"], ours["no_walls"])
    assert "descriptors" in ours["walls"]


@pytest.mark.parametrize("refuses", [True, False], ids=["barrier", "without"])
def test_a_late_write_never_lands(
    ceph: Ceph, chains: Chains, chain: str, name: str, *, refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late write of a predecessor is refused once its successor has written. Without the blocklist it would land."""
    if not refuses:
        monkeypatch.setattr(Cluster, "refuse", lambda *_: None)
    with client(ceph, name) as former:
        assert 0 == former.write("A", 0, SECTOR)
        note_as_predecessor(chains, chain, former.address)
        successor = chains.open(chain)
        assert [0, 0] == [*chains.do(successor, write(0, SECTOR * b"B")), *chains.do(successor, flush())]
        late = former.write("A", 0, SECTOR)
        found = read(0, SECTOR)
        assert [0] == chains.do(successor, found)
        successor.close()
    assert (errno.ESHUTDOWN if refuses else 0) == late
    assert SECTOR * (b"B" if refuses else b"A") == content(found)


def test_a_strangers_lock_is_refused_and_left_alone(
    ceph: Ceph, machine: Machine, chain: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image that another client has locked is neither checked nor attached. The error names the client."""
    with client(ceph, name) as stranger:
        expected = f"in use by {stranger.client} at {stranger.address}, which holds its lock"
        assert expected in refusal(capsys, chain)
        with closing(machine.create_guest(DOMID)), pytest.raises(XenbackendError, match=stranger.client):
            machine.attach(DOMID, "xvda", chain)
        assert 0 == stranger.write("A", 0, SECTOR)
        stranger.close()
    assert 0 == main(["check", chain])


def test_a_lock_by_hand_is_refused_and_left_alone(
    ceph: Ceph, chain: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lock by `rbd lock add`, whose client has gone at once, is not taken for a dead worker's. The error names it."""
    ceph.rbd("lock", "add", f"{POOL}/{name}", "maintenance")
    [before] = ceph.json("lock", "ls", f"{POOL}/{name}")
    assert "'maintenance'" in refusal(capsys, chain)
    assert [before] == ceph.json("lock", "ls", f"{POOL}/{name}")
    ceph.rbd("lock", "rm", f"{POOL}/{name}", before["id"], before["locker"])
    assert 0 == main(["check", chain])


def test_a_worker_that_the_cluster_refuses_is_followed_by_another_one(guest: Guest, ceph: Ceph) -> None:
    """If a worker is blocklisted, another one replaces it. The guest sees no error, and the log says what happened."""
    guest.load.run(50)
    guest.load.top_up()
    worker, address = guest.status()["worker"], guest.fact("lock").split()[-1]
    ceph.ceph("osd", "blocklist", "add", address)
    guest.load.run(200)
    guest.end()
    assert worker != guest.status()["worker"]
    assert "it has been put on the blocklist" in guest.machine.log.read_text()


def test_nothing_is_written_once_somebody_else_has_the_lock(guest: Guest, ceph: Ceph, name: str) -> None:
    """If another client has taken the lock, the worker waits, says who has it, writes nothing, and goes on later."""
    guest.load.run(50)
    guest.load.finish()
    [lock] = ceph.json("lock", "ls", f"{POOL}/{name}")
    ceph.rbd("lock", "rm", f"{POOL}/{name}", lock["id"], lock["locker"])
    with client(ceph, name) as stranger:
        before = ceph.digest(name)
        guest.load.top_up()
        until(lambda: f"in use by {stranger.client}" in guest.error())
        assert before == ceph.digest(name)
        stranger.close()
    guest.load.run(100)
    guest.end()


def test_a_guest_that_was_left_behind_does_not_go_on(guest: Guest, ceph: Ceph, chain: str, name: str) -> None:
    """If the image was meanwhile served as another disk, the former guest waits even when the lock is free again."""
    guest.load.run(50)
    guest.load.finish()
    [lock] = ceph.json("lock", "ls", f"{POOL}/{name}")
    ceph.rbd("lock", "rm", f"{POOL}/{name}", lock["id"], lock["locker"])
    with closing(guest.machine.create_guest(6)):
        guest.machine.detach(guest.machine.attach(6, "xvda", chain))
    until(lambda: 1 == len(guest.machine.ask({"verb": "status"})["data"]))
    guest.load.top_up()
    until(lambda: "the image has meanwhile been served as another disk" in guest.error())
    assert "other-file" == guest.status()["reason"]
    go_on_all_the_same(guest, ceph, name)
    guest.load.run(50)
    guest.end()


def test_a_disk_stays_the_image_that_it_was(guest: Guest, ceph: Ceph, name: str) -> None:
    """If the name means no image or another one, the disk waits and says so, until the name is right again."""
    guest.load.run(50)
    ceph.rbd("rename", f"{POOL}/{name}", f"{POOL}/{name}-away")
    guest.load.run(50)
    guest.load.top_up()
    guest.kill()
    until(lambda: "there is no image" in guest.error())
    assert "other-file" == guest.status()["reason"]
    ceph.create(name)
    guest.machine.ask({"verb": "resume", "vbd": "5/xvda"})
    until(lambda: "means another image now" in guest.error())
    assert [] == ceph.json("diff", f"{POOL}/{name}")
    ceph.rbd("rm", f"{POOL}/{name}")
    ceph.rbd("rename", f"{POOL}/{name}-away", f"{POOL}/{name}")
    guest.machine.ask({"verb": "resume", "vbd": "5/xvda"})
    guest.load.run(50)
    guest.end()


def test_a_disk_stays_the_image_that_it_was_while_no_service_runs(guest: Guest, ceph: Ceph, name: str) -> None:
    """If the service was stopped, a new image under the old name is still recognized as another one."""
    guest.load.run(50)
    guest.load.finish()
    guest.machine.stop_service()
    ceph.rbd("rename", f"{POOL}/{name}", f"{POOL}/{name}-away")
    ceph.create(name)
    guest.machine.start_service()
    until(lambda: "the image has not been served as any disk yet" in guest.error())
    assert "other-file" == guest.status()["reason"]
    ceph.rbd("rm", f"{POOL}/{name}")
    ceph.rbd("rename", f"{POOL}/{name}-away", f"{POOL}/{name}")
    guest.machine.ask({"verb": "resume", "vbd": "5/xvda"})
    guest.load.run(50)
    guest.end()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rbd_cache", "true"),
        ("rbd_blocklist_on_break_lock", "false"),
        ("rbd_blocklist_expire_seconds", "1"),
        ("rbd_disable_zero_copy_writes", "false"),
    ],
)
@pytest.mark.parametrize("level", ["image", "pool"])
def test_settings_that_lose_something_are_refused(
    ceph: Ceph, chain: str, name: str, level: str, setting: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a setting makes a worker's death unsafe, the image is refused with its name and place. Reading is allowed."""
    of = f"{POOL}/{name}" if level == "image" else POOL
    ceph.rbd("config", level, "set", of, setting, value)
    try:
        said = refusal(capsys, chain)
        assert 0 == main(["check", "--read-only", chain])
    finally:
        ceph.rbd("config", level, "rm", of, setting)
    assert f"{setting} is {value!r}, as the {level} says" in said


def test_a_setting_that_changes_in_service_is_seen_before_a_successor_writes(guest: Guest, ceph: Ceph) -> None:
    """If a cache is switched on while a disk is served, nothing is lost: the next worker refuses to open the image."""
    guest.load.run(50)
    ceph.rbd("config", "pool", "set", POOL, "rbd_cache", "true")
    try:
        guest.load.run(50)
        guest.load.top_up()
        guest.kill()
        until(lambda: "rbd_cache is 'true'" in guest.error())
    finally:
        ceph.rbd("config", "pool", "rm", POOL, "rbd_cache")
    guest.load.run(50)
    guest.end()


def test_a_plug_in_is_refused(ceph: Ceph, chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A cache plug-in of librbd is refused, even if this host does not have it."""
    ceph.rbd("config", "pool", "set", POOL, "rbd_plugins", "pwl_cache")
    try:
        assert "rbd_plugins" in refusal(capsys, chain)
    finally:
        ceph.rbd("config", "pool", "rm", POOL, "rbd_plugins")


def test_what_has_no_lock_is_refused(ceph: Ceph, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An image without the feature exclusive-lock can only be opened read-only."""
    chain = ceph.create(name, "64M", "--image-feature", "layering")
    assert "feature enable" in refusal(capsys, chain)
    assert 0 == main(["check", "--read-only", chain])


def test_a_key_that_can_fence_nobody_is_refused(
    ceph: Ceph,
    machine: Machine,
    chain: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """A key without the right to blocklist is refused. If it loses that right, the next worker waits for it."""
    options = ceph.add_user(f"user-{name}", mon="allow r")
    chain = ceph.chain(name, options)
    expected = "may not put a client on the cluster's blocklist"
    assert expected in refusal(capsys, chain)
    with closing(machine.create_guest(DOMID)), pytest.raises(XenbackendError, match="blocklist"):
        machine.attach(DOMID, "xvda", chain)
    ceph.add_user(f"user-{name}")
    with ExitStack() as stack:
        guest = Guest(machine, chain, request.config.getoption("--seed"), stack)
        guest.load.run(50)
        guest.load.top_up()
        ceph.add_user(f"user-{name}", mon="allow r")
        guest.kill()
        until(lambda: expected in guest.error())
        ceph.add_user(f"user-{name}")
        guest.load.run(50)
        guest.end()


@pytest.mark.parametrize("way", ["right", "user"])
def test_a_key_that_loses_its_rights_in_service(
    ceph: Ceph, machine: Machine, chain: str, name: str, way: str, request: pytest.FixtureRequest
) -> None:
    """If a key loses its rights, the connected worker goes on, and its successor waits until they are restored."""
    user = f"user-{name}"
    chain = ceph.chain(name, ceph.add_user(user))
    with ExitStack() as stack:
        guest = Guest(machine, chain, request.config.getoption("--seed"), stack)
        guest.load.run(50)
        if way == "right":
            ceph.add_user(user, osd=f"profile rbd-read-only pool={POOL}")
            give_back, expected = lambda: ceph.add_user(user), f"the key of client.{user} may not open"
        else:
            give_back, expected = ceph.remove_user(user), f"does not know client.{user} with this key"
        guest.load.run(50)
        guest.load.top_up()
        guest.kill()
        until(lambda: expected in guest.error())
        give_back()
        guest.load.run(50)
        guest.end()


def test_a_client_that_loses_a_right_ends(
    ceph: Ceph, machine: Machine, chain: str, name: str, request: pytest.FixtureRequest
) -> None:
    """If the cluster allows a client no more writes, the guest sees no error: it waits, and `status` says why.

    Once the right is restored, the writes are done.
    """
    user, ticket_s = f"user-{name}", 6
    chain = ceph.chain(name, ceph.add_user(user))
    with (ceph.directory / f"{user}.conf").open("a") as conf:
        conf.write("[client]\nmon client ping interval = 1\n")  # so that its ticket is renewed before it expires
    with ExitStack() as stack:
        stack.callback(ceph.set_ticket_s, 3600)
        ceph.set_ticket_s(ticket_s)
        guest = Guest(machine, chain, request.config.getoption("--seed"), stack)
        guest.load.run(50)
        guest.load.finish()
        ceph.add_user(user, osd=f"profile rbd-read-only pool={POOL}")
        until_then = time.monotonic() + ticket_s + 1
        until(lambda: time.monotonic() > until_then)
        ceph.restart_osd()
        guest.load.top_up()
        until(lambda: f"the key of client.{user} may not open" in guest.error())
        assert "interrupted" == guest.status()["reason"]
        assert "its key has lost a right" in machine.log.read_text()
        ceph.add_user(user)
        guest.load.run(50)
        guest.end()


def test_a_wrong_key_is_a_sentence(
    ceph: Ceph, chain: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown key, a missing pool, a missing image and a missing key each have a message of their own."""
    conf = tmp_path / "ceph.conf"
    conf.write_text(ceph.conf.read_text() + "[client]\nkey = AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==\n")
    assert "does not know client.admin with this key" in refusal(capsys, f"rbd:{POOL}/{name},conf={conf}")
    assert "there is no image 'nonesuch'" in refusal(capsys, ceph.chain("nonesuch"))
    assert "has no pool 'nonesuch'" in refusal(capsys, f"rbd:nonesuch/x,conf={ceph.conf}")
    assert "there is no key for client.nonesuch" in refusal(capsys, ceph.chain(name, f"id=nonesuch,conf={ceph.conf}"))


def test_a_snapshot_is_read(ceph: Ceph, chains: Chains, chain: str, name: str, tmp_path: Path) -> None:
    """A snapshot is a read-only disk that keeps its content. It can be converted, and be the source below `cow:`."""
    data = Random(1).randbytes(1 << 20)
    disk = chains.open(chain)
    assert [0] == chains.do(disk, write(1 << 20, data))
    ceph.rbd("snap", "create", f"{POOL}/{name}@then")
    assert [0] == chains.do(disk, write(1 << 20, bytes(1 << 20)))
    disk.close()
    then = ceph.chain(f"{name}@then")
    with pytest.raises(DriverError, match="can only be read"):
        chains.open(then)
    snapshot = chains.open(then, read_only=True)
    assert snapshot.geometry.read_only
    found = read(1 << 20, 1 << 20)
    assert [0] == chains.do(snapshot, found)
    assert data == content(found)
    snapshot.close()
    copy = tmp_path / "copy.img"
    assert 0 == main(["image", "convert", then, f"aio:{copy}"])
    assert data == copy.read_bytes()[1 << 20 : 2 << 20]
    assert 0 == main(["demo", "--quiet", "--area", "8M", "--seconds", "1", f"cow:{tmp_path}/cow|{then}"])


def test_a_snapshot_is_told_from_another_one_of_its_name(ceph: Ceph, chains: Chains, chain: str, name: str) -> None:
    """If a snapshot is replaced by a new one of the same name, it is not served in the former one's place."""
    ceph.rbd("snap", "create", f"{POOL}/{name}@then")
    then = ceph.chain(f"{name}@then")
    for _ in range(2):
        chains.open(then, read_only=True).close()
    ceph.rbd("snap", "rm", f"{POOL}/{name}@then")
    disk = chains.open(chain)
    assert [0] == chains.do(disk, write(0, SECTOR * b"B"))
    disk.close()
    ceph.rbd("snap", "create", f"{POOL}/{name}@then")
    with pytest.raises(DriverError, match="means another image now") as caught:
        chains.open(then, read_only=True)
    assert errno.ESTALE == caught.value.errno


def test_a_namespace(ceph: Ceph, name: str) -> None:
    """An image in a namespace can be used with a key that has no rights outside of it."""
    ceph.rbd("namespace", "create", f"{POOL}/{name}")
    options = ceph.add_user(f"user-{name}", osd=f"profile rbd pool={POOL} namespace={name}")
    ceph.create(f"{name}/disk")
    assert 0 == main(["demo", "--quiet", "--area", "4M", "--seconds", "1", ceph.chain(f"{name}/disk", options)])


def test_a_size_that_changes(guest: Guest, ceph: Ceph, name: str) -> None:
    """If the image grows, a fact says so and `resize` uses it. If it shrinks, the disk pauses without an error."""
    guest.load.run(50)
    ceph.rbd("resize", "--size", "80M", f"{POOL}/{name}")
    until(lambda: str(80 << 20) in guest.fact("size"))
    assert 64 << 20 == guest.status()["layers"][0]["size"]
    guest.machine.ask({"verb": "resize", "vbd": "5/xvda"})
    assert 80 << 20 == guest.status()["layers"][0]["size"]
    guest.load.run(50)
    ceph.rbd("resize", "--allow-shrink", "--size", "72M", f"{POOL}/{name}")
    until(lambda: "other-size" == guest.status()["reason"])
    ceph.rbd("resize", "--size", "80M", f"{POOL}/{name}")
    guest.machine.ask({"verb": "resume", "vbd": "5/xvda"})
    guest.load.run(50)
    guest.end()


@pytest.fixture
def stopped(ceph: Ceph) -> Iterator[Callable[[], None]]:
    """Return a function that stops the OSD, which is continued after the test."""
    yield ceph.stop_osd
    ceph.continue_osd()


@pytest.fixture
def full(ceph: Ceph) -> Iterator[Callable[[bool], None]]:
    """Return a function that makes the cluster full or not full, which it is not after the test."""
    yield ceph.be_full
    ceph.be_full(False)


@pytest.mark.parametrize("kills", [False, True], ids=["served", "killed"])
def test_an_osd_that_stands_still_is_waited_for(
    guest: Guest, ceph: Ceph, stopped: Callable[[], None], *, kills: bool
) -> None:
    """A guest waits for an OSD, even longer than after the death of a client, and a fact says for how long.

    The same holds if its worker dies meanwhile.
    """
    guest.load.run(50)
    stopped()
    guest.load.top_up()
    until(lambda: owed_s(guest) >= (3 if kills else 8))
    if kills:
        worker = guest.status()["worker"]
        guest.kill()
        until(lambda: guest.status()["worker"] not in (None, worker))
    ceph.continue_osd()
    guest.load.run(100)
    guest.end()
    until(lambda: kills or guest.fact("cluster") == "answers")


def test_a_full_cluster_is_a_pause(guest: Guest, full: Callable[[bool], None]) -> None:
    """If the cluster is full, writes wait and reads go on, even if the worker dies. With room, the writes are done."""
    guest.load.run(50)
    guest.load.finish()
    full(True)
    assert 8 * SECTOR == len(guest.frontend.read(8, 8))
    guest.load.top_up()
    until(lambda: owed_s(guest) > 1)
    guest.kill()
    full(False)
    guest.load.run(50)
    guest.end()


def test_a_guest_migrates(machine: Machine, chain: str, request: pytest.FixtureRequest) -> None:
    """The disk of an incoming guest is only looked at until the guest's former host has released its lock."""
    with ExitStack() as stack:
        guest = Guest(machine, chain, request.config.getoption("--seed"), stack)
        guest.load.run(50)
        coming = machine.create_guest(6)
        machine.store.write("/local/domain/6/name", "guest--incoming")
        path = machine.attach(6, "xvda", chain)
        guest.load.run(50)
        guest.end()
    machine.detach(guest.path)
    with closing(coming), closing(coming.connect(path, Wishes())) as frontend:
        guest.model.check(0, frontend.read(0, 64))
        frontend.write(0, bytes(SECTOR))


def test_a_guest_migrates_to_a_worker_that_dies(machine: Machine, chain: str, request: pytest.FixtureRequest) -> None:
    """If the worker that only looked at the disk dies when the guest arrives, its successor opens the disk."""
    with ExitStack() as stack:
        guest = Guest(machine, chain, request.config.getoption("--seed"), stack)
        guest.load.run(50)
        coming = machine.create_guest(6)
        machine.store.write("/local/domain/6/name", "guest--incoming")
        path = machine.attach(6, "xvda", chain)
        guest.end()
    machine.detach(guest.path)
    machine.store.write("/local/domain/6/name", "guest")
    [looked] = machine.ask({"verb": "status"})["data"]
    os.kill(looked["worker"], signal.SIGKILL)
    with closing(coming), closing(coming.connect(path, Wishes())) as frontend:
        guest.model.check(0, frontend.read(0, 64))
        frontend.write(0, bytes(SECTOR))
        [served] = machine.ask({"verb": "status"})["data"]
    assert looked["worker"] != served["worker"]


def test_a_mirror_is_only_read(ceph: Ceph, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mirror of an image in another cluster is refused for writing, and the error says how to promote it."""
    ceph.rbd("mirror", "pool", "enable", POOL, "image")
    try:
        chain = ceph.create(name, "64M", "--image-feature", "exclusive-lock,journaling")
        ceph.rbd("mirror", "image", "enable", f"{POOL}/{name}", "journal")
        assert 0 == main(["check", chain])
        ceph.rbd("mirror", "image", "demote", f"{POOL}/{name}")
        assert f"rbd mirror image promote {POOL}/{name}" in refusal(capsys, chain)
        assert 0 == main(["check", "--read-only", chain])
        ceph.rbd("mirror", "image", "promote", f"{POOL}/{name}")
        assert 0 == main(["check", chain])
        ceph.rbd("mirror", "image", "disable", f"{POOL}/{name}")
    finally:
        ceph.rbd("mirror", "pool", "disable", POOL)


def test_the_fence_holds_as_long_as_its_entry(
    ceph: Ceph, chains: Chains, chain: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped predecessor writes nothing while it is blocklisted. When the entry has expired, it may write."""
    monkeypatch.setattr(ownership, "DEAD_S", 3.0)
    with client(ceph, name) as former:
        assert 0 == former.write("A", 0, SECTOR)
        former.process.send_signal(signal.SIGSTOP)
        note_as_predecessor(chains, chain, former.address)
        successor = chains.open(chain)
        assert [0, 0] == [*chains.do(successor, write(0, SECTOR * b"B")), *chains.do(successor, flush())]
        assert former.address in ceph.ceph("osd", "blocklist", "ls")
        until(lambda: former.address not in ceph.ceph("osd", "blocklist", "ls"))
        former.process.send_signal(signal.SIGCONT)
        late, _ = former.write_alone("A", 0, SECTOR)
        found = read(0, SECTOR)
        assert [0] == chains.do(successor, found)
        successor.close()
    assert SECTOR * (b"B" if late else b"A") == content(found)


def test_killed_while_opening(guest: Guest) -> None:
    """If a successor dies before, while or just after it takes the lock, the next one blocklists both predecessors."""
    random = Random(guest.status()["worker"])
    for _ in range(4):
        guest.load.run(60)
        guest.load.top_up()
        worker = guest.status()["worker"]
        guest.kill()
        until(lambda worker=worker: guest.status()["worker"] not in (None, worker))
        until_then = time.monotonic() + random.random() * 0.2
        until(lambda until_then=until_then: time.monotonic() > until_then)
        guest.kill()
    guest.load.run(100)
    guest.end()


def test_opening_and_closing_have_an_end(
    ceph: Ceph, chains: Chains, chain: str, stopped: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the cluster does not answer, opening and closing an image each end with an error after a time."""
    monkeypatch.setattr(driver, "OPEN_S", 1.0)
    monkeypatch.setattr(driver, "CLOSE_S", 1.0)
    disk = chains.open(chain)
    stopped()
    with pytest.raises(DriverError, match="has not answered for 1 s"):
        disk.close()
    with pytest.raises(DriverError, match="has not answered for 1 s"):
        chains.open(ceph.chain("whatever"))


def test_every_kind_of_request(chains: Chains, chain: str, request: pytest.FixtureRequest) -> None:
    """Random reads, writes and discards of every shape are done right. A discard changes nothing beside its range.

    After a discard, each sector of its range is zeros or unchanged.
    """
    random = Random(request.config.getoption("--seed"))
    size = 4 << 20
    expected = bytearray(random.randbytes(size))
    disk = chains.open(chain)
    assert [0] == chains.do(disk, write(0, bytes(expected)))
    for _ in range(60):
        start = random.randrange(size // SECTOR) * SECTOR
        length = random.randrange(1, min(256, (size - start) // SECTOR) + 1) * SECTOR
        cuts = sorted({0, length, *(random.randrange(length // SECTOR) * SECTOR for _ in range(random.randrange(5)))})
        pieces = [after - before for before, after in pairwise(cuts)]
        if random.random() < 0.2:
            assert [0] == chains.do(disk, discard(start, length))
            found = read(start, length)
            assert [0] == chains.do(disk, found)
            for at in range(0, length, SECTOR):
                now = content(found)[at : at + SECTOR]
                assert now in (bytes(SECTOR), expected[start + at : start + at + SECTOR])
            expected[start : start + length] = content(found)
        elif random.random() < 0.5:
            data = random.randbytes(length)
            parts = [data[before:after] for before, after in pairwise(cuts)]
            assert [0] == chains.do(disk, write(start, *parts))
            expected[start : start + length] = data
        else:
            found = read(start, *pieces)
            assert [0] == chains.do(disk, found)
            assert expected[start : start + length] == content(found)
    gone = discard(1 << 20, 1 << 20)
    assert [0, 0] == [*chains.do(disk, gone), *chains.do(disk, flush())]
    found = read(0, size)
    assert [0] == chains.do(disk, found)
    assert expected[: 1 << 20] == content(found)[: 1 << 20]
    assert expected[2 << 20 :] == content(found)[2 << 20 :]
    disk.close()


def test_exchanges_and_hand_overs(guest: Guest, ceph: Ceph, chain: str, name: str) -> None:
    """Under load, `set` adds layers and `upgrade` replaces the worker, and no client is blocklisted for that."""
    before = ceph.ceph("osd", "blocklist", "ls")
    guest.load.run(50)
    guest.load.top_up()
    guest.machine.ask({"verb": "set", "vbd": "5/xvda", "chain": f"log:|{chain}"})
    guest.load.run(50)
    guest.load.top_up()
    worker = guest.status()["worker"]
    guest.machine.ask({"verb": "upgrade", "vbd": "5/xvda"})
    guest.load.run(50)
    assert worker != guest.status()["worker"]
    with pytest.raises(ServiceError, match="an image other than"):
        guest.machine.ask({"verb": "set", "vbd": "5/xvda", "chain": ceph.create(f"{name}-other")})
    guest.load.run(50)
    guest.end()
    refused = set(ceph.ceph("osd", "blocklist", "ls").splitlines()) - set(before.splitlines())
    assert [] == [each for each in refused if not each.startswith("192.0.2.1:")]
    assert [] == ceph.json("lock", "ls", f"{POOL}/{name}-other")


def test_the_same_image_as_another_user(guest: Guest, ceph: Ceph, name: str) -> None:
    """An image remains the same for another user. If the worker dies after that exchange, its successor goes on."""
    guest.load.run(50)
    guest.load.top_up()
    chain = ceph.chain(name, ceph.add_user(f"user-{name}"))
    guest.machine.ask({"verb": "set", "vbd": "5/xvda", "chain": chain})
    guest.load.run(50)
    guest.load.top_up()
    guest.kill()
    guest.load.run(50)
    guest.end()
    assert chain == guest.status()["chain"]


def test_a_host_that_comes_back_writes_nothing(guest: Guest, ceph: Ceph, chain: str, name: str) -> None:
    """If a host stands still, its disk can be moved to another one by order. When it goes on, its guest waits."""
    guest.load.run(50)
    guest.load.finish()
    stopped = [guest.machine.service_pid, guest.status()["worker"]]
    owner = guest.fact("lock").split()[-1]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    guest.load.top_up()  # these requests are in flight when the host goes on
    try:
        assert 0 == main(["image", "unlock", chain, "--owner", owner])
        with Machine() as elsewhere, closing(elsewhere.create_guest(6)) as there:
            path = elsewhere.attach(6, "xvda", chain)
            with closing(there.connect(path, Wishes())) as frontend:
                frontend.write(0, SECTOR * b"B")
                frontend.flush()
                before = ceph.digest(name)
                for pid in stopped:
                    os.kill(pid, signal.SIGCONT)
                until(lambda: "in use by client." in guest.error())
                assert before == ceph.digest(name)
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    until(lambda: "the image has meanwhile been served as another disk" in guest.error())
    assert before == ceph.digest(name)
    go_on_all_the_same(guest, ceph, name)
    guest.load.finish()


def pieces(capsys: pytest.CaptureFixture[str], *words: str) -> list[tuple[int, int, bool, bool]]:
    """Return the pieces that `image map` reports: start, length, whether present, whether data."""
    capsys.readouterr()
    assert 0 == main(["image", "map", "--json", *words])
    found = json.loads(capsys.readouterr().out)
    return [(each["start"], each["length"], each["present"], each["data"]) for each in found]


def test_what_was_written_is_known(
    ceph: Ceph, chains: Chains, chain: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`image map` tells data from what was never written, even in a clone, and reports the changes since a snapshot."""
    mib = 1 << 20
    disk = chains.open(chain)
    assert [0] == chains.do(disk, write(8 * mib, bytes(range(256)) * 16))
    ceph.rbd("snap", "create", f"{POOL}/{name}@then")
    assert [0, 0] == chains.do(disk, write(4 * mib, b"x" * 512), discard(8 * mib, 4 * mib))
    disk.close()
    assert [(8 * mib, 4096, True, True)] == [each for each in pieces(capsys, ceph.chain(f"{name}@then")) if each[3]]
    [(start, length, *_)] = [each for each in pieces(capsys, chain) if each[3]]
    assert start <= 4 * mib < 4 * mib + 512 <= start + length <= 8 * mib
    changed = [each for each in pieces(capsys, "--since", "then", chain) if each[2]]
    assert [(4 * mib, True), (8 * mib, False)] == [(start, is_data) for start, _, _, is_data in changed]
    ceph.rbd("snap", "protect", f"{POOL}/{name}@then")
    ceph.rbd("clone", f"{POOL}/{name}@then", f"{POOL}/{name}-clone")
    assert [8 * mib] == [start for start, _, _, is_data in pieces(capsys, ceph.chain(f"{name}-clone")) if is_data]
    assert 2 == main(["image", "map", "--since", "never", chain])
    assert "ask what has changed since never" in capsys.readouterr().err


def test_a_sector_that_is_zeros_in_part_has_changed(
    ceph: Ceph, chains: Chains, chain: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """If an image was truncated inside a sector and has grown again, a backup of its changes includes that sector."""
    odd = (6 << 20) + 100
    disk = chains.open(chain)
    assert [0] == chains.do(disk, write(0, b"x" * (8 << 20)))
    disk.close()
    ceph.rbd("snap", "create", f"{POOL}/{name}@then")
    backup = bytearray(b"x" * (8 << 20))
    ceph.rbd("resize", "--allow-shrink", "--size", f"{odd}B", f"{POOL}/{name}")
    ceph.rbd("resize", "--size", "64M", f"{POOL}/{name}")
    changed = [each for each in pieces(capsys, "--since", "then", chain) if each[2]]
    disk = chains.open(chain)
    for start, length, _, is_data in changed:
        found = read(start, length)
        assert [0] == chains.do(disk, found)
        backup[start : start + length] = content(found) if is_data else bytes(length)
    disk.close()
    assert b"x" * odd + bytes((8 << 20) - odd) == backup


def test_images_are_converted_both_ways(
    ceph: Ceph, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file becomes an image and an image a file, both with holes. The image gets its name when it is complete."""
    source, copy = tmp_path / "source.img", tmp_path / "copy.img"
    with source.open("wb") as file:
        file.write(Random(1).randbytes(3 << 20))
        file.truncate(64 << 20)
    target = ceph.chain(name)
    assert 0 == main(["image", "convert", "--quiet", f"aio:{source}", target])
    assert [(0, 3 << 20)] == [each[:2] for each in pieces(capsys, target) if each[3]]
    assert 0 == main(["image", "convert", "--quiet", target, f"aio:{copy}"])
    assert source.read_bytes() == copy.read_bytes()
    assert copy.stat().st_blocks * 512 < 8 << 20
    assert 2 == main(["image", "convert", "--quiet", f"aio:{source}", target])
    assert "exists already" in capsys.readouterr().err
    with source.open("r+b") as file:
        file.write(bytes(1 << 20))
    assert 0 == main(["image", "convert", "--quiet", "--overwrite", f"aio:{source}", target])
    assert 0 == main(["image", "compare", "--quiet", f"aio:{source}", target])
    assert [name] == [each for each in ceph.json("ls", POOL) if each.startswith(name)]


def test_a_conversion_that_is_stopped_leaves_nothing(
    ceph: Ceph, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion that is stopped leaves no image under either name. The error names what a killed one has left."""
    source = tmp_path / "source.img"
    source.write_bytes(Random(1).randbytes(4 << 20))

    def stop(done: int, size: int) -> None:
        if done > size // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remote.convert(parse_chain(f"aio:{source}"), parse_chain(ceph.chain(name)), stop)
    assert [] == [each for each in ceph.json("ls", POOL) if each.startswith(name)]
    ceph.create(f"{name}.partial")
    with pytest.raises(XenbackendError, match=r"\.partial is left from an earlier conversion"):
        remote.convert(parse_chain(f"aio:{source}"), parse_chain(ceph.chain(name)), lambda *_: None)


def test_what_somebody_writes_to_is_not_copied(guest: Guest, ceph: Ceph, chain: str, name: str, tmp_path: Path) -> None:
    """An image in service is not copied, because it would change meanwhile. A snapshot of it is.

    `xenbackend snapshot` makes one while the guest goes on. It holds everything that the guest was answered.
    """
    guest.load.run(50)
    guest.load.finish()
    assert 2 == main(["image", "convert", "--quiet", chain, f"aio:{tmp_path}/copy"])
    guest.machine.ask({"verb": "snapshot", "vbd": "5/xvda", "file": "@then"})
    before = ceph.digest(f"{name}@then")
    assert ceph.digest(name) == before
    guest.load.run(100)
    assert chain == guest.status()["chain"]
    with pytest.raises(ServiceError, match="make the snapshot 'then'"):
        guest.machine.ask({"verb": "snapshot", "vbd": "5/xvda", "file": "@then"})
    with pytest.raises(ServiceError, match="is not a valid name for a snapshot"):
        guest.machine.ask({"verb": "snapshot", "vbd": "5/xvda", "file": "@a/b"})
    guest.end()
    assert 0 == main(["image", "convert", "--quiet", ceph.chain(f"{name}@then"), f"aio:{tmp_path}/copy"])
    assert before == hashlib.sha256((tmp_path / "copy").read_bytes()).hexdigest()


def test_a_dead_hosts_disk_is_taken_over_by_order(
    ceph: Ceph, machine: Machine, chain: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The owner that is named, and only that one, is blocklisted at once, and its later writes are refused."""
    with client(ceph, name) as former:
        assert 0 == former.write("A", 0, SECTOR)
        former.process.send_signal(signal.SIGSTOP)
        for words in ([], ["--owner", "client.1"]):
            assert 2 == main(["image", "unlock", chain, *words])
            said = " ".join(capsys.readouterr().err.split())
            assert f"{former.client} at {former.address} has the image's lock" in said
        assert former.address not in ceph.ceph("osd", "blocklist", "ls")
        assert 0 == main(["image", "unlock", chain, "--owner", former.client])
        with closing(machine.create_guest(DOMID)) as here:
            path = machine.attach(DOMID, "xvda", chain)
            with closing(here.connect(path, Wishes())) as frontend:
                frontend.write(0, SECTOR * b"B")
                former.process.send_signal(signal.SIGCONT)
                assert errno.ESHUTDOWN == former.write("A", 0, SECTOR)
                assert SECTOR * b"B" == bytes(frontend.read(0, 1))
        assert 2 == main(["image", "unlock", "aio:/img", "--owner", "x"])
