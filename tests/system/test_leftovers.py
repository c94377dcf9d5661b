"""Nothing is left when a connection, a worker, or an attempt at either has ended, however it ended."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.driven import FRONT, Driven
from xenbackend.protocol.messages import Stage
from xenbackend.rig.frontend import Wishes

NOTHING = {"mappings": 0, "pins": 0, "ports": 0}
WISHES = Wishes(queues=3, ring_order=1, persistent=True)
pytestmark = pytest.mark.slow  # each starts a process


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[Driven]:
    """A worker with a frontend, and an image file."""
    with (tmp_path / "image").open("wb") as file:
        file.truncate(1 << 20)
    with Driven(tmp_path) as driven:
        yield driven


def descriptors(pid: int) -> list[str]:
    """Return what the descriptors of a process point to, without the numbers of anonymous files.

    Garbage of earlier tests is collected first: in our own process its descriptors would vanish between two looks.
    """
    gc.collect()
    names = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.append(str(fd.readlink()).partition(":[")[0])
        except FileNotFoundError:  # the descriptor by which they are listed
            continue
    return sorted(names)


def rig_mappings(driven: Driven) -> list[str]:
    """Return the worker's mappings of the guest's memory."""
    maps = Path(f"/proc/{driven.worker.process.pid}/maps").read_text()
    return [line for line in maps.splitlines() if "rig-memory" in line or "rig-grants" in line]


def use(driven: Driven) -> None:
    """Use the frontend a little in every way."""
    driven.frontend.write(0, b"u" * 4096 * 11)
    driven.frontend.read(0, 88)
    driven.frontend.flush()


def test_disconnect_and_close_leave_nothing(driven: Driven, tmp_path: Path) -> None:
    """After Disconnect nothing of the guest is mapped or open; after Close the process is gone, on our side too."""
    ours = descriptors(os.getpid())
    driven.connect(f"aio:{tmp_path}/image")
    driven.disconnect()
    before = descriptors(driven.worker.process.pid)
    for ring in driven.frontend.rings:
        ring.close()
    driven.attach(WISHES)
    use(driven)
    held = driven.xen.held()
    driven.disconnect()

    assert held["pins"] > 6
    assert NOTHING == driven.xen.held()
    assert before == descriptors(driven.worker.process.pid)
    assert [] == rig_mappings(driven)
    for ring in driven.frontend.rings:
        ring.close()
    driven.worker.end()
    assert ours == descriptors(os.getpid())
    assert not Path(f"/proc/{driven.worker.process.pid}").exists()


def test_killed_worker_leaves_nothing(driven: Driven, tmp_path: Path) -> None:
    """After SIGKILL at any moment no mapping, port or lock is left; a successor finds the image free."""
    driven.connect(f"aio:{tmp_path}/image", WISHES)
    use(driven)
    for _ in range(20):
        driven.frontend.submit(0, 0, 88)
    driven.worker.process.kill()
    driven.worker.process.wait()

    assert NOTHING == driven.xen.held()
    driven.start_successor()
    for ring in driven.frontend.rings:
        ring.port.close()
        for gref in ring.grefs:
            driven.guest.revoke(gref)
        ring.forget()
    driven.connect(f"aio:{tmp_path}/image")
    use(driven)


@pytest.mark.parametrize("persistent", [False, True])
def test_failed_connects_leave_nothing(driven: Driven, persistent: bool) -> None:
    """A connect that fails for any ring's page or port is undone completely, and the next one succeeds."""
    frontend = driven.connect("ram:1M", Wishes(queues=3, ring_order=1, persistent=persistent))
    driven.disconnect()
    before = descriptors(driven.worker.process.pid)
    values = driven.nodes.values
    for ring in range(3):
        for key in ("ring-ref0", "ring-ref1", "event-channel"):
            path = f"{FRONT}/queue-{ring}/{key}"
            good, values[path] = values[path], "9999"
            answer = driven.connect_rings()
            values[path] = good

            assert answer.failure
            assert errno.EINVAL == answer.errno
            assert NOTHING == driven.xen.held()
            assert before == descriptors(driven.worker.process.pid)
            assert [] == rig_mappings(driven)
    assert Stage.SERVING == driven.connect_rings().stage
    frontend.write(0, b"after" + bytes(507))


@pytest.mark.parametrize(
    "chain", ["aio:/nonexistent", "log:/nonexistent/record|aio:{image}", "delay:|ram:0", "fault:every=0|ram:1M"]
)
def test_failed_opens_leave_nothing(driven: Driven, tmp_path: Path, chain: str) -> None:
    """A chain that cannot be opened leaves no file open, and so no lock, and the worker ends in order."""
    image = tmp_path / "image"
    answer = driven.worker.open(chain.format(image=image))

    assert answer.failure
    assert str(image) not in descriptors(driven.worker.process.pid)
    driven.worker.end()
