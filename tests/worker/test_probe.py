"""A disk whose image another worker still writes: examined first, opened once that worker has released it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.descriptors import open_descriptors
from tests.driven import Driven, WorkerProcess
from tests.qcow_images import qcow2
from xenbackend.errors import DriverError
from xenbackend.kernel import blockdev
from xenbackend.loop.reactor import Reactor
from xenbackend.opener.local import LocalOpener
from xenbackend.protocol.messages import Stage
from xenbackend.rig.frontend import Wishes
from xenbackend.units import PAGE
from xenbackend.worker.disk import LOCK_TIMEOUT_S
from xenbackend.worker.probe import probe

pytestmark = pytest.mark.slow  # each starts processes


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small image, read from and written to through the page cache."""
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    return image


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """A loop that does not run."""
    made = Reactor()
    yield made
    made.close()


@pytest.fixture
def former(tmp_path: Path, image: Path) -> Iterator[WorkerProcess]:
    """A worker that has the image open."""
    former = WorkerProcess(f"xenbackend.rig.host:{tmp_path}")
    assert Stage.OPEN == former.open(f"aio:{image}").stage
    yield former
    former.drop()


def test_a_look_sets_back_nothing(image: Path, reactor: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another writer changes during a look stays changed, with its time."""
    examine = blockdev.examine

    def examine_while_it_changes(*arguments: Any, **named: Any) -> blockdev.Medium:
        os.utime(image, ns=(5, 7))
        return examine(*arguments, **named)

    monkeypatch.setattr(blockdev, "examine", examine_while_it_changes)
    opener = LocalOpener()
    probe(f"aio:{image}", reactor, opener, read_only=False)
    opener.close()
    assert 7 == image.stat().st_mtime_ns


def test_a_guest_that_migrates_gets_its_disk_from_its_former_self(
    tmp_path: Path, image: Path, former: WorkerProcess
) -> None:
    """The disk's properties are known at once. The ring is served once the former worker has released the image, and
    not before; the last write is read.
    """
    with Driven(tmp_path) as driven:
        opened = driven.open(f"log:|aio:{image}", may_wait=True)
        driven.announce(Wishes())
        driven.offer_rings()
        waiting = driven.worker.expect_standing()
        with pytest.raises(TimeoutError):
            driven.worker.hear(timeout_s=0.2)
        with image.open("r+b") as file:
            file.write(b"n" * PAGE)
        former.end()
        frontend = driven.joined()
        again = driven.worker.stand()

        assert Stage.CONNECTING == waiting.stage
        assert [each.size for each in opened.layers] == [each.size for each in again.layers] == [1 << 20] * 2
        assert not opened.layers[0].read_only
        assert b"n" * PAGE == frontend.read(0, 8)


def test_without_leave_to_wait_a_lock_is_an_answer(tmp_path: Path, image: Path, former: WorkerProcess) -> None:
    """Without `may_wait` an image that another guest uses is refused, with the reason."""
    user = f"the disk 5/xvda (process {former.process.pid})"
    with Driven(tmp_path) as driven:
        answer = driven.worker.open(f"aio:{image}")

    assert (errno.EBUSY, True) == (answer.errno, f"locked by {user}" in answer.failure)
    assert LOCK_TIMEOUT_S < 10  # libxl waits for 40 s in all


def test_looking_alters_nothing(tmp_path: Path, image: Path, reactor: Reactor) -> None:
    """Examining a chain keeps no file open and writes nothing, whatever opening it would do."""
    descriptors = open_descriptors()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    layers = probe(f"log:|aio:{image}", reactor, LocalOpener(), read_only=False)

    assert ["log:", f"aio:{image}"] == [each.text for each in layers]
    assert descriptors == open_descriptors()
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_what_could_not_be_written_to_is_refused(tmp_path: Path, reactor: Reactor) -> None:
    """A file that ends inside a sector can be a read-only disk, or a parent; a writer is refused when the chain is
    examined.
    """
    (tmp_path / "odd").write_bytes(bytes(1000))
    (tmp_path / "child").write_bytes(qcow2(1024, backing=b"odd"))
    with pytest.raises(DriverError, match="not a multiple of its 512 byte sectors; attach the disk read-only"):
        probe(f"log:|aio:{tmp_path}/odd", reactor, LocalOpener(), read_only=False)

    assert [1024] == [each.size for each in probe(f"aio:{tmp_path}/odd", reactor, LocalOpener(), read_only=True)]
    child = probe(
        f"qcow2:{tmp_path}/child,parents={tmp_path},parent_format=raw", reactor, LocalOpener(), read_only=False
    )
    assert ([1024] * 2, False) == ([each.size for each in child], child[0].read_only)
