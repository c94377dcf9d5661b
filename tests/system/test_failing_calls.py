"""A worker's n-th call of the kernel fails, for each n: nothing is lost or left, and the guest's answer is right.

`tests.failing_calls` has the table of calls. With ``--long`` the worker's beginning, its end and a recovery are
included, which take a process for each n.
"""

from __future__ import annotations

import ast
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.driven import Driven
from tests.failing_calls import CALLS, EXEMPT, Control
from xenbackend.blkif.abi import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
)
from xenbackend.protocol import messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Stage
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.rig.guest_ring import Submitted
from xenbackend.units import PAGE

pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SIZE = 4 << 20
POLICY = "enospc=report,read=retry 3 every 0.01s,write=retry 3 every 0.01s"
NOTHING = {"mappings": 0, "pins": 0, "ports": 0}
FLUSHES = (BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE_BARRIER)
MANY = 400  # most calls that one step may make
SHARES = 8  # the longest sweep is divided into this many tests


class Bed:
    """A worker whose calls fail when told, and what it has open while it serves no guest."""

    def __init__(self, directory: Path, *, is_long: bool = False) -> None:
        self.control = Control(directory / "control")
        self.images = [directory / "a.img", directory / "b.img"]
        self.driven = Driven(directory, command=["python", "-m", "tests.failing_calls", str(directory / "control")])
        if is_long:
            self.control.fail_slow_ones_too()
        self.failed: list[str] = []  # the calls that failed, in order

    def chain(self, image: int = 0) -> str:
        return f"aio:{self.images[image]}"

    def open(self, kind: str = "aio") -> None:
        for place, image in enumerate(self.images):
            image.write_bytes(bytes([65 + place]) * SIZE)
        chain = self.chain()
        if kind == "qcow2":
            chain = f"log:|qcow2:{self.images[0]}"
            subprocess.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", self.images[0], str(SIZE)], check=True, capture_output=True
            )
        elif kind == "cached":
            chain = f"aio:{self.images[0]},cache=on"
        self.driven.open(chain, policy=POLICY)

    def descriptors(self) -> list[str]:
        folder = Path(f"/proc/{self.driven.worker.process.pid}/fd")
        return sorted(str(each.readlink()) for each in folder.iterdir())

    def mapped(self) -> int:
        """Return the worker's address space in MiB."""
        text = Path(f"/proc/{self.driven.worker.process.pid}/status").read_text()
        return int(text.split("VmSize:")[1].split()[0]) >> 10

    def sweep(self, act: Callable[[int], object], mend: Callable[[], object] = lambda: None, step: int = 1) -> int:
        """Repeat an action, in which the n-th call fails, until no call has failed; return how many calls it makes.

        `act` gets n; `mend` restores the state that it began with.
        """
        for number in range(1, MANY, step):
            self.control.arm(number)
            act(number)
            failed = self.control.disarm()
            if not failed:
                return number - 1
            self.failed.append(failed)
            try:
                mend()
            except BaseException as error:
                error.add_note(f"after {failed} (call {number}) had failed")
                raise
        raise AssertionError(f"it makes more than {MANY} calls")


class Sender:
    """Sends one request at a time and checks that its answer is right, whichever call failed meanwhile."""

    def __init__(self, bed: Bed, frontend: Frontend) -> None:
        self.bed = bed
        self.frontend = frontend
        self.content = {0: frontend.read(0, 8)}

    def do(self, operation: int, number: int, count: int, sector: int) -> None:
        """Send a request of `count` sectors; check that a write's data are there, or the former data if it failed."""
        data = b"" if operation in (BLKIF_OP_READ, BLKIF_OP_DISCARD) else bytes([97 + number % 26]) * count * 512
        request = self.frontend.submit(operation, sector, count, data)
        self.finish(request)
        is_done = request.status == BLKIF_RSP_OKAY
        if operation == BLKIF_OP_READ and is_done:
            assert self.content[sector] == request.data[:PAGE]
        if data:
            self.bed.control.pause()  # the check itself must not fail
            found = self.frontend.read(sector, 8)
            assert found == data[:PAGE] or (not is_done and found == self.content[sector])
            self.content[sector] = found

    def finish(self, request: Submitted) -> None:
        """Wait for the answer; resume the disk if a flush has failed, as an administrator would."""
        worker = self.bed.driven.worker
        give_up = time.monotonic() + 10
        while request.status is None:
            with suppress(TimeoutError):
                self.frontend.wait([request], 0.05 if request.operation in FLUSHES else 2)
            if worker.stand().flush_failed:
                assert Code.OK == worker.ask(messages.Resume()).code
            assert time.monotonic() < give_up, f"no answer to {request.operation} after {self.bed.failed}"
        assert request.status in (BLKIF_RSP_OKAY, BLKIF_RSP_ERROR, BLKIF_RSP_EOPNOTSUPP)


@pytest.fixture
def bed(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bed]:
    """A worker that has opened an image; at the end it closes in order."""
    bed = Bed(tmp_path, is_long=request.config.getoption("--long"))
    with bed.driven:
        bed.open(getattr(request, "param", "aio"))
        yield bed
        if bed.driven.worker.process.poll() is None:
            bed.driven.worker.end()


@pytest.mark.parametrize("wishes", [Wishes(), Wishes(persistent=True, queues=2, ring_order=1)], ids=["copy", "map"])
@pytest.mark.rows("A26", "A27")
def test_connect_and_leave(bed: Bed, wishes: Wishes) -> None:
    """A connect whose n-th call fails leaves nothing behind and can be repeated; a leave releases everything."""
    driven = bed.driven
    driven.attach(wishes)
    driven.disconnect()
    driven.frontend.crash()
    before = bed.descriptors(), bed.mapped()

    def connect(_: int) -> None:
        driven.announce(wishes)
        driven.offer_rings()
        standing = driven.worker.expect_standing(Stage.SERVING)
        assert bool(standing.failure) == (standing.stage != Stage.SERVING)

    def leave_again() -> None:
        if driven.worker.stand().stage == Stage.SERVING:
            driven.disconnect()
        assert NOTHING == driven.xen.held()
        driven.frontend.crash()

    def leave(_: int) -> None:
        driven.worker.tell(messages.Leave)
        assert Stage.OPEN == driven.worker.expect_standing(Stage.OPEN).stage
        assert NOTHING == driven.xen.held()

    connected = bed.sweep(connect, leave_again)
    left = bed.sweep(leave, lambda: driven.attach(wishes))
    driven.attach(wishes).write(0, b"w" * PAGE)
    assert b"w" * PAGE == driven.frontend.read(0, 8)
    rings = len(driven.frontend.rings)
    driven.disconnect()

    assert connected >= 6
    assert left >= 2 * rings  # unmaps and unbinds
    assert before[0] == bed.descriptors()
    assert bed.mapped() - before[1] <= 40  # one arena, whose objects wait for the garbage collector


@pytest.mark.parametrize("bed", ["aio", "cached", "qcow2"], indirect=True)
@pytest.mark.parametrize("persistent", [False, True], ids=["copy", "map"])
@pytest.mark.rows("A27")
def test_requests(bed: Bed, persistent: bool, pytestconfig: pytest.Config) -> None:
    """A request whose n-th call fails is retried or ends with an error, and its answer is true."""
    driven = bed.driven
    if ("qcow2" in driven.worker.stand().chain) != persistent and not pytestconfig.getoption("--long"):
        pytest.skip("has its turn with --long")
    sender = Sender(bed, driven.attach(Wishes(persistent=persistent, indirect=64)))
    counts = {}
    for name, operation, count in (
        ("read", BLKIF_OP_READ, 8), ("write", BLKIF_OP_WRITE, 8), ("flush", BLKIF_OP_FLUSH_DISKCACHE, 0),
        ("barrier", BLKIF_OP_WRITE_BARRIER, 8), ("discard", BLKIF_OP_DISCARD, 8), ("indirect", BLKIF_OP_WRITE, 256),
    ):  # fmt: skip
        sector = 2048 if name == "discard" else 0
        counts[name] = bed.sweep(lambda number, o=operation, c=count, s=sector: sender.do(o, number, c, s))
    assert driven.worker.process.poll() is None
    bugs = [line.event for line in driven.worker.lines if line.level == "critical" and "flush" not in line.event]
    assert [] == [bug for bug in bugs if "a call that fails (xen." not in bug]
    assert all(counts[name] for name in ("write", "flush", "indirect")), counts
    driven.disconnect()
    assert NOTHING == driven.xen.held()


def test_exchange(bed: Bed, pytestconfig: pytest.Config) -> None:
    """An exchange whose n-th call fails is done or not done, and the guest reads from the chain that is reported."""
    driven = bed.driven
    frontend = driven.attach(Wishes())
    letter = {bed.chain(place): bytes([65 + place]) for place in (0, 1)}
    deaths = 0

    def exchange(_: int) -> None:
        nonlocal deaths, frontend
        before = driven.worker.stand().chain
        other = bed.chain(1) if before == bed.chain(0) else bed.chain(0)
        number = driven.worker.put(messages.Swap(other, replaces=True))
        try:
            reply = driven.worker.expect_reply(number)
            if reply.code == Code.FAILED and driven.worker.process.poll() is None:
                standing = driven.worker.stand()
                assert before == standing.chain
                if standing.flush_failed:
                    assert Code.OK == driven.worker.ask(messages.Resume()).code
            elif reply.code == Code.OK:
                assert other == driven.worker.stand().chain
        except AssertionError as ended:
            if "the worker ended" not in str(ended):
                raise
            bed.control.disarm()
            deaths += 1
            driven.worker.process.wait()
            driven.succeed(before, policy=POLICY)

    def look() -> None:
        chain = driven.worker.stand().chain
        assert letter[chain] * PAGE == frontend.read(0, 8)

    swapped = bed.sweep(exchange, look, step=1 if pytestconfig.getoption("--long") else 5)
    look()
    assert swapped >= 10
    driven.disconnect()
    assert NOTHING == driven.xen.held()


@pytest.mark.rows("A27")
@pytest.mark.parametrize("first", range(1, SHARES + 1))
def test_recovery(bed: Bed, first: int, pytestconfig: pytest.Config) -> None:
    """A successor whose n-th call fails goes on, or leaves everything to the next; the guest gets just one answer."""
    if not pytestconfig.getoption("--long"):
        pytest.skip("two processes for each n")
    driven = bed.driven
    frontend = driven.attach(Wishes(persistent=True))
    for number in range(first, MANY, SHARES):
        data = bytes([number % 26 + ord("a")]) * PAGE
        request = driven.begin_write(data)
        driven.kill()
        bed.control.arm(number)
        was_served = _succeed(driven, bed.chain())
        name = bed.control.disarm()
        if not was_served:
            assert name
            driven.kill()
            assert _succeed(driven, bed.chain()), f"after {name} had failed"
        frontend.wait([request])
        assert BLKIF_RSP_OKAY == request.status
        assert data == frontend.read(0, 8)
        if not name:
            break
        bed.failed.append(name)

    assert len(bed.failed) > 30 // SHARES
    driven.disconnect()
    assert NOTHING == driven.xen.held()


def _succeed(driven: Driven, chain: str) -> bool:
    """Start a successor on the same rings, and return whether it serves them."""
    driven.start_successor()
    try:
        opened = driven.worker.open(chain, policy=POLICY)
        if opened.failure:
            return False
        driven.worker.tell(messages.Serve, None)
        return not driven.worker.expect_standing(Stage.SERVING).failure
    except AssertionError as ended:
        if "the worker ended" not in str(ended):
            raise
        return False


def test_every_call_is_in_the_table() -> None:
    """Each call of the kernel in a worker's code can be made to fail, or is listed with a reason as an exception."""
    modules = ("os", "fcntl", "mmap", "select", "socket", "signal")
    unknown = set()
    for room in ("worker", "kernel", "loop", "block"):
        for file in (ROOT / "xenbackend" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                name = ast.unparse(node.func)
                if name.startswith("_libc.") and name not in EXEMPT:
                    name = name.removeprefix("_")
                elif name.partition(".")[0] not in modules or name.count(".") > 1:
                    continue
                if name not in CALLS and name not in EXEMPT:
                    unknown.add(name)

    assert set() == unknown
