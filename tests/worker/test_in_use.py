"""Images and devices that others use are refused, whoever they are, and ours are refused to them."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from tests import loops, qemu
from tests.driven import WorkerProcess
from tests.openers import EachRemote, Openers
from xenbackend.errors import DriverError
from xenbackend.kernel import blkback, locks
from xenbackend.loop.reactor import Reactor
from xenbackend.opener.local import LocalOpener
from xenbackend.protocol.messages import Stage
from xenbackend.worker.files import HostFiles
from xenbackend.worker.image import Image

SIZE = 16 << 20


@pytest.fixture(params=["itself", "an opener"])
def files(request: pytest.FixtureRequest) -> Iterator[HostFiles]:
    """Return files that open images themselves, as an image command does, or through an opener, as a worker does."""
    reactor, openers = Reactor(), Openers()
    remote = EachRemote(openers)
    files = HostFiles(reactor, remote if request.param == "an opener" else None)
    yield files
    files.close()
    remote.close()
    openers.close()
    reactor.close()


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    """Return a file for a loop device."""
    path = tmp_path / "backing"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def device(backing: Path) -> Iterator[str]:
    """Return a loop device."""
    with loops.over(backing) as device:
        yield device


@contextmanager
def opened(files: HostFiles, path: str | Path, *, read_only: bool = False, shareable: bool = False) -> Iterator[Image]:
    """Keep an image open."""
    image = files.open(str(path), read_only=read_only, shareable=shareable)
    try:
        yield image
    finally:
        image.close()


def refusal(files: HostFiles, path: str | Path, *, read_only: bool = False, shareable: bool = False) -> str:
    """Return why an image is refused as in use, or an empty text."""
    try:
        files.open(str(path), read_only=read_only, shareable=shareable).close()
    except DriverError as error:
        if error.errno != errno.EBUSY:
            raise
        return str(error)
    return ""


def fails(*command: str | Path) -> str:
    """Run a command that must fail, and return its error output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0, command
    return done.stderr


def test_a_mounted_device(files: HostFiles, device: str, tmp_path: Path) -> None:
    """A mounted device is opened neither for writing nor for reading, unless shared. The error says where it is mounted
    and what to do.
    """
    place = tmp_path / "a place"
    with loops.mounted(device, place):
        for read_only in (False, True):
            said = refusal(files, device, read_only=read_only)
            assert (
                f"{device} is in use by a file system mounted at {place}; free it there first, or add share=on" in said
            )
            assert "" == refusal(files, device, read_only=read_only, shareable=True)
    assert "" == refusal(files, device)


def test_a_device_that_is_served_cannot_be_mounted(files: HostFiles, device: str, tmp_path: Path) -> None:
    """The kernel refuses to mount a device, or to swap to it, while we write to it, and only then."""
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    (tmp_path / "place").mkdir()
    with opened(files, device):
        assert "already mounted or mount point busy" in fails("mount", device, tmp_path / "place")
    with loops.remounted(device, tmp_path / "place"):
        pass
    subprocess.run(["mkswap", "-q", "-f", device], check=True, stdout=-3, stderr=-3)
    with opened(files, device):
        assert "Device or resource busy" in fails("swapon", device)


def test_swap(files: HostFiles, device: str) -> None:
    """A device that the host swaps to is refused, and the error says so."""
    subprocess.run(["mkswap", "-q", device], check=True, stdout=-3, stderr=-3)
    if subprocess.run(["swapon", device], check=False, stderr=-3).returncode:
        pytest.skip("no swap here")
    try:
        assert f"{device} is in use by swap" in refusal(files, device)
        assert f"{device} is in use by swap" in refusal(files, device, read_only=True)
    finally:
        subprocess.run(["swapoff", device], check=True)


def test_device_mapper(files: HostFiles, device: str) -> None:
    """A device below a mapping (LVM, multipath, LUKS) is refused, and the error names the mapping."""
    if not shutil.which("dmsetup") or subprocess.run(["dmsetup", "ls"], check=False, stdout=-3, stderr=-3).returncode:
        pytest.skip("no device mapper in this kernel")
    name = f"xb-{os.getpid()}"
    subprocess.run(["dmsetup", "create", name, "--table", f"0 {SIZE // 512} linear {device} 0"], check=True)
    try:
        assert f"/dev/mapper/{name}" in refusal(files, device)
        assert f"/dev/mapper/{name}" in refusal(files, device, read_only=True)
    finally:
        subprocess.run(["dmsetup", "remove", name], check=True)


@pytest.mark.slow
def test_partitions(files: HostFiles, device: str, tmp_path: Path) -> None:
    """A disk is in use while one of its partitions is, and a partition while its disk is."""
    with loops.partition(device) as part:
        with loops.mounted(part, tmp_path / "place"):
            where = f"{part}, a file system mounted at {tmp_path / 'place'}"
            assert f"{device} is in use by {where}" in refusal(files, device)
            assert f"{device} is in use by {where}" in refusal(files, device, read_only=True)
        with opened(files, device):
            assert f"{part} is in use by" in refusal(files, part)
            assert f"{part} is in use by" in refusal(files, part, read_only=True)
        with opened(files, part):
            assert f"{device} is in use by" in refusal(files, device)


@pytest.mark.slow
def test_readers_of_partitions(files: HostFiles, device: str) -> None:
    """A reader claims nothing, and is seen by its locks: whoever reads a partition is in the way of those who write to
    its disk, and the reverse; other readers, and users of another partition, are not disturbed.
    """
    with loops.partition(device) as part, loops.partition(device, 2) as other:
        for one, two in ((part, device), (device, part)):
            with opened(files, one, read_only=True):
                assert f"as {one}, which has some of the same data" in refusal(files, two)
                assert "" == refusal(files, two, read_only=True)
            with opened(files, one):
                assert refusal(files, two, read_only=True)
            assert "" == refusal(files, two)
        for read_only in (False, True):
            with opened(files, part, read_only=read_only):
                assert "" == refusal(files, other)
                assert "" == refusal(files, other, read_only=True)


@pytest.mark.slow
def test_a_partition_of_a_loop_device(files: HostFiles, backing: Path, device: str, tmp_path: Path) -> None:
    """A file is in use while a partition of a loop device over it is, and such a partition while the file is; what the
    host does with another partition does no harm.
    """
    with loops.partition(device) as part, loops.partition(device, 2) as other:
        with opened(files, backing):
            assert f"as {backing}, which has some of the same data" in refusal(files, part)
            assert refusal(files, part, read_only=True)
        with opened(files, part):
            assert refusal(files, backing)
            assert refusal(files, backing, read_only=True)
        with opened(files, part, read_only=True):
            assert f"as {part}, which has some of the same data" in refusal(files, backing)
            assert "" == refusal(files, backing, read_only=True)
        with loops.mounted(other, tmp_path / "place"):
            assert "" == refusal(files, part)
            assert "" == refusal(files, part, read_only=True)
            assert f"mounted at {tmp_path / 'place'}" in refusal(files, backing)


def test_a_file_that_is_mounted_under_another_name(files: HostFiles, backing: Path, tmp_path: Path) -> None:
    """A file below a loop device that is in use is recognised by each of its names."""
    with loops.bound(backing, tmp_path / "another name") as other:
        for below, asked in ((backing, other), (other, backing)):
            with loops.over(below) as device, opened(files, device):
                assert f"as {device}, which is the same image" in refusal(files, asked)


@pytest.mark.slow
def test_another_node_of_a_device(files: HostFiles, device: str, tmp_path: Path) -> None:
    """A device is refused through another node too: locks belong to the node, but the claim to the device. Readers may
    share it.
    """
    node = tmp_path / "node"
    os.mknod(node, 0o600 | stat.S_IFBLK, Path(device).stat().st_rdev)
    with opened(files, device):
        assert refusal(files, node)
        assert refusal(files, node, read_only=True)
    with opened(files, node):
        assert refusal(files, device)
    with opened(files, node, read_only=True):
        assert "" == refusal(files, device, read_only=True)


def test_readers_of_a_device_do_not_disturb_one_another(files: HostFiles, device: str) -> None:
    """Readers that open a device at the same moment all succeed: a check claims the device for a moment, and whoever
    meets it tries again.
    """
    faults: list[str] = []
    barrier = threading.Barrier(8)

    def read(own: HostFiles) -> None:
        barrier.wait()
        faults.extend(filter(None, (refusal(own, device, read_only=True) for _ in range(25))))

    opener = None if isinstance(files.opener, LocalOpener) else files.opener  # one that opens here is for one thread
    reactor = Reactor()
    readers = [HostFiles(reactor, opener, use_queues=False) for _ in range(8)]
    threads = [threading.Thread(target=read, args=(each,)) for each in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in readers:
        each.close()
    reactor.close()
    assert [] == faults


def test_qemu_and_we_on_a_device(files: HostFiles, device: str) -> None:
    """We and QEMU see each other's use of a device as of a file: QEMU does not claim it, but locks its node."""
    with opened(files, device):
        assert "lock" in qemu.refusal("qemu-io", "-f", "raw", "-c", "write 0 512", device)
    with opened(files, device, read_only=True):
        assert "lock" in qemu.refusal("qemu-io", "-f", "raw", "-c", "write 0 512", device)
    with qemu.held_open("raw", Path(device)) as pid:
        said = refusal(files, device)  # others may be examining all loop devices now
        assert f"{device} is locked by" in said
        assert f"qemu-io -f raw {device} (process {pid})" in said
        assert f"(process {pid})" in refusal(files, device, read_only=True)


@pytest.mark.slow
def test_a_file_below_a_loop_device(files: HostFiles, backing: Path, device: str, tmp_path: Path) -> None:
    """A file is in use while a loop device over it is mounted or served; an unused loop device does no harm."""
    assert "" == refusal(files, backing)
    with loops.mounted(device, tmp_path / "place"):
        for read_only in (False, True):
            said = refusal(files, backing, read_only=read_only)
            assert f"{backing} is in use by a file system mounted at {tmp_path / 'place'} as {device}" in said
    with opened(files, device):
        assert f"as {device}, which is the same image" in refusal(files, backing)
        assert refusal(files, backing, read_only=True)
    with opened(files, device, read_only=True):
        assert refusal(files, backing)
        assert "" == refusal(files, backing, read_only=True)
    with qemu.held_open("raw", Path(device)) as pid:
        said = refusal(files, backing)  # others may be examining all loop devices now
        assert f"(process {pid})" in said
        assert f" as {device}, " in said
    assert "" == refusal(files, backing)


@pytest.mark.slow
def test_a_loop_device_over_a_file(files: HostFiles, backing: Path, device: str) -> None:
    """A loop device is in use while the file below it is served, or used by QEMU."""
    with opened(files, backing):
        assert f"as {backing}, which is the same image" in refusal(files, device)
        assert refusal(files, device, read_only=True)
    with opened(files, backing, read_only=True):
        assert refusal(files, device)
        assert "" == refusal(files, device, read_only=True)
    with qemu.held_open("raw", backing) as pid:
        said = refusal(files, device)
        assert f"(process {pid})" in said
        assert f" as {backing}, " in said
    assert "" == refusal(files, device)


@pytest.mark.slow
def test_faces_of_faces(files: HostFiles, backing: Path, device: str) -> None:
    """Of a file, two loop devices over it, and one over one of those, only one can be served at a time."""
    with loops.over(backing) as second, loops.over(device) as upper:
        for one in (backing, device, second, upper):
            with opened(files, one):
                for other in (backing, device, second, upper):
                    assert refusal(files, other), (one, other)
            assert "" == refusal(files, one)


def test_a_mounted_iso_is_read_by_guests(files: HostFiles, backing: Path, tmp_path: Path) -> None:
    """A file that is mounted through a read-only loop device cannot change, so it may be read, but not written."""
    with loops.over(backing) as device:
        subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    with loops.over(backing, "--read-only") as device, loops.remounted(device, tmp_path / "place", "-o", "ro,noload"):
        assert "" == refusal(files, backing, read_only=True)
        assert "" == refusal(files, device, read_only=True)
        assert refusal(files, backing)


def test_renamed_and_linked_files_below_a_loop_device(files: HostFiles, tmp_path: Path, backing: Path) -> None:
    """A file below a loop device is recognised after it was renamed, and by another link to it."""
    with loops.over(backing) as device, opened(files, device):
        moved = backing.rename(tmp_path / "moved")
        assert refusal(files, moved)
        (tmp_path / "linked").hardlink_to(moved)
        assert refusal(files, tmp_path / "linked")
        backing.write_bytes(bytes(1 << 20))
        assert "" == refusal(files, backing)


def test_a_claim_lasts_as_long_as_the_last_copy(files: HostFiles, device: str) -> None:
    """A successor gets a device only once the last descriptor of its predecessor is closed."""
    image = files.open(device, read_only=False)
    copy = os.dup(image.fd)
    image.close()
    assert refusal(files, device)
    os.close(copy)
    assert "" == refusal(files, device)


def test_nobody_is_told_of_himself(files: HostFiles, backing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error never names our own processes as users of an image: they have released it by then."""
    with qemu.held_open("raw", backing) as pid:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        said = refusal(files, backing)
        monkeypatch.undo()
    assert f"(process {pid})" in said
    assert 1 == said.count("(process ")


def test_only_looking_claims_nothing(files: HostFiles, device: str, tmp_path: Path) -> None:
    """Reading without a lock, as `image info` does, works on a device that is mounted or served."""
    reactor = Reactor()
    looking = HostFiles(reactor, use_queues=False, locks=False)
    with loops.mounted(device, tmp_path / "place"):
        assert "" == refusal(looking, device, read_only=True)
    with opened(files, device):
        assert "" == refusal(looking, device, read_only=True)
    looking.close()
    reactor.close()


def test_a_device_that_the_kernels_backend_serves(
    files: HostFiles, backing: Path, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device served by xen-blkback, which claims nothing, is refused, and so is the file below it."""
    number = Path(device).stat().st_rdev
    vbd = tmp_path / "bus" / "vbd-7-51712"
    vbd.mkdir(parents=True)
    (vbd / "physical_device").write_text(f"{os.major(number):x}:{os.minor(number):x}\n")
    (vbd / "mode").write_text("w\n")
    monkeypatch.setattr(blkback, "BUS", str(vbd.parent))
    for read_only in (False, True):
        said = refusal(files, device, read_only=read_only)
        assert f"{device} is in use by the kernel's backend for the disk 7/xvda; free it there first" in said
        assert f"the kernel's backend for the disk 7/xvda as {device}" in refusal(files, backing, read_only=read_only)
    assert "" == refusal(files, device, shareable=True)
    (vbd / "mode").write_text("r\n")
    assert "" == refusal(files, device, read_only=True)
    assert "" == refusal(files, backing, read_only=True)
    assert refusal(files, device)


def locks_on(*paths: Path) -> dict[str, list[str]]:
    """Return the locks on files as the kernel lists them, by name: kind, and first and last byte."""
    rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    ends = {f":{path.stat().st_ino}": path.name for path in paths}
    found: dict[str, list[str]] = {path.name: [] for path in paths}
    for row in rows:
        for end, name in ends.items():
            if row[5].endswith(end):
                found[name].append(" ".join([row[1], *row[6:8]] if row[1] == "OFDLCK" else [row[1], row[3]]))
    return {name: sorted(each) for name, each in found.items()}


_READS = ["FLOCK READ", "OFDLCK 100 100", "OFDLCK 201 201", "OFDLCK 203 203"]
_WRITES = ["FLOCK WRITE", "OFDLCK 100 101", "OFDLCK 103 103", "OFDLCK 201 201", "OFDLCK 203 203"]


@pytest.mark.slow
def test_a_killed_worker_leaves_no_lock_and_no_claim(tmp_path: Path, device: str) -> None:
    """Each file of a chain is locked as it is used. After SIGKILL no lock or claim is left, and a successor gets the
    same.
    """
    parent, child = tmp_path / "parent", tmp_path / "child"
    qemu.qemu_img("create", "-q", "-f", "qcow2", parent, "4M")
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", parent, "-F", "qcow2", child)
    expected = {"parent": _READS, "child": _WRITES, Path(device).name: []}
    for chain, there in (
        (f"log:|qcow2:{child},parents={tmp_path}", expected),
        (f"aio:{device}", {"parent": [], "child": [], Path(device).name: _WRITES}),
    ):
        for _ in range(2):
            worker = WorkerProcess(f"xenbackend.rig.host:{tmp_path}")
            try:
                assert Stage.OPEN == worker.open(chain).stage
                assert there == locks_on(parent, child, Path(device))
                with pytest.raises(OSError, match="busy") if device in chain else nullcontext():
                    os.close(os.open(device, os.O_RDWR | os.O_EXCL))
            finally:
                worker.drop()
            assert {"parent": [], "child": [], Path(device).name: []} == locks_on(parent, child, Path(device))
            os.close(os.open(device, os.O_RDWR | os.O_EXCL))


def test_a_shared_disk_is_its_own_successors_alone(device: str, backing: Path) -> None:
    """A shared disk may be used beside other disks, but not beside its own predecessor, whose last write could come
    after ours.
    """
    reactor = Reactor()
    one, two = HostFiles(reactor, disk=1), HostFiles(reactor, disk=2)
    for path in (str(backing), device):
        image = one.open(path, read_only=False, shareable=True)
        copy = os.dup(image.fd)  # as a write in flight would
        image.close()
        assert "" == refusal(two, path, shareable=True)
        assert refusal(one, path, shareable=True)
        assert "" == refusal(one, path, read_only=True, shareable=True)
        os.close(copy)
        assert "" == refusal(one, path, shareable=True)
    one.close()
    two.close()
    reactor.close()


@pytest.mark.parametrize("first_step", ["take", "look"])
def test_two_who_come_at_once_by_different_faces(
    files: HostFiles, backing: Path, device: str, monkeypatch: pytest.MonkeyPatch, first_step: str
) -> None:
    """If two open one image as a file and as a device at the same moment, between each other's steps, exactly one gets
    it.
    """
    reactor = Reactor()
    others = HostFiles(reactor, names_users=False)
    got: list[Image] = []
    take, look = locks.take, files.opener.is_used_beside

    def come() -> None:
        monkeypatch.undo()
        with suppress(DriverError):
            got.append(others.open(device, read_only=False))

    def take_and_let_come(*arguments: Any) -> bool:
        has_taken = take(*arguments)
        come()
        return has_taken

    def look_and_let_come(*arguments: Any) -> bool:
        is_used = look(*arguments)
        come()
        return is_used

    if first_step == "take":
        monkeypatch.setattr(locks, "take", take_and_let_come)
    else:
        monkeypatch.setattr(files.opener, "is_used_beside", look_and_let_come)
    with suppress(DriverError):
        got.append(files.open(str(backing), read_only=False))
    assert 1 == len(got)
    got[0].close()
    others.close()
    reactor.close()
