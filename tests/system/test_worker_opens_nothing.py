"""From its first message to its last a worker makes no call that takes a path, nor one that opens anything."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import luks_images
from tests.driven import Driven, WorkerProcess
from tests.partition_tables import mbr
from tests.qcow_images import qcow2
from tests.vhd_images import UUID, image
from xenbackend.protocol import messages
from xenbackend.protocol.codes import Code
from xenbackend.rig.frontend import Wishes
from xenbackend.units import PAGE

SIZE = 4 << 20
DATA = b"d" * PAGE
# As in the zygote's children, everything is imported first. Calls without an audit event are replaced by ones with it.
PROGRAM = """
import functools, os, socket, sys
from xenbackend.worker import main, preload
preload.preload("xenbackend.rig.host")
WATCHED = ("open", "import", "os.", "socket.bind", "socket.connect", "socket.__new__", "subprocess.", "shutil.",
           "glob.", "ctypes.dlopen", "pathlib.")
told = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
def tell(event, *arguments):
    os.write(told, f"{event} {arguments}\\n".encode(errors="backslashreplace"))
def hook(event, arguments):
    if not event.startswith(WATCHED) or (arguments and isinstance(arguments[0], int)):
        return  # of a descriptor that it has
    if event != "socket.__new__" or arguments[1] != -1:  # else a descriptor that it has becomes an object
        tell(event, arguments)
def watched(function):
    def call(path, *more, **named):
        if not isinstance(path, int):
            tell(function.__name__, path)
        return function(path, *more, **named)
    return call
worker = main.Worker(socket.socket(fileno=int(sys.argv[sys.argv.index("--socket") + 1])))
for name in ("stat", "lstat", "readlink", "access", "statvfs", "getxattr"):
    setattr(os, name, watched(getattr(os, name)))
sys.addaudithook(hook)
if sys.argv[1] == "opens":
    os.close(os.open("/dev/null", os.O_RDONLY))
    os.path.exists("/dev/null")
worker.run()
"""


class Watched(Driven):
    """A disk whose workers are watched; `told` lists the forbidden calls that they made."""

    def __init__(self, directory: Path, how: str = "") -> None:
        super().__init__(directory)
        self._told = directory / "told"
        self._told.touch()
        self._command = [sys.executable, "-c", PROGRAM, how, str(self._told)]
        self.worker.drop()
        self.worker = WorkerProcess(self.worker.host, command=self._command)

    def start_successor(self) -> None:
        """See `Driven`."""
        old = self.worker
        self.worker = WorkerProcess(old.host, left=os.dup(old.memfd), command=self._command)
        self.worker.openers.memories, old.openers.memories = old.openers.memories, {}
        old.drop()

    @property
    def told(self) -> list[str]:
        return self._told.read_text().splitlines()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    """A disk whose workers are watched."""
    (tmp_path / "rig").mkdir()
    with Watched(tmp_path / "rig") as watched:
        yield watched


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aio", "qcow2", "vhd"])
def test_from_attach_to_close(watched: Watched, tmp_path: Path, kind: str) -> None:
    """No such call is made while a disk with a record and a parent goes through its life, from open to close."""
    data = {
        "aio": bytes(SIZE),
        "qcow2": qcow2(SIZE, backing=b"base", backing_format=b"raw"),
        "vhd": image(SIZE, uuid=b"c" * 16, parent_uuid=UUID, names=[(b"MacX", b"file://./base")]),
    }[kind]
    (tmp_path / "base").write_bytes(image(SIZE, uuid=UUID) if kind == "vhd" else bytes(SIZE))
    (tmp_path / "disk").write_bytes(data)
    options = {"aio": "", "qcow2": f",parents={tmp_path}", "vhd": f",parents={tmp_path},changed=accept"}[kind]
    chain = f"log:{tmp_path}/record|{kind}:{tmp_path}/disk{options}"
    worker = watched.worker
    watched.connect(chain, Wishes(queues=2))
    watched.frontend.write(0, DATA)
    branched = worker.ask(messages.Branch(f"{tmp_path}/leaf", ""))
    swapped = worker.ask(messages.Swap(branched.data))
    watched.frontend.write(8, DATA)
    looked = worker.ask(messages.Swap(f"log:|{branched.data.partition('|')[2]}", is_dry_run=True))
    said = worker.ask(messages.Command("log", "status", []))
    for question in (messages.Pause(), messages.Resume(), messages.SetPolicy("write=report")):
        assert Code.OK == worker.ask(question).code
    watched.kill()
    watched.succeed(branched.data)
    watched.frontend.write(16, DATA)
    watched.reconnect()
    watched.frontend.write(24, DATA)
    found = watched.frontend.read(0, 32)
    watched.disconnect()
    watched.worker.end()

    assert [Code.OK] * 4 == [each.code for each in (branched, swapped, looked, said)], (branched, swapped, looked, said)
    assert 4 * DATA == found
    assert [] == watched.told


@pytest.mark.slow
def test_filters_with_files_and_tables(watched: Watched, tmp_path: Path) -> None:
    """No such call is made by filters with files, tables or limits: opened, killed, exchanged, closed."""
    (tmp_path / "disk").write_bytes(mbr(2 * SIZE, {1: (0x83, 64, SIZE // 512)}))
    below = f"cow:{tmp_path}/cow|readahead:|partition:1|aio:{tmp_path}/disk"
    worker = watched.worker
    watched.connect(f"throttle:iops=1000|{below}", Wishes(queues=2))
    watched.frontend.write(0, DATA)
    swapped = worker.ask(messages.Swap(below))
    watched.frontend.write(8, DATA)
    watched.kill()
    watched.succeed(below)
    found = watched.frontend.read(0, 16)
    watched.frontend.flush()
    watched.disconnect()
    watched.worker.end()

    assert Code.OK == swapped.code, swapped
    assert 2 * DATA == found
    assert [] == watched.told


@pytest.mark.slow
def test_encrypted(watched: Watched, tmp_path: Path) -> None:
    """An encrypted volume makes no such call: opened, killed, continued without its passphrase, exchanged, closed."""
    passphrases = [b"other", luks_images.PASSPHRASE]
    made = luks_images.Made(bytes(SIZE), passphrases, os.urandom(32), "cbc-essiv:sha256")
    (tmp_path / "disk").write_bytes(luks_images.luks1(made))
    key = luks_images.key_file(tmp_path / "key")
    below = f"luks:key={key}|aio:{tmp_path}/disk"
    worker = watched.worker
    watched.connect(f"log:|{below}", Wishes(queues=2))
    watched.frontend.write(0, DATA)
    key.rename(tmp_path / "away")
    swapped = worker.ask(messages.Swap(below))
    watched.frontend.write(8, DATA)
    watched.kill()
    watched.succeed(below)
    watched.frontend.write(16, DATA)
    (tmp_path / "away").rename(key)
    anew = watched.worker.ask(messages.Swap(f"luks:key={key},slot=1|aio:{tmp_path}/disk", replaces=True))
    found = watched.frontend.read(0, 24)
    watched.disconnect()
    watched.worker.end()

    assert [Code.OK] * 2 == [swapped.code, anew.code], (swapped, anew)
    assert 3 * DATA == found
    assert [] == watched.told


@pytest.mark.slow
def test_the_watch_sees(tmp_path: Path) -> None:
    """The watch reports a worker that opens a path or looks at one."""
    with Watched(tmp_path, "opens") as watched:
        watched.open("null:1M")
        told = " ".join(watched.told)

    assert "open" in told
    assert "stat" in told
