"""How an opener treats names whose files an earlier worker of the same disk had open."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.descriptors import open_descriptors
from tests.loops import give, loop
from xenbackend.block.driver import Found
from xenbackend.block.files import UNNAMED
from xenbackend.block.mapped.parents import EXTENT, PARENT
from xenbackend.errors import DriverError
from xenbackend.opener import marks, steps
from xenbackend.opener.access import Access
from xenbackend.opener.main import Attendant
from xenbackend.opener.parents import IN_SERVICE, MARK
from xenbackend.protocol.jobs import HeldFile, Job, KeptFile
from xenbackend.protocol.opening import Opened
from xenbackend.worker.opener import RemoteOpener


class Disk:
    """A disk with several files, kept as they are when it is made. `told` has the name and chain number of each file
    that the supervisor was told of; `refusal` is its answer.
    """

    def __init__(self, *names: str, chains: list[str], keeps: bool = False, **more: Any) -> None:
        self.told: list[tuple[str, int]] = []
        self.again: list[str] = []  # those of them that take the place of a kept descriptor
        self.refusal = ""
        held = {name: steps.hold(name) for name in names}
        kept = [KeptFile(name, steps.identify(fd)) for name, fd in held.items()]
        job = Job("vbd/5/51712", chains, read_only=False, keeps=keeps, kept=kept, **more)
        self.access = Access(job, held, self._tell)

    def _tell(self, found: Opened, fd: int) -> str:
        assert found.identity == steps.identify(fd)
        self.told.append((found.name, found.chain))
        self.again += [found.name] * found.is_again
        return self.refusal

    def content(self, name: str, chain: int = 0) -> bytes:
        """Return the first bytes of the file that is opened for a name."""
        fd, _ = self.access.open(name, chain, write=False, create=False, claims=False)
        try:
            return os.pread(fd, 8, 0)
        finally:
            os.close(fd)


class Asked(Thread):
    """An opener without a supervisor, for a disk with one kept file."""

    def __init__(self, kept: str, *chains: str) -> None:
        super().__init__()
        supervisor, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._worker, self._near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        supervisor.close()
        self._far = far
        fd = steps.hold(kept)
        job = Job("vbd/5/51712", [*chains], read_only=False, kept=[KeptFile(kept, steps.identify(fd))])
        self._attendant = Attendant(job, far, self._near, {kept: fd})
        self.opener = RemoteOpener(self._worker)
        self.start()

    def run(self) -> None:
        """Serve the worker."""
        self._attendant.serve()
        self._near.close()
        self._far.close()

    def close(self) -> None:
        """End the opener."""
        self.opener.close()
        self.join()


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    """A stack that closes what a test opens; then no descriptor may be left."""
    before = open_descriptors()
    with ExitStack() as undo:
        yield undo
    assert before == open_descriptors()


def make(path: Path, content: bytes) -> str:
    """Write a file, replacing a former one, and return its path."""
    new = path.with_name("new")
    new.write_bytes(content)
    new.rename(path)
    return str(path)


def test_the_chain_in_service_is_opened_through_what_is_kept(undo: ExitStack, tmp_path: Path) -> None:
    """Names of the chain in service are opened through the kept files, without being looked up or reported. Names of a
    second chain are looked up.
    """
    image = make(tmp_path / "image", b"former")
    disk = Disk(image, chains=[f"aio:{image}", f"log:|aio:{image}"])
    undo.callback(disk.access.close)
    make(tmp_path / "image", b"another")

    assert b"former" == disk.content(image)
    assert [] == disk.told
    assert b"another" == disk.content(image, 1)
    assert [(image, 1)] == disk.told
    (tmp_path / "image").unlink()
    assert b"former" == disk.content(image)


def test_a_file_that_is_the_same_is_opened_through_what_is_kept(undo: ExitStack, tmp_path: Path) -> None:
    """If a name of the second chain means a kept file, the supervisor is told that the chain has it too."""
    image = make(tmp_path / "image", b"former")
    disk = Disk(image, chains=[f"aio:{image}", f"aio:{image}"])
    undo.callback(disk.access.close)

    assert b"former" == disk.content(image, 1)
    assert [(image, 1)] == disk.told


def test_a_size_that_changes_is_that_of_the_file_in_service(undo: ExitStack, tmp_path: Path) -> None:
    """If the job keeps the chain's files (`resize`), names of the second chain are not looked up either; the supervisor
    is told that this chain has them, too.
    """
    image = make(tmp_path / "image", b"former")
    disk = Disk(image, chains=[f"aio:{image}", f"aio:{image}"], keeps=True)
    undo.callback(disk.access.close)
    make(tmp_path / "image", b"another")

    assert b"former" == disk.content(image, 1)
    assert [(image, 1)] == disk.told


def test_a_refused_file_is_not_opened(undo: ExitStack, tmp_path: Path) -> None:
    """If the supervisor refuses a file, it is not opened, and the error has the supervisor's reason."""
    image = make(tmp_path / "image", b"former")
    disk = Disk(image, chains=[f"aio:{image}", f"aio:{image}"])
    undo.callback(disk.access.close)
    disk.refusal = "it is another one"
    with pytest.raises(DriverError, match="it is another one") as caught:
        disk.content(image, 1)

    assert errno.ESTALE == caught.value.errno


def goes_stale(patch: pytest.MonkeyPatch, path: str, *, at: str) -> None:
    """Let every descriptor of the file that a name means now be unknown to its server, at the step of that name."""
    stale, step = Path(path).stat(), getattr(steps, at)

    def fail(fd: int, *arguments: Any, **more: Any) -> Any:
        if os.path.samestat(stale, os.fstat(fd)) and fd not in fresh:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return step(fd, *arguments, **more)

    fresh: set[int] = set()
    hold = steps.hold

    def hold_fresh(name: str) -> int:
        fd = hold(name)
        fresh.add(fd)
        return fd

    patch.setattr(steps, at, fail)
    patch.setattr(steps, "hold", hold_fresh)


@pytest.mark.parametrize("at", ["look", "reopen"])
@pytest.mark.parametrize("chain", [0, 1])
def test_a_kept_file_that_its_server_has_lost_is_looked_up_again(
    undo: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, chain: int
) -> None:
    """If the kept descriptor of one file is useless (ESTALE), its name is looked up again, and the supervisor is told
    that the same file, found there, takes its place; nothing becomes of the other files.
    """
    image, other = make(tmp_path / "image", b"former"), make(tmp_path / "other", b"other")
    disk = Disk(image, other, chains=[f"log:{other}|aio:{image}"] * 2)
    undo.callback(disk.access.close)
    goes_stale(monkeypatch, image, at=at)
    Path(other).unlink()

    assert b"former" == disk.content(image, chain)
    assert [image] == disk.again
    assert b"other" == disk.content(other)
    monkeypatch.undo()
    assert [b"former"] * 2 == [disk.content(image, number) for number in (0, 1)]
    assert [image] == disk.again


@pytest.mark.parametrize("becomes", ["another", "nothing", "a directory"])
def test_a_kept_file_that_is_lost_and_has_lost_its_name_is_not_replaced(
    undo: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    """If the name does not lead to the lost file either, the error names the file. If another file is there, the
    supervisor is asked, whose sentence says what to do.
    """
    image = make(tmp_path / "image", b"former")
    disk = Disk(image, chains=[f"aio:{image}"])
    undo.callback(disk.access.close)
    goes_stale(monkeypatch, image, at="look")
    (tmp_path / "image").rename(tmp_path / "renamed")
    disk.refusal = "it is another one"
    if becomes == "another":
        make(tmp_path / "image", b"another")
    elif becomes == "a directory":
        (tmp_path / "image").mkdir()
    for _ in range(2):
        with pytest.raises((OSError, DriverError)) as caught:
            disk.content(image)
        assert errno.ESTALE == caught.value.errno
        if isinstance(caught.value, OSError):
            assert image == caught.value.filename
        assert ("it is another one" in str(caught.value)) == (becomes == "another") == bool(disk.again)


def test_a_parent_that_lost_its_name_is_found(undo: ExitStack, tmp_path: Path) -> None:
    """A kept parent is found by the name that its child has for it, even if it no longer has that name."""
    image, parent, other = (make(tmp_path / name, name.encode()) for name in ("image", "parent", "other"))
    disk = Disk(image, parent, chains=[f"qcow2:{image}"], parents=[str(tmp_path)])
    undo.callback(disk.access.close)
    Path(parent).unlink()
    names = ["nowhere", "other", "parent"]

    assert Found(parent, IN_SERVICE) == disk.access.find(PARENT, image, names, 0)
    assert b"parent" == disk.content(parent)
    assert [] == disk.told
    assert Found(other, f"the settings' parents, {tmp_path}") == disk.access.find(PARENT, image, names[:2], 0)
    assert [(other, 0)] == disk.told


def test_a_parent_stays_when_a_size_changes(undo: ExitStack, tmp_path: Path) -> None:
    """If the job keeps the chain's files (`resize`), a kept parent stays the second chain's parent, too, whatever has
    its name now and is allowed; the supervisor is told that this chain has it.
    """
    image, parent = (make(tmp_path / name, name.encode()) for name in ("image", "parent"))
    chain = f"qcow2:{image}"
    disk = Disk(image, parent, chains=[chain, chain], keeps=True, parents=[str(tmp_path)])
    undo.callback(disk.access.close)
    make(tmp_path / "parent", b"another")

    assert Found(parent, IN_SERVICE) == disk.access.find(PARENT, image, ["parent"], 1)
    assert b"parent" == disk.content(parent, 1)
    assert {(image, 1), (parent, 1)} == set(disk.told)


def test_a_parent_that_is_kept_needs_no_further_act(undo: ExitStack, tmp_path: Path) -> None:
    """A kept parent is allowed, by any name, even if nothing else allows it, since the disk is served from it; no mark
    is made.
    """
    image, parent, other = (make(tmp_path / name, name.encode()) for name in ("image", "parent", "other"))
    (tmp_path / "again").hardlink_to(parent)
    disk = Disk(image, parent, chains=[f"qcow2:{image}", f"log:|qcow2:{image}"])
    undo.callback(disk.access.close)

    assert Found(parent, IN_SERVICE) == disk.access.find(PARENT, image, ["parent"], 0)
    assert Found(str(tmp_path / "again"), IN_SERVICE) == disk.access.find(PARENT, image, ["again"], 1)
    with pytest.raises(DriverError, match="named only by the image"):
        disk.access.find(PARENT, image, ["other"], 0)
    make(tmp_path / "parent", b"another")
    with pytest.raises(DriverError, match="named only by the image"):
        disk.access.find(PARENT, image, ["parent"], 1)
    assert Found(parent, IN_SERVICE) == disk.access.find(PARENT, image, ["parent"], 0)
    assert b"parent" == disk.content(parent)
    assert [] == os.listxattr(image)
    assert other not in [name for name, _ in disk.told]


def test_what_allows_a_parent_that_is_kept_is_said(undo: ExitStack, tmp_path: Path) -> None:
    """If something else also allows a kept parent, the facts name that, as long as the name leads to it."""
    image, parent = (make(tmp_path / name, name.encode()) for name in ("image", "parent"))
    disk = Disk(image, parent, chains=[f"qcow2:{image},parents={tmp_path}"])
    undo.callback(disk.access.close)
    assert Found(parent, f"parents={tmp_path}") == disk.access.find(PARENT, image, ["parent"], 0)
    make(tmp_path / "parent", b"another")

    assert Found(parent, IN_SERVICE) == disk.access.find(PARENT, image, ["parent"], 0)
    assert b"parent" == disk.content(parent)


def test_a_name_that_the_chain_has_is_no_parent_by_that(undo: ExitStack, tmp_path: Path) -> None:
    """That a file of another layer is kept does not allow an image to have it as its parent."""
    image, record = make(tmp_path / "image", b"image"), make(tmp_path / "record", b"")
    disk = Disk(image, record, chains=[f"log:{record}|qcow2:{image}"])
    undo.callback(disk.access.close)
    Path(record).unlink()
    with pytest.raises(DriverError, match="is not there"):
        disk.access.find(PARENT, image, ["record"], 0)


def test_a_found_file_stays_what_it_is(undo: ExitStack, tmp_path: Path) -> None:
    """Within a job, a name that an image was followed to keeps its file for that image; for another image it is checked
    again.
    """
    image, data, parent = (make(tmp_path / name, name.encode()) for name in ("image", "data", "parent"))
    disk = Disk(image, data, chains=[f"qcow2:{image},data_file={data}"], parents=[parent])
    undo.callback(disk.access.close)
    assert parent == disk.access.find(PARENT, image, ["parent"], 0).path
    make(tmp_path / "parent", b"another")
    assert parent == disk.access.find(PARENT, image, ["parent"], 0).path
    with pytest.raises(DriverError, match="has been replaced by another file meanwhile"):
        disk.access.find(PARENT, data, ["parent"], 0)

    assert b"parent" == disk.content(parent)


@pytest.mark.parametrize("is_on_btrfs", [False, True])
def test_what_the_last_release_had_is_marked(undo: ExitStack, tmp_path: Path, *, is_on_btrfs: bool) -> None:
    """A file that a disk of the last release has open is allowed, and marked, so that it stays allowed later."""
    image, mid, base = (make(tmp_path / name, name.encode()) for name in ("image", "mid", "base"))
    status = Path(base).stat()
    known = HeldFile(base, status.st_dev + is_on_btrfs, status.st_ino)
    disk = Disk(image, chains=[f"qcow2:{image}", f"vmdk:{mid}"], in_service=[known])
    undo.callback(disk.access.close)
    with pytest.raises(DriverError, match="named only by the image"):
        disk.access.find(PARENT, image, ["mid"], 0)

    assert Found(base, IN_SERVICE) == disk.access.find(PARENT, image, ["base"], 0)
    assert Found(base, IN_SERVICE) == disk.access.find(EXTENT, mid, ["base"], 1)
    assert Found(base, MARK) == disk.access.find(PARENT, image, ["base"], 0)
    assert [marks.PARENT, marks.FILES] == os.listxattr(image) + os.listxattr(mid)


def test_a_number_alone_is_not_a_file_of_the_last_release(undo: ExitStack, tmp_path: Path) -> None:
    """An inode's number counts only on its own file system, or with its own path: other file systems have it too."""
    image, base = (make(tmp_path / name, name.encode()) for name in ("image", "base"))
    status = Path(base).stat()
    others = [HeldFile("/x", status.st_dev + 1, status.st_ino), HeldFile(base, status.st_dev, status.st_ino + 1)]
    disk = Disk(image, chains=[f"qcow2:{image}"], in_service=others)
    undo.callback(disk.access.close)
    with pytest.raises(DriverError, match="named only by the image"):
        disk.access.find(PARENT, image, ["base"], 0)


def test_a_new_image_is_marked_with_the_files_in_service(undo: ExitStack, tmp_path: Path) -> None:
    """The marks of a new image and its parent name the files that the disk is served from, whatever the worker says."""
    image, data, new = (make(tmp_path / name, name.encode()) for name in ("image", "data", "child"))
    disk = Disk(image, data, chains=[f"log:|qcow2:{image},data_file={data}"])
    undo.callback(disk.access.close)
    child = os.open(new, os.O_RDWR)
    undo.callback(os.close, child)
    assert disk.access.mark_child(child)

    parent, file = steps.hold(image), steps.hold(data)
    undo.callback(os.close, parent)
    undo.callback(os.close, file)
    assert [True] == [each.is_of(parent) for each in marks.read(child).parents]
    assert [True] == [each.is_of(file) for each in marks.read(parent).files]
    memory = Disk(chains=["null:1G"])
    assert not memory.access.mark_child(child)


@pytest.mark.parametrize("by", ["another", "nothing", "link"])
def test_a_name_that_a_new_image_is_to_have_must_lead_to_the_file_in_service(
    undo: ExitStack, tmp_path: Path, by: str
) -> None:
    """A new image is refused if the name that it would record for its parent leads elsewhere; the error says what to
    do.
    """
    image = make(tmp_path / "image", b"former")
    record = make(tmp_path / "record", b"")
    disk = Disk(image, record, chains=[f"log:{record}|aio:{image}"])
    undo.callback(disk.access.close)
    make(tmp_path / "record", b"another")
    disk.access.check_names()  # the name of a record does not matter
    if by == "another":
        make(tmp_path / "image", b"another")
    else:
        (tmp_path / "image").rename(tmp_path / "former")
    if by == "link":
        (tmp_path / "image").symlink_to("former")
        disk.access.check_names()
        return

    words = "is not the file in service" if by == "another" else "no longer leads to the file in service"
    with pytest.raises(DriverError, match=f"{words}.*give the file in service its name back first"):
        disk.access.check_names()


def test_a_worker_whose_service_has_gone_may_open_what_is_kept(undo: ExitStack, tmp_path: Path) -> None:
    """Without a service only kept files are opened, as nobody would keep another one; a failed exchange goes back to
    them.
    """
    image, other = make(tmp_path / "image", b"former"), make(tmp_path / "other", b"another")
    asked = Asked(image, f"aio:{image}", f"aio:{other}")
    undo.callback(asked.close)
    with pytest.raises(DriverError, match="the service has ended meanwhile"):
        asked.opener.for_chain(1).open(other, write=False)
    fd, facts = asked.opener.open(image, write=True, claims=True)

    assert (b"former", 6) == (os.pread(fd, 8, 0), facts.size)
    os.close(fd)


def test_a_device_with_another_medium_is_refused(undo: ExitStack, tmp_path: Path) -> None:
    """A device is compared with the kept one when it is opened, since its node may lead to another medium by then."""
    other = tmp_path / "other"
    other.write_bytes(bytes(1 << 20))
    with loop(tmp_path / "one", 1 << 20, sector_size=512) as (device, _):
        disk = Disk(device, chains=[f"aio:{device}"])
        undo.callback(disk.access.close)
        assert bytes(8) == disk.content(device)
        give(device, other)
        disk.refusal = "it is another one"
        with pytest.raises(DriverError, match="it is another one") as caught:
            disk.content(device)

    assert (errno.ESTALE, [(device, 0)]) == (caught.value.errno, disk.told)


def test_a_parent_on_a_device_is_compared_when_it_is_open(undo: ExitStack, tmp_path: Path) -> None:
    """An image that names a device by another name than its layer is followed to the kept device, which is compared
    when it is opened.
    """
    other, image = tmp_path / "other", make(tmp_path / "image", b"image")
    other.write_bytes(bytes(1 << 20))
    with loop(tmp_path / "one", 1 << 20, sector_size=512) as (device, _):
        place = tmp_path / "place"
        place.symlink_to(device)
        disk = Disk(str(place), image, chains=[f"qcow2:{image},parents={place}"])
        undo.callback(disk.access.close)
        found = Found(str(place), f"parents={place}")
        assert found == disk.access.find(PARENT, image, [device], 0)
        give(device, other)
        disk.refusal = "it is another one"
        assert found == disk.access.find(PARENT, image, [device], 0)
        with pytest.raises(DriverError, match="it is another one"):
            disk.content(str(place))


def test_an_unnamed_file_is_the_kept_one(tmp_path: Path) -> None:
    """D2: a chain that is opened again gets its unnamed file with what was written, unless the job replaces it."""
    chain = f"cow:|aio:{tmp_path}/base"
    held = steps.hold_unnamed(str(tmp_path))
    opened = steps.reopen(held, UNNAMED, write=True)
    os.write(opened, b"written!")
    os.close(opened)
    for renews, wanted in [(False, [b"written!", b"written!"]), (True, [b"written!", b""])]:
        kept = [KeptFile(UNNAMED, steps.identify(held))]
        job = Job(
            "vbd/5/51712", [chain, chain], read_only=False, kept=kept, scratch=str(tmp_path), renews_unnamed=renews
        )
        disk = Disk(chains=[])
        disk.access = Access(job, {UNNAMED: os.dup(held)}, disk._tell)

        assert wanted == [disk.content(UNNAMED, number) for number in (0, 1)]
        assert str(tmp_path) == disk.access.look(UNNAMED, 0).real
        disk.access.close()
    os.close(held)


def test_an_unnamed_file_gets_the_name_that_the_job_has(tmp_path: Path) -> None:
    """The name that the job gives to an unnamed file leads to it, for the second chain only; any other name is an
    ordinary record.
    """
    chains = [f"cow:|aio:{tmp_path}/base", f"cow:{tmp_path}/kept|aio:{tmp_path}/base"]
    held = steps.hold_unnamed(str(tmp_path))
    inode = os.fstat(held).st_ino
    kept = [KeptFile(UNNAMED, steps.identify(held))]
    for name, is_named in [("other", False), ("kept", True)]:
        disk = Disk(chains=[])
        job = Job("vbd/5/51712", chains, read_only=False, kept=kept, names_unnamed=f"{tmp_path}/{name}")
        disk.access = Access(job, {UNNAMED: os.dup(held)}, disk._tell)
        os.close(disk.access.open(f"{tmp_path}/kept", 1, write=True, create=True, claims=False)[0])
        disk.access.close()

        assert is_named == ((tmp_path / "kept").stat().st_ino == inode)
        (tmp_path / "kept").unlink()
    os.close(held)
