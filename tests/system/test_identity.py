"""A disk keeps the file that it had when it was attached, whatever its name comes to mean below a running guest.

Every way in which a name can change its meaning, for every file of a chain, is tried with every way in which the chain
is opened again: the guest goes on with the same inode, or waits and an administrator reads why.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.loops import alone, loop
from tests.until import until
from xenbackend.blkif.abi import BLKIF_OP_READ
from xenbackend.cli.main import main
from xenbackend.embedded.machine import Machine
from xenbackend.errors import XenbackendError
from xenbackend.protocol.client import ServiceError
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.supervisor.xenstore.paths import VbdPath

pytestmark = pytest.mark.slow
SIZE = 1 << 20
OURS, THEIRS = b"A" * SIZE, b"N" * SIZE
DOMIDS = count(5)


class Disk:
    """A disk that a guest uses, and its files.

    home    directory of its files
    image   what the chain names
    """

    def __init__(self, machine: Machine, home: Path, path: VbdPath, frontend: Frontend, chain: str) -> None:
        self.machine = machine
        self.home = home
        self.path = path
        self.frontend = frontend
        self.chain = chain
        self.name = path.disk

    def status(self) -> dict[str, Any]:
        """Return what the service says of it."""
        [found] = [each for each in self.machine.ask({"verb": "status"})["data"] if each["vbd"] == self.name]
        return found

    def order(self, verb: str, **words: object) -> dict[str, Any]:
        """Give an order, and return its answer, even if it was refused."""
        try:
            return self.machine.ask({"verb": verb, "vbd": self.name, **words})
        except ServiceError as problem:
            return {"code": problem.answer.code.value, "sentence": problem.answer.sentence}

    def kill(self) -> None:
        """Kill its worker; a successor may follow."""
        worker = self.status()["worker"]
        os.kill(worker, signal.SIGKILL)
        until(lambda: self.status()["worker"] != worker)

    def is_served(self) -> bool:
        """Return whether a worker has its rings."""
        return bool(self.status()["phase"] == "serving")

    def goes_on(self, held: int) -> None:
        """Assert that the guest reads and writes the file behind a descriptor, and no other."""
        data = os.urandom(4096)
        assert OURS[:4096] == self.frontend.read(0, 8)
        self.frontend.write(64, data)
        self.frontend.flush()
        assert data == os.pread(held, 4096, 64 * 512)
        assert "" == self.status()["error"]

    def waits(self, reason: str, *words: str) -> None:
        """Assert that the disk has no worker, for this reason, and that its error has these words."""
        until(lambda: self.status()["phase"] == "none" and self.status()["error"], self.status)
        found = self.status()
        assert reason == found["reason"], found
        for each in words:
            assert each in found["error"]
        assert ("Connected", None) == (found["state"], found["worker"])


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """One machine for all tests, each of which has a guest of its own."""
    with Machine(log=tmp_path_factory.mktemp("log") / "log") as machine:
        yield machine


@contextmanager
def serving(machine: Machine, home: Path, chain: str) -> Iterator[Disk]:
    """Attach a chain to a new guest while the block lasts."""
    with closing(machine.create_guest(next(DOMIDS))) as guest:
        path = machine.attach(guest.domid, "xvda", chain)
        frontend = guest.connect(path, Wishes())
        disk = Disk(machine, home, path, frontend, chain)
        try:
            yield disk
        finally:
            frontend.crash()
            machine.store.remove(path.frontend)
            machine.store.remove(path.backend)
            until(lambda: disk.name not in [each["vbd"] for each in machine.ask({"verb": "status"})["data"]])


@contextmanager
def held(path: Path) -> Iterator[int]:
    """Open the file that a name means now while the block lasts."""
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


# What happens to a name.


def replace(name: Path) -> None:
    """Put another file in its place, as when a backup is restored."""
    new = name.with_name("new")
    new.write_bytes(THEIRS)
    new.rename(name)


def rename(name: Path) -> None:
    """Give the file another name."""
    name.rename(name.with_name("renamed"))


def delete(name: Path) -> None:
    """Remove the file's name."""
    name.unlink()


def link_anew(name: Path) -> None:
    """Make a symbolic link lead to another file."""
    other = name.with_name("other")
    other.write_bytes(THEIRS)
    name.unlink()
    name.symlink_to(other)


def shrink(name: Path) -> None:
    """Truncate the file itself."""
    os.truncate(name, SIZE // 2)


# What makes the chain open again. Each returns the answer of its order, or None if it gives no order.


def kill(disk: Disk) -> None:
    """Kill the worker."""
    disk.kill()


def upgrade(disk: Disk) -> dict[str, Any]:
    """Replace the worker by another process."""
    return disk.order("upgrade")


def put_a_filter_in(disk: Disk) -> dict[str, Any]:
    """Set another chain over the same files."""
    return disk.order("set", chain=f"delay:read=0ms|{disk.chain}")


def resize(disk: Disk) -> dict[str, Any]:
    """Open the same chain again, for a size that may have changed."""
    return disk.order("resize")


def replace_service(disk: Disk) -> None:
    """Let a new service adopt the worker, and then kill the worker."""
    before = disk.machine.service_pid
    disk.machine.replace_service()
    until(lambda: _service_of(disk.machine) not in (0, before))
    until(disk.is_served)
    disk.kill()


def stop_and_start(disk: Disk) -> None:
    """Stop the service, which keeps nothing for the next one, and start it."""
    disk.machine.stop_service()
    disk.machine.start_service()


def _service_of(machine: Machine) -> int:
    try:
        return machine.service_pid
    except XenbackendError:  # no service answers at the moment
        return 0


GOES_ON = ""
ANOTHER = "other-file"
SMALLER = "other-size"
AWAY = "interrupted"
UNWANTED = "add --replace"
REFUSED = "refused"
WANTED: dict[Callable[[Path], None], dict[Callable[[Disk], Any], str]] = {
    replace: {
        kill: GOES_ON, upgrade: GOES_ON, put_a_filter_in: UNWANTED, resize: GOES_ON, replace_service: GOES_ON,
        stop_and_start: ANOTHER,
    },
    rename: {
        kill: GOES_ON, upgrade: GOES_ON, put_a_filter_in: REFUSED, resize: GOES_ON, replace_service: GOES_ON,
        stop_and_start: AWAY,
    },
    delete: {
        kill: GOES_ON, upgrade: GOES_ON, put_a_filter_in: REFUSED, resize: GOES_ON, replace_service: GOES_ON,
        stop_and_start: AWAY,
    },
    link_anew: {
        kill: GOES_ON, upgrade: GOES_ON, put_a_filter_in: UNWANTED, resize: GOES_ON, replace_service: GOES_ON,
        stop_and_start: ANOTHER,
    },
    shrink: {
        kill: SMALLER, upgrade: SMALLER, put_a_filter_in: "cannot shrink", resize: "cannot shrink",
        replace_service: SMALLER, stop_and_start: SMALLER,
    },
}  # fmt: skip
CASES = [
    pytest.param(change, act, id=f"{change.__name__}-{act.__name__}") for change in WANTED for act in WANTED[change]
]


@pytest.mark.parametrize(("change", "act"), CASES)
def test_an_image(
    machine: Machine, tmp_path: Path, change: Callable[[Path], None], act: Callable[[Disk], dict[str, Any] | None]
) -> None:
    """Whatever becomes of an image's name, the guest goes on with the same inode if that was kept.

    If it was not kept, or has shrunk, the guest waits, no other file is written to, and the sentence says what to do.
    """
    image, wanted = tmp_path / "image", WANTED[change][act]
    image.write_bytes(OURS)
    with held(image) as fd, serving(machine, tmp_path, f"aio:{image}") as disk:
        change(image)
        answer = act(disk)
        if wanted in (ANOTHER, SMALLER):
            assert answer is None or "failed" == answer["code"]
            disk.waits(wanted, str(image), "`xenbackend resume`")
        elif wanted == AWAY:
            until(lambda: "there is no file" in disk.status()["error"], disk.status)
        elif wanted == GOES_ON:
            assert answer is None or "ok" == answer["code"], answer
            disk.goes_on(fd)
        else:
            assert answer is not None
            assert "ok" != answer["code"]
            assert wanted == REFUSED or wanted in answer["sentence"], answer
            if change is not shrink:
                disk.goes_on(fd)
    others = [path for path in tmp_path.iterdir() if path.name in ("new", "other") or change is replace]
    assert all(THEIRS == path.read_bytes() for path in others)


def test_an_administrator_takes_what_is_there(machine: Machine, tmp_path: Path) -> None:
    """If the name means another file after a stop, the disk waits; `resume` serves that file, as do later workers."""
    image = tmp_path / "image"
    image.write_bytes(OURS)
    with serving(machine, tmp_path, f"aio:{image}") as disk:
        replace(image)
        stop_and_start(disk)
        disk.waits(ANOTHER)
        assert "ok" == disk.order("resume")["code"]
        until(disk.is_served, disk.status)
        assert THEIRS[:4096] == disk.frontend.read(0, 8)
        delete(image)
        disk.kill()
        assert THEIRS[:4096] == disk.frontend.read(0, 8)


def test_an_administrator_names_another_chain(machine: Machine, tmp_path: Path) -> None:
    """A disk that waits as its name means another file is served from the chain given to `set --replace`.

    Without --replace the order is refused, with a hint. Requests that were in flight are answered from the new chain.
    """
    image, other = tmp_path / "image", tmp_path / "restored"
    image.write_bytes(OURS)
    other.write_bytes(THEIRS)
    with serving(machine, tmp_path, f"aio:{image}") as disk:
        replace(image)
        stop_and_start(disk)
        disk.waits(ANOTHER)
        read = disk.frontend.submit(BLKIF_OP_READ, 0, 8)
        refused = disk.order("set", chain=f"aio:{other}")
        answer = disk.order("set", chain=f"aio:{other}", replace=True)

        assert ("invalid", True) == (refused["code"], "add --replace, as another chain" in refused["sentence"])
        assert ("ok", f"aio:{other}") == (answer["code"], answer["data"]["chain"])
        disk.frontend.wait([read], 10.0)
        disk.frontend.write(64, b"G" * 4096)
        disk.frontend.flush()
        assert b"G" * 4096 == other.read_bytes()[64 * 512 :][:4096]
        assert f"aio:{other}" == machine.store.read(f"{disk.path.backend}/params")
        disk.kill()
        assert b"G" * 4096 == disk.frontend.read(64, 8)


def test_another_parent_has_to_be_trusted_first(machine: Machine, tmp_path: Path) -> None:
    """An image marked for its parent is not opened with another one, even by `set --replace`, until `image trust`
    allows it; the refusal names that command.
    """
    parent, other, leaf = (tmp_path / f"{each}.qcow2" for each in ("parent", "other", "leaf"))
    for raw, image, content in (("a", parent, OURS), ("b", other, THEIRS)):
        (tmp_path / raw).write_bytes(content)
        assert 0 == main(["image", "convert", f"aio:{tmp_path / raw}", f"qcow2:{image}"])
    assert 0 == main(["image", "snapshot", f"qcow2:{parent}", str(leaf)])
    with serving(machine, tmp_path, f"qcow2:{leaf}") as disk:
        other.rename(parent)
        refused = disk.order("set", chain=disk.chain, replace=True)
        before = disk.frontend.read(0, 8)
        assert 0 == main(["image", "trust", f"qcow2:{leaf}"])
        answer = disk.order("set", chain=disk.chain, replace=True)

        assert f"xenbackend image trust LAYER, or with parents={tmp_path} in its layer" in refused["sentence"]
        assert (OURS[:4096], "ok") == (before, answer["code"]), answer
        assert THEIRS[:4096] == disk.frontend.read(0, 8)


def test_the_former_file_may_be_put_back(machine: Machine, tmp_path: Path) -> None:
    """If the former file has its name again after a stop, `resume` continues with it."""
    image = tmp_path / "image"
    image.write_bytes(OURS)
    with held(image) as fd, serving(machine, tmp_path, f"aio:{image}") as disk:
        rename(image)
        image.write_bytes(THEIRS)
        stop_and_start(disk)
        disk.waits(ANOTHER)
        (tmp_path / "renamed").rename(image)
        disk.order("resume")
        until(disk.is_served, disk.status)
        disk.goes_on(fd)


def test_what_was_cut_short_is_served_once_it_is_whole(machine: Machine, tmp_path: Path) -> None:
    """A file that has shrunk below a guest is served again after `resume`, once it is as large as before."""
    image = tmp_path / "image"
    image.write_bytes(OURS)
    with held(image) as fd, serving(machine, tmp_path, f"aio:{image}") as disk:
        shrink(image)
        disk.kill()
        disk.waits(SMALLER, f"has {SIZE // 2} bytes", f"told {SIZE}")
        disk.order("resume")
        disk.waits(SMALLER)
        assert str(SIZE // 512) == machine.store.read(f"{disk.path.backend}/sectors")
        os.truncate(image, SIZE)
        disk.order("resume")
        until(disk.is_served, disk.status)
        disk.goes_on(fd)


@pytest.mark.parametrize("act", [kill, upgrade, resize, put_a_filter_in, stop_and_start], ids=lambda act: act.__name__)
@pytest.mark.parametrize(("image_format", "by"), [("qcow2", "a place"), ("vhd", "a place"), ("qcow2", "its mark")])
def test_a_parent(
    machine: Machine, tmp_path: Path, image_format: str, by: str, act: Callable[[Disk], dict[str, Any] | None]
) -> None:
    """If a parent is replaced, the disk keeps the one that it was opened with, or waits.

    With `parents=` any file in that place may be the parent, so an administrator can accept another one; if the image's
    mark names the parent, the other one must be trusted first.
    """
    parent, other, leaf = (tmp_path / f"{each}.{image_format}" for each in ("parent", "other", "leaf"))
    for raw, image, content in (("a", parent, OURS), ("b", other, THEIRS)):
        (tmp_path / raw).write_bytes(content)
        assert 0 == main(["image", "convert", f"aio:{tmp_path / raw}", f"{image_format}:{image}"])
    assert 0 == main(["image", "snapshot", f"{image_format}:{parent}", str(leaf)])
    place = f",parents={tmp_path}" if by == "a place" else ""
    with serving(machine, tmp_path, f"{image_format}:{leaf}{place}") as disk:
        assert OURS[:4096] == disk.frontend.read(0, 8)
        other.rename(parent)
        answer = act(disk)
        if act is stop_and_start and place:
            disk.waits(ANOTHER, str(parent))
            return
        if act is stop_and_start:
            until(lambda: "is not the one that the image was marked for" in disk.status()["error"], disk.status)
            assert not disk.is_served()
            return
        if act is put_a_filter_in:
            assert answer is not None
            assert (UNWANTED if place else "is not the one that the image was marked for") in answer["sentence"]
        assert [OURS[:4096]] * 3 == [disk.frontend.read(sector, 8) for sector in (0, 64, SIZE // 512 - 8)]
        disk.frontend.write(64, b"G" * 4096)
        assert b"G" * 4096 == disk.frontend.read(64, 8)


@pytest.mark.parametrize("act", [kill, upgrade], ids=lambda act: act.__name__)
def test_a_size_that_was_looked_up(machine: Machine, tmp_path: Path, act: Callable[[Disk], object]) -> None:
    """After `resize`, which opens the chain again, the next worker has the same files, whatever their names mean."""
    image, other = tmp_path / "image", tmp_path / "other"
    image.write_bytes(OURS)
    other.write_bytes(THEIRS)
    with serving(machine, tmp_path, f"aio:{image}") as disk:
        assert "ok" == disk.order("resize")["code"]
        other.rename(image)
        act(disk)
        assert OURS[:4096] == disk.frontend.read(0, 8)


@pytest.mark.parametrize("act", [kill, upgrade, stop_and_start], ids=lambda act: act.__name__)
def test_a_record(machine: Machine, tmp_path: Path, act: Callable[[Disk], dict[str, Any] | None]) -> None:
    """`log:` keeps recording into the file that it had opened, as an image is kept."""
    image, record = tmp_path / "image", tmp_path / "record"
    image.write_bytes(OURS)
    with serving(machine, tmp_path, f"log:{record},track=off|aio:{image}") as disk:
        disk.frontend.write(0, b"1" * 4096)
        with held(record) as fd:
            record.rename(tmp_path / "former")
            record.write_bytes(b"")
            act(disk)
            if act is stop_and_start:
                disk.waits(ANOTHER, str(record))
                return
            before = os.fstat(fd).st_size
            disk.frontend.write(8, b"2" * 4096)
            disk.frontend.flush()
            assert "ok" == disk.order("resize")["code"]  # this flushes the record to its file
            assert before < os.fstat(fd).st_size
            assert 0 == record.stat().st_size


@pytest.mark.parametrize("act", [kill, upgrade, resize], ids=lambda act: act.__name__)
def test_a_device_behind_a_link(machine: Machine, tmp_path: Path, act: Callable[[Disk], dict[str, Any] | None]) -> None:
    """If a link leads to another device, the guest still uses the device that was attached."""
    link = tmp_path / "by-id"
    with ExitStack() as devices:
        (one, file), (two, other) = (
            devices.enter_context(loop(tmp_path / name, SIZE, sector_size=512)) for name in ("one", "two")
        )
        for path, content in ((one, OURS), (two, THEIRS)):
            with open(path, "wb") as device:  # noqa: PTH123 - a device
                device.write(content)
        link.symlink_to(one)
        with serving(machine, tmp_path, f"aio:{link}") as disk:
            link.unlink()
            link.symlink_to(two)
            answer = act(disk)
            assert answer is None or "ok" == answer["code"], answer
            disk.frontend.write(64, b"G" * 4096)
            disk.frontend.flush()
            assert OURS[:4096] == disk.frontend.read(0, 8)
            fd = os.open(two, os.O_RDONLY)
            assert THEIRS[:4096] == os.pread(fd, 4096, 64 * 512)
            os.close(fd)
            assert file != other


@pytest.mark.parametrize("act", [kill, stop_and_start], ids=lambda act: act.__name__)
def test_a_device_with_another_medium(
    machine: Machine, tmp_path: Path, act: Callable[[Disk], dict[str, Any] | None]
) -> None:
    """A loop device that was given another file counts as another disk, although its number and node are the same.

    The guest waits, and nothing is written to the other file before `resume`.
    """
    other = tmp_path / "other"
    other.write_bytes(THEIRS)
    with (
        loop(tmp_path / "one", SIZE, sector_size=512) as (device, _),
        serving(machine, tmp_path, f"aio:{device}") as disk,
    ):
        worker, service = disk.status()["worker"], machine.service_pid
        os.kill(service, signal.SIGSTOP) if act is kill else machine.stop_service()
        try:
            if act is kill:
                os.kill(worker, signal.SIGKILL)
            with alone():
                until(lambda: subprocess.run(["losetup", "--detach", device], check=False).returncode == 0)
                until(lambda: subprocess.run(["losetup", device, other], check=False).returncode == 0)
        finally:
            os.kill(service, signal.SIGCONT) if act is kill else machine.start_service()
        disk.waits(ANOTHER, device, "has another disk or medium")
        assert THEIRS == other.read_bytes()
        disk.order("resume")
        until(disk.is_served, disk.status)
        assert THEIRS[:4096] == disk.frontend.read(0, 8)


def test_a_snapshot_is_over_the_file_in_service(machine: Machine, tmp_path: Path) -> None:
    """If the image's name means another file, a snapshot is refused: its new image would have that one as parent."""
    image, new = tmp_path / "image", tmp_path / "new.qcow2"
    image.write_bytes(OURS)
    with held(image) as fd, serving(machine, tmp_path, f"aio:{image}") as disk:
        replace(image)
        answer = disk.order("snapshot", file=str(new), format="qcow2")

        assert "ok" != answer["code"]
        assert f"{image} is not the file in service" in answer["sentence"], answer
        assert not new.exists()
        disk.goes_on(fd)


def test_another_file_takes_the_place_by_an_administrators_word(machine: Machine, tmp_path: Path) -> None:
    """`set --replace` serves the file that the name means now, even with the same chain, as do later workers."""
    image = tmp_path / "image"
    image.write_bytes(OURS)
    with serving(machine, tmp_path, f"aio:{image}") as disk:
        replace(image)
        answer = disk.order("set", chain=disk.chain, replace=True)
        assert "ok" == answer["code"], answer
        assert THEIRS[:4096] == disk.frontend.read(0, 8)
        noted = f"/local/domain/0/xenbackend-files/{disk.path}/1"
        until(lambda: f" inode={image.stat().st_ino} " in machine.store.read(noted))
        disk.frontend.write(0, OURS[:4096])
        delete(image)
        disk.kill()
        assert OURS[:4096] == disk.frontend.read(0, 8)


@pytest.mark.parametrize(("change", "now"), [(replace, "other"), (rename, "gone"), (link_anew, "other")])
def test_status_says_what_a_name_means_by_now(
    machine: Machine, tmp_path: Path, change: Callable[[Path], None], now: str
) -> None:
    """`status` says that a name now leads to another file, or to none, while the guest goes on."""
    image = tmp_path / "image"
    image.write_bytes(OURS)
    with held(image) as fd, serving(machine, tmp_path, f"aio:{image}") as disk:
        before = machine.ask({"verb": "status", "looks": True})["data"][0]["files"]
        change(image)
        after = machine.ask({"verb": "status", "looks": True})["data"][0]["files"]

        assert [{"file": str(image), "now": "same", "difference": ""}] == before
        assert [(str(image), now)] == [(each["file"], each["now"]) for each in after]
        disk.goes_on(fd)


@pytest.mark.parametrize("layer", ["cow", "checksum"])
def test_the_file_that_an_order_creates(machine: Machine, tmp_path: Path, layer: str) -> None:
    """A dry run and a refused order create no file. The one that an order creates is the disk's from then on: what
    stood for it meanwhile is not, and neither kill nor exchange needs its name any more.
    """
    image, file, short = tmp_path / "image", tmp_path / "file", tmp_path / "short"
    image.write_bytes(OURS)
    short.write_bytes(OURS[:4096])
    chain = f"{layer}:{file}|aio:{image}"
    with serving(machine, tmp_path, f"aio:{image}") as disk:
        looked = disk.order("set", chain=chain, replace=True, dry_run=True)
        refused = disk.order("set", chain=f"{layer}:{file}|aio:{short}", replace=True)
        assert ("ok", "cannot shrink" in refused["sentence"]) == (looked["code"], True)
        assert [image, short] == sorted(tmp_path.iterdir())
        assert "ok" == disk.order("set", chain=chain, replace=True)["code"]
        disk.frontend.write(0, b"w" * 4096)
        moved = file.rename(tmp_path / "moved")
        disk.kill()
        until(disk.is_served)
        assert [b"w" * 4096, OURS[:4096]] == [disk.frontend.read(0, 8), disk.frontend.read(8, 8)]
        gone = disk.order("set", chain=f"log:|{chain}", dry_run=True)
        assert f"{file} is not the file in service" in gone["sentence"]
        moved.rename(file)
        assert "ok" == disk.order("set", chain=f"log:|{chain}")["code"]
        assert b"w" * 4096 == disk.frontend.read(0, 8)
    assert [file, image, short] == sorted(tmp_path.iterdir())
