"""Encrypted disks in whole services: where the key is and is not, who derives it, and how long a guest waits."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.luks_images import SLOTS_2, Made, header2, key_file, luks2, metadata, split, text, xts
from tests.until import until
from xenbackend.embedded.machine import Machine
from xenbackend.errors import XenbackendError
from xenbackend.kernel import memfd
from xenbackend.rig.frontend import Wishes

pytestmark = pytest.mark.slow
SIZE = 1 << 20
PASSPHRASE = b"a passphrase that nobody else has"


def status_of(machine: Machine, disk: str = "5/xvda") -> dict[str, Any]:
    """Return what the service says of a disk."""
    [found] = [each for each in machine.ask({"verb": "status"})["data"] if each["vbd"] == disk]
    return dict(found)


def argon2_image(made: Made, memory_kib: int, passes: int) -> bytes:
    """Return an image whose key is derived by Argon2."""
    from argon2 import low_level

    data_at = -(-(SLOTS_2 + made.area) // 4096) * 4096
    salt = os.urandom(32)
    values = metadata(made, [salt], data_at)
    values["keyslots"]["0"]["kdf"] = {
        "type": "argon2id", "salt": text(salt), "time": passes, "memory": memory_kib, "cpus": 2,
    }  # fmt: skip
    key = low_level.hash_secret_raw(PASSPHRASE, salt, passes, memory_kib, 2, len(made.key), low_level.Type.ID)
    stripes = xts(key, split(made.key, made.stripes, made.hash))
    image = bytearray(data_at)
    image[:0x4000], image[0x4000:0x8000] = header2(values), header2(values, is_second=True)
    image[SLOTS_2 : SLOTS_2 + len(stripes)] = stripes
    return bytes(image) + xts(made.key, made.plain)


def processes_of(machine: Machine) -> list[int]:
    """Return the numbers of the service's processes, its parent and all of their children."""
    assert machine.service is not None
    found, new = [], [machine.service.pid]
    while new:
        pid = new.pop()
        found.append(pid)
        with suppress(OSError):  # it is ending
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                new += [int(child) for child in task.read_text().split()]
    return found


def said_by(machine: Machine) -> dict[str, bytes]:
    """Return all that the service and its processes say, or that others can read of them."""
    said = {"log": machine.log.read_bytes(), "xenstore": str(list(tree(machine, ""))).encode()}
    for verb in ("status", "orders"):
        said[verb] = json.dumps(machine.ask({"verb": verb})).encode()
    shown = subprocess.run(
        [sys.executable, "-m", "xenbackend", "status", "--json", "--socket", machine.control],
        capture_output=True, check=True,
    )  # fmt: skip
    said["status --json"] = shown.stdout + shown.stderr
    for pid in processes_of(machine):
        with suppress(OSError):  # it has ended
            said[f"{pid} environ"] = Path(f"/proc/{pid}/environ").read_bytes()
            said[f"{pid} cmdline"] = Path(f"/proc/{pid}/cmdline").read_bytes()
    return said


def tree(machine: Machine, path: str) -> Iterator[tuple[str, str]]:
    """Yield the paths and values in xenstore."""
    for name in machine.store.directory(path or "/"):
        below = f"{path}/{name}"
        yield below, machine.store.read_optional(below) or ""
        yield from tree(machine, below)


def memories_of(pid: int) -> list[int]:
    """Yield descriptors of the memories that a process has."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if str(each.readlink()).startswith("/memfd:"):
                found.append(os.open(each, os.O_RDWR | os.O_CLOEXEC))
    return found


def holds(fd: int, secret: bytes) -> bool:
    """Return whether a memory contains a secret."""
    return secret in os.pread(fd, os.fstat(fd).st_size, 0)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A file with the passphrase."""
    return key_file(tmp_path / "key", PASSPHRASE)


def test_the_key_is_made_once_and_is_nowhere_else(tmp_path: Path, key: Path) -> None:
    """E2: after kills of worker and service and after an upgrade the disk is served without its passphrase's file.

    That file is removed after the attach. Neither passphrase nor key is in a log, an answer, xenstore, an environment
    or a command line; the memory with the key is wiped at the detach.
    """
    made = Made(Random(1).randbytes(SIZE), passphrases=[PASSPHRASE])
    image = tmp_path / "img"
    image.write_bytes(luks2(made))
    chain = f"log:|luks:key={key}|aio:{image}"
    expected = bytearray(made.plain)
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", chain)
        disk = guest.connect(path, Wishes())
        key.unlink()

        def goes_on(place: int) -> None:
            data = os.urandom(4096)
            disk.write(place * 8, data)
            expected[place * 4096 : (place + 1) * 4096] = data
            assert bytes(expected[: 8 * 4096]) == disk.read(0, 64)

        goes_on(0)
        for number in range(1, 4):
            worker = status_of(machine)["worker"]
            os.kill(worker, signal.SIGKILL)
            goes_on(number)
        worker, service = status_of(machine)["worker"], machine.service_pid
        os.kill(service, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        goes_on(4)
        until(lambda: status_of(machine)["phase"] == "serving")
        assert "ok" == machine.ask({"verb": "upgrade", "vbd": "5/xvda"})["code"]
        goes_on(5)
        all_held = memories_of(machine.service_pid)
        held = [fd for fd in all_held if holds(fd, made.key)]
        assert [mmap.PAGESIZE] == [os.fstat(fd).st_size for fd in held]  # and neither the journal nor the notes
        assert len(all_held) > 2
        assert memfd.is_sealed(held[0], mmap.PAGESIZE)
        secrets = (PASSPHRASE, made.key, made.key.hex().encode(), made.key[:32], made.key.hex()[:32].encode())
        told = [(what, secret) for what, said in said_by(machine).items() for secret in secrets if secret in said]
        disk.close()
        machine.detach(path)
        until(lambda: not machine.ask({"verb": "status"})["data"])
        wiped = bytes(mmap.PAGESIZE) == os.pread(held[0], mmap.PAGESIZE, 0)
        for fd in all_held:
            os.close(fd)

    assert [] == told
    assert wiped
    assert xts(made.key, bytes(expected)) == image.read_bytes()[-SIZE:]


def test_what_cannot_be_unlocked_is_not_attached(tmp_path: Path, key: Path) -> None:
    """E1: if the key file is missing, the passphrase wrong or the header damaged, the attach fails with the reason."""
    image = tmp_path / "img"
    image.write_bytes(luks2(Made(bytes(SIZE), passphrases=[b"another one"])))
    with Machine() as machine, closing(machine.create_guest(5)):
        with pytest.raises(XenbackendError, match=r"the passphrase of .*key opens no key slot of it"):
            machine.attach(5, "xvda", f"luks:key={key}|aio:{image}")
        with pytest.raises(XenbackendError, match="the credential guest cannot be read"):
            machine.attach(5, "xvdb", f"luks:key=credential:guest|aio:{image}")
        key.unlink()
        with pytest.raises(XenbackendError, match=r"the key file .*key cannot be read: No such file"):
            machine.attach(5, "xvdc", f"luks:key={key}|aio:{image}")
        image.write_bytes(bytes(SIZE))
        with pytest.raises(XenbackendError, match="there is no LUKS header"):
            machine.attach(5, "xvdd", f"luks:key={key}|aio:{image}")


def test_a_credential_of_the_service_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The opener finds a credential in the directory that systemd has named to the service."""
    made = Made(Random(2).randbytes(65536), passphrases=[PASSPHRASE])
    (tmp_path / "img").write_bytes(luks2(made))
    (tmp_path / "credentials").mkdir()
    key_file(tmp_path / "credentials" / "guest", PASSPHRASE)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", f"luks:key=credential:guest|aio:{tmp_path}/img")
        disk = guest.connect(path, Wishes())

        assert made.plain[:4096] == disk.read(0, 8)


def test_argon2_takes_time_and_a_successor_none(tmp_path: Path, key: Path) -> None:
    """E2: four disks with slow keys are unlocked one after the other, not in a worker, and while the service answers.

    A killed worker's successor takes none of that time.
    """
    pytest.importorskip("argon2")
    made = [Made(bytes([65 + number]) * 65536) for number in range(4)]
    for number, each in enumerate(made):
        (tmp_path / f"img{number}").write_bytes(argon2_image(each, 131072, 12))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        helpers = [
            subprocess.Popen(
                [
                    sys.executable, "-m", "xenbackend", "attach", "5", f"xvd{'abcd'[number]}",
                    f"luks:key={key}|aio:{tmp_path}/img{number}", "--store", str(machine.directory / "xenstore.sock"),
                    "--socket", machine.control,
                ],
                stderr=subprocess.PIPE,
            )
            for number in range(4)
        ]  # fmt: skip
        waits, slowest, making = set(), 0.0, 0
        while any(each.poll() is None for each in helpers):
            begin = time.monotonic()
            found = machine.ask({"verb": "status"})["data"]
            slowest = max(slowest, time.monotonic() - begin)
            waits |= {each["waits_for"] for each in found if "the key is being derived" in each["error"]}
            making = max(making, sum(_is_making(pid) for pid in processes_of(machine)))
        assert [0] * 4 == [each.wait() for each in helpers], [each.communicate()[1] for each in helpers]
        for each in helpers:
            each.communicate()
        key.unlink()
        path = next(path for path in [_path_of(machine, "xvda")])
        disk = guest.connect(path, Wishes())
        begin = time.monotonic()
        os.kill(status_of(machine)["worker"], signal.SIGKILL)
        assert b"A" * 4096 == disk.read(0, 8)
        took = time.monotonic() - begin

    assert 1 == making
    assert {"key"} == waits
    assert slowest < 2.0
    assert took < 2.0


def _is_making(pid: int) -> bool:
    """Return whether a process uses as much memory as deriving this key takes."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE > 100 << 20
    return False


def _path_of(machine: Machine, vdev: str) -> Any:
    from xenbackend.supervisor.xenstore.toolstack import vbd_path

    return vbd_path(machine.store, 5, vdev)
