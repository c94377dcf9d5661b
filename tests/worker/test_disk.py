"""A worker's disk: opened, exchanged for one that the guest can go on with, flushed, closed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers_block import EVENTS, TEST_DRIVERS, content, image, read, write
from tests.loops import loop, mounted
from tests.qcow_images import qcow2
from xenbackend.block.drivers import BUILT_IN
from xenbackend.block.request import PENDING, Request
from xenbackend.errors import ConfigError, DriverError, XenbackendError
from xenbackend.kernel import memfd, users
from xenbackend.loop.reactor import Reactor
from xenbackend.opener.local import LocalOpener
from xenbackend.protocol import messages
from xenbackend.units import PAGE
from xenbackend.worker.disk import Disk, is_locked, number_of

SIZE = 1 << 20


class AnyChain(LocalOpener):
    """An opener that opens everything in this process, for whichever chain; `made` gets the names of memories."""

    def __init__(self, parents: Callable[[], list[str]], made: list[str]) -> None:
        super().__init__(parents)
        self._made = made

    def make_memory(self, name: str, size: int) -> int:
        """Make one, and note its name."""
        self._made.append(name)
        return memfd.make("test", size)

    def for_chain(self, _chain: int) -> LocalOpener:
        """Return this opener."""
        return self


class Bench:
    """A disk without a ring, its loop, and what it would have told the supervisor.

    made, dropped: names of memories; bugs: what layers have raised; parents: the directories that openers allow for
    parents.
    """

    def __init__(self, chain: str, **wishes: Any) -> None:
        self.made: list[str] = []
        self.dropped: list[str] = []
        self.bugs: list[Exception] = []
        self.parents: list[str] = []
        self.reactor = Reactor()
        message = messages.Open(1, "vbd/5/51712", "", 5, chain, **{"read_only": False, **wishes})
        self.disk = Disk(message, {}, self.reactor, self.dropped.append, self.bugs.append)
        self.reactor.before_sleep(self.disk.files.kick)

    def do(self, request: Request) -> int:
        """Submit one request and return its status."""
        chain = self.disk.chain
        assert chain is not None
        chain.complete = lambda _batch: self.reactor.stop()
        chain.submit([request])
        while request.status == PENDING:
            self.reactor.run()
        return request.status

    def flush(self) -> int:
        """Flush, and return the errno that the one callback got."""
        codes: list[int] = []

        def flushed(code: int) -> None:
            codes.append(code)
            self.reactor.stop()

        self.disk.flush(flushed)
        if not codes:
            self.reactor.run()
        (code,) = codes
        return code

    def open(self) -> Any:
        """Open the chain."""
        return self._opening(self.disk.open)

    def probe(self) -> Any:
        """Examine the chain."""
        return self._opening(self.disk.probe)

    def check_successor(self, chain: str, **how: bool) -> Any:
        """Check a chain that could replace the one in service."""
        return self._opening(self.disk.check_successor, chain, **how)

    def exchange(self, chain: str) -> Any:
        """Put another chain into service."""
        return self._opening(self.disk.exchange, chain)

    def _opening(self, function: Any, *arguments: Any, **named: Any) -> Any:
        with self.disk.opening_by(AnyChain(lambda: self.parents, self.made)):
            return function(*arguments, **named)

    def close(self) -> None:
        """Close everything."""
        self.disk.close()
        self.reactor.close()


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a maker of benches, each with an open chain."""
    for name, place in TEST_DRIVERS.items():
        monkeypatch.setitem(BUILT_IN, name, place)
    made: list[Bench] = []

    def make(chain: str, **wishes: Any) -> Bench:
        bench = Bench(chain, **wishes)
        made.append(bench)
        bench.open()
        return bench

    yield make
    for bench in made:
        bench.close()


def test_another_chain_takes_over(benches: Any, tmp_path: Path) -> None:
    """After an exchange, requests go to the new chain, the former image is unlocked, and `text` is the new chain's."""
    one, two = image(tmp_path / "one"), image(tmp_path / "two")
    bench = benches(f"aio:{one}")
    bench.do(write(0, b"1" * PAGE))
    bench.check_successor(f"aio:{two}", replaces=True)
    bench.exchange(f"aio:{two}")
    bench.do(write(0, b"2" * PAGE))
    other = benches(f"aio:{one}")  # it is no longer locked

    assert f"aio:{two}" == bench.disk.text
    assert [b"1" * PAGE, b"2" * PAGE] == [path.read_bytes()[:PAGE] for path in (one, two)]
    assert other.disk.layers[0].text == f"aio:{one}"


def test_the_same_image_may_be_looked_at_and_taken_over(benches: Any, tmp_path: Path) -> None:
    """A filter can be put above the open image: to check the new chain needs no lock, and the exchange releases it
    first.
    """
    one = image(tmp_path / "one")
    bench = benches(f"aio:{one}")
    looked_at = bench.check_successor(f"log:|aio:{one}", replaces=False)
    bench.exchange(f"log:|aio:{one}")

    assert ["log:", f"aio:{one}"] == looked_at == [layer.text for layer in bench.disk.layers]


def test_a_block_device_is_looked_at_and_taken_over(benches: Any, tmp_path: Path) -> None:
    """A worker's own claim of a device is not in its way: to check a chain needs none, and the exchange releases it
    first.
    """
    with loop(tmp_path / "disk", SIZE, sector_size=512) as (device, _):
        bench = benches(f"aio:{device}")
        bench.check_successor(f"log:|aio:{device}", replaces=False)
        bench.exchange(f"log:|aio:{device}")
        with pytest.raises(OSError, match="busy"):
            os.open(device, os.O_RDWR | os.O_EXCL)
        assert 0 == bench.do(write(0, b"w" * PAGE))
        with pytest.raises(XenbackendError, match="cannot shrink"):
            bench.exchange("ram:512K")
        assert f"log:|aio:{device}" == bench.disk.text
        bench.exchange("ram:1M")
        os.close(os.open(device, os.O_RDWR | os.O_EXCL))


def test_a_chain_whose_files_others_have_is_refused_before(benches: Any, tmp_path: Path) -> None:
    """A chain with a locked image or a mounted device is refused by the check, so that the guest is not paused for a
    vain try.
    """
    one, two, base = (image(tmp_path / name) for name in ("one", "two", "base"))
    (tmp_path / "child").write_bytes(qcow2(SIZE, backing=b"base"))
    bench = benches(f"aio:{one}")
    bench.parents = [str(tmp_path)]
    child = f"qcow2:{tmp_path}/child,parent_format=raw"
    for chain in (f"aio:{two}", child):
        assert bench.check_successor(chain, replaces=True)
    for path in (two, base):
        benches(f"aio:{path}")
    for chain, path in ((f"aio:{two}", two), (f"log:|aio:{two}", two), (child, base)):
        with pytest.raises(ConfigError, match=f"{path} is locked by another process"):
            bench.check_successor(chain, replaces=True)
    with loop(tmp_path / "disk", 8 * SIZE, sector_size=512) as (device, _), mounted(device, tmp_path / "place"):
        with pytest.raises(ConfigError, match=f"{device} is in use by a file system mounted at {tmp_path}/place"):
            bench.check_successor(f"aio:{device}", replaces=True)
        assert bench.check_successor(f"aio:{device},share=on", replaces=True)
    assert 0 == bench.do(write(0, b"w" * PAGE))
    with pytest.raises(DriverError, match="is locked"):
        benches(f"aio:{one}", may_wait=True)


def test_nobody_gets_an_image_between_two_chains(benches: Any, tmp_path: Path) -> None:
    """The image stays locked while the former chain is closed and the next one is not open yet."""
    one = image(tmp_path / "one")
    bench = benches(f"aio:{one}")
    chain, tries = bench.disk.chain, []

    def close() -> None:
        type(chain).close(chain)
        with pytest.raises(DriverError, match="is locked") as caught:
            benches(f"aio:{one}", may_wait=True)
        tries.append(caught)

    chain.close = close
    bench.exchange(f"log:|aio:{one}")
    with pytest.raises(XenbackendError, match="cannot shrink"):
        bench.exchange("ram:512K")
    assert 1 == len(tries)
    assert f"log:|aio:{one}" == bench.disk.text
    (tmp_path / "child").write_bytes(qcow2(SIZE, backing=b"one"))
    bench.parents = [str(tmp_path)]
    bench.exchange(f"qcow2:{tmp_path}/child,parent_format=raw")
    benches(f"aio:{one}", read_only=True)


def test_who_waits_does_not_ask_who_has_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that may wait tries to lock or claim its image many times a second, and does not look for the process that
    has it.
    """
    monkeypatch.setattr(users, "users_of", lambda _fd: "nobody should be looked for")
    with loop(tmp_path / "disk", SIZE, sector_size=512) as (device, _):
        for path, why in ((image(tmp_path / "one"), "is locked by another process"), (device, "is in use by the host")):
            former = Bench(f"aio:{path}")
            former.open()
            waiting = Bench(f"aio:{path}", may_wait=True)
            with pytest.raises(DriverError, match=why) as caught:
                waiting.open()
            assert [f"aio:{path}"] == [each.text for each in waiting.probe()]
            former.close()
            waiting.open()
            waiting.close()
            assert is_locked(caught.value)


def test_another_image_is_refused_unless_it_replaces_ours(benches: Any, tmp_path: Path) -> None:
    """A new chain must be over the same file, under any name, or a child of it; another image needs `replaces`."""
    one, two = image(tmp_path / "one"), image(tmp_path / "two")
    (tmp_path / "again").hardlink_to(one)
    (tmp_path / "child").write_bytes(qcow2(SIZE, backing=b"one"))
    bench = benches(f"aio:{one}")
    for chain in (f"silent:|aio:{tmp_path}/again", f"qcow2:{tmp_path}/child,parents={tmp_path},parent_format=raw"):
        assert bench.check_successor(chain, replaces=False)
    for chain in (f"aio:{two}", "ram:1M", f"ram:{one}"):
        with pytest.raises(ConfigError, match="is over an image other than the one that the guest writes to"):
            bench.check_successor(chain, replaces=False)
        assert bench.check_successor(chain, replaces=True)


def test_where_images_may_lead_to_is_for_its_openers_to_say(benches: Any, tmp_path: Path) -> None:
    """A parent is opened only if the opener allows it, also for a check, and the layer's facts say why."""
    one = image(tmp_path / "one")
    (tmp_path / "child").write_bytes(qcow2(SIZE, backing=b"one", backing_format=b"raw"))
    child = f"qcow2:{tmp_path}/child"
    with pytest.raises(XenbackendError, match="one is named only by the image"):
        benches(child)
    bench = benches("ram:1M")
    with pytest.raises(ConfigError, match="one is named only by the image"):
        bench.check_successor(child, replaces=True)
    bench.parents = [str(tmp_path)]
    assert [child, f"aio:{one}"] == bench.check_successor(child, replaces=True)
    bench.exchange(child)
    assert f"the settings' parents, {tmp_path}" == bench.disk.layers[0].facts["parent_by"]


@pytest.mark.parametrize(
    ("successor", "why"),
    [
        ("ram:1048064", "cannot shrink while it is in use"),
        ("coarse:|ram:1M", "the guest uses 512"),
        ("aio:/nonexistent/image", "/nonexistent/image"),
        ("nothing:1M", "nothing"),
    ],
)
def test_what_the_guest_could_not_use_is_refused(benches: Any, successor: str, why: str) -> None:
    """A chain that is smaller, has other sectors, or cannot be opened is refused, by the check and by the exchange; the
    former chain serves on.
    """
    EVENTS.clear()
    bench = benches("silent:|ram:1M")
    bench.do(write(PAGE, b"w" * PAGE))
    chain = bench.disk.chain
    with pytest.raises(ConfigError, match=why):
        bench.check_successor(successor, replaces=True)
    untouched = bench.disk.chain is chain
    with pytest.raises(XenbackendError, match=why):
        bench.exchange(successor)
    request = read(PAGE, PAGE)

    assert untouched
    assert bench.disk.text == "silent:|ram:1M"
    assert 0 == bench.do(request)
    assert b"w" * PAGE == content(request)


def test_a_disk_may_grow(benches: Any) -> None:
    """A chain that is larger than the disk in service is accepted."""
    bench = benches("null:1M")
    bench.check_successor("null:2M", replaces=True)

    assert 2 * SIZE == bench.exchange("null:2M").geometry.size


def test_a_file_that_grew_by_part_of_a_sector(benches: Any, tmp_path: Path) -> None:
    """A file that has grown by part of a sector is refused before the disk in service is closed, as that could not be
    opened again.
    """
    one = image(tmp_path / "one")
    bench = benches(f"aio:{one}")
    os.truncate(one, SIZE + 1000)
    with pytest.raises(XenbackendError, match="1049576 bytes, which is not a multiple of its 512 byte sectors"):
        bench.check_successor(f"aio:{one}", replaces=False)

    assert 0 == bench.do(write(0, b"w" * PAGE))


def test_memories_of_layers_that_are_gone_are_dropped(benches: Any, tmp_path: Path) -> None:
    """The memory of a layer that the new chain lacks is dropped once that chain is in service; others stay."""
    one = image(tmp_path / "one")
    bench = benches(f"log:|aio:{one}")
    kept = bench.made[:]
    bench.exchange(f"aio:{one}")

    assert kept
    assert kept == bench.dropped
    bench.exchange("ram:1M")
    bench.exchange(f"aio:{one}")
    assert bench.made[len(kept) :] == bench.dropped[len(kept) :]


def test_memories_of_a_chain_that_was_refused_are_dropped(benches: Any) -> None:
    """The memories of a refused chain's layers are dropped, and never those of the former chain."""
    bench = benches("null:1M")
    with pytest.raises(DriverError):
        bench.exchange("ram:512K")

    assert 1 == len(bench.made)
    assert bench.made == bench.dropped


def test_no_chain_at_all_is_another_error(benches: Any, tmp_path: Path) -> None:
    """If neither the new nor the former chain can be opened, the error names both, and does not look like a refusal."""
    one = image(tmp_path / "one")
    bench = benches(f"aio:{one}")
    one.unlink()
    with pytest.raises(RuntimeError, match=r"/nonexistent/image.*former chain.*one"):
        bench.exchange("aio:/nonexistent/image")
    assert bench.disk.chain is None


@pytest.mark.parametrize(
    ("chain", "wishes", "code"),
    [
        ("ram:1M", {}, 0),
        ("fault:op=flush,errno=ENOSPC|ram:1M", {}, errno.ENOSPC),
        ("fault:op=flush,errno=EOPNOTSUPP|ram:1M", {}, 0),
        ("fault:op=flush|ram:1M", {"read_only": True}, 0),
        ("delay:flush=1ms|ram:1M", {}, 0),
    ],
)
def test_how_a_flush_went(benches: Any, chain: str, wishes: dict[str, Any], code: int) -> None:
    """The caller of a flush gets its errno once, which is 0 if there is nothing to flush or the disk is read-only."""
    assert code == benches(chain, **wishes).flush()


@pytest.mark.parametrize("at", ["submit", "complete"])
def test_a_bug_over_a_flush_does_not_keep_the_disk(benches: Any, at: str) -> None:
    """D8: a layer that raises an exception over the last flush is reported once, and the caller goes on."""
    bench = benches(f"clumsy:at={at}|ram:1M")

    assert 0 == bench.flush()
    assert [f"'{at}'"] == [str(bug) for bug in bench.bugs]


def test_close_closes_every_layer(benches: Any) -> None:
    """If closing a layer raises an exception, the layers below are still closed, and the caller gets it."""
    EVENTS.clear()
    bench = Bench("clumsy:at=close|ram:1M")
    bench.open()
    with pytest.raises(OSError, match="close"):
        bench.disk.close()
    bench.reactor.close()

    assert ["open clumsy", "close clumsy"] == EVENTS


def test_who_has_the_image_is_told_apart(benches: Any, tmp_path: Path) -> None:
    """An image locked by somebody else is an error of its own, on which the worker of a migrating guest waits."""
    one = image(tmp_path / "one")
    benches(f"aio:{one}")
    other = Bench(f"aio:{one}", may_wait=True)
    with pytest.raises(DriverError) as caught:
        other.open()
    looked_at = [layer.text for layer in other.probe()]
    other.close()

    assert is_locked(caught.value)
    assert not is_locked(DriverError("x", errno=errno.EIO))
    assert [f"aio:{one}"] == looked_at
    assert [] == other.disk.layers


def test_each_disk_has_a_number() -> None:
    """No two vbds have the same number; a name that is not a vbd's has none."""
    names = [(domid, f"vbd/{domid}/{devid}") for domid in (0, 5, 32767) for devid in (768, 51712, (1 << 28) + 256)]
    numbers = {number_of(*each) for each in names}

    assert len(names) == len(numbers)
    assert all(0 <= each < 1 << 62 for each in numbers)
    assert -1 == number_of(5, "vbd/5/xvda")
