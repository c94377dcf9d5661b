"""How a worker starts: with all that it cannot get once it is behind walls, and with nothing else."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import places
from tests.behind_walls import inspect
from tests.openers import Openers
from tests.until import until
from xenbackend import journal
from xenbackend.block import drivers
from xenbackend.block.drivers import find_driver, load_ahead
from xenbackend.errors import DriverError
from xenbackend.kernel import memfd
from xenbackend.protocol import codec, jobs, messages
from xenbackend.walls.raising import Wall
from xenbackend.worker import birth, preload

ROOT = Path(birth.__file__).parents[1]
HOST = "xenbackend.rig.host"
ROOMS = ("block", "blkif", "journal.py", "kernel", "loop", "nbd", "protocol", "rig/host.py", "walls", "worker")
# What functions of these rooms import, and workers do without.
NOT_FOR_WORKERS = {
    "importlib.metadata": "third parties' drivers, which are looked for before",
    "compression": "of Python 3.14, which has it",
    "zstandard": "where it is installed",
}
_EVERYTHING = f"""
import json, sys
from xenbackend.worker import main, preload
preload.preload({HOST!r})
print(json.dumps(sorted(sys.modules)))
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root raises all walls")


@contextmanager
def zygote(walls: str) -> Iterator[socket.socket]:
    """Start a zygote, and yield its socket once it is ready."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "xenbackend.worker.zygote", "--host", HOST, "--walls", walls, "--socket"]
    with near, far:
        process = subprocess.Popen([*command, str(far.fileno())], pass_fds=[far.fileno()])
        far.close()
        near.settimeout(20)
        assert b"ready" == near.recv(16)
        yield near
        near.close()
        assert 0 == process.wait(20)


@contextmanager
def worker_of(channel: socket.socket, drivers: str = "") -> Iterator[tuple[socket.socket, int]]:
    """Have a worker forked, and yield its socket and its process number."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(20)
        cord, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with cord, far:
            socket.send_fds(channel, [f"w {drivers}".encode()], [far.fileno()])
            _, (pidfd,), _, _ = socket.recv_fds(channel, 16, 1)
            assert b"born" == channel.recv(16)
            socket.send_fds(cord, [b"socket"], [theirs.fileno()])
        theirs.close()
        line = next(each for each in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines() if "Pid" in each)
        yield ours, int(line.split()[1])
        os.close(pidfd)


def open_chain(near: socket.socket, chain: str = "null:1G") -> messages.Standing:
    """Let a worker open a chain, and return its standing then."""
    fd = memfd.make("journal", journal.SIZE)
    openers = Openers()
    opener = openers.begin(jobs.Job("vbd/5/51712", [chain], read_only=False))
    order = messages.Open(1, "vbd/5/51712", HOST, 5, chain, read_only=False)
    with opener:
        socket.send_fds(near, [codec.encode(order)], [fd, opener.fileno()])
    os.close(fd)
    while True:
        said = codec.from_worker(near.recv(messages.MAX_MESSAGE))
        if isinstance(said, messages.Standing) and (said.layers or said.failure):
            openers.close()
            return said


@needs_root
@pytest.mark.slow
@pytest.mark.rows("R20", "B16")
def test_a_worker_is_behind_all_walls_before_it_hears_a_message() -> None:
    """A worker is behind all walls before it reads a message. Its only open files are those of the loop, the host's
    load, a restricted ring, and the journal.
    """
    with zygote("on") as channel, worker_of(channel) as (near, pid):
        near.send(codec.encode(messages.Report(0)))
        first = codec.from_worker(near.recv(messages.MAX_MESSAGE))
        assert isinstance(first, messages.Standing)
        amiss = inspect(pid)
        standing = open_chain(near)
        links = {re.sub(r"socket:.*", "socket", each.readlink().name) for each in Path(f"/proc/{pid}/fd").iterdir()}

    assert ([wall.value for wall in Wall], {}, []) == (first.walls, first.no_walls, first.needs)
    assert [] == amiss
    assert not standing.failure
    assert standing.walls == first.walls
    assert links - {"anon_inode:[io_uring]"} == {
        "null", "anon_inode:[eventpoll]", "anon_inode:[eventfd]", "socket", "schedstat", "stat",
        "memfd:journal (deleted)",
    }  # fmt: skip


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "words", "mode"),
    [
        ("", "aio", "O_DIRECT, Linux AIO"),
        ("", "", "O_DIRECT, Linux AIO"),
        ("", "nbd", "O_DIRECT, threads"),
        (",cache=on", "aio,log", "page cache, preadv and pwritev"),
    ],
)
def test_asynchronous_io_is_there_before_the_walls(option: str, words: str, mode: str) -> None:
    """Behind its walls a worker uses the context of Linux AIO and the ring that it made before them, one of each. If
    no driver of its chain opens images, it has no context, and threads serve an image that comes later. It gives back
    a context that no image of its chain uses.
    """
    with places.directory(places.DISK) as place, zygote("on") as channel, worker_of(channel, words) as (near, pid):
        image = place / "image"
        image.write_bytes(bytes(1 << 20))
        near.send(codec.encode(messages.Report(0)))
        near.recv(messages.MAX_MESSAGE)
        before = _contexts_and_rings(pid)
        standing = open_chain(near, f"aio:{image}{option}")
        until(lambda: _contexts_and_rings(pid) == (int("Linux AIO" in mode), 1), lambda: _contexts_and_rings(pid))

    assert (mode, "") == (standing.layers[0].facts["mode"], standing.failure)
    assert (0 if words == "nbd" else 1, 1) == before


@needs_root
@pytest.mark.slow
def test_a_worker_can_discard_behind_its_walls() -> None:
    """A worker that can reserve no space behind its walls can still give back that of an image, as without walls."""
    can = {}
    with places.directory(places.DISK) as place:
        image = place / "image"
        image.write_bytes(bytes(1 << 20))
        for walls in ("on", "off"):
            with zygote(walls) as channel, worker_of(channel, "aio") as (near, _):
                can[walls] = open_chain(near, f"aio:{image}").layers[0].can_discard

    assert {"on": True, "off": True} == can


def _contexts_and_rings(pid: int) -> tuple[int, int]:
    """Return how many contexts of Linux AIO and how many rings of io_uring a process has."""
    contexts = Path(f"/proc/{pid}/maps").read_text().count("[aio]")
    links = [each.readlink().name for each in Path(f"/proc/{pid}/fd").iterdir()]
    return contexts, links.count("anon_inode:[io_uring]")


@needs_root
@pytest.mark.slow
@pytest.mark.rows("R20")
def test_two_workers_are_two_users() -> None:
    """Two workers that live at the same time share neither user nor group."""
    with zygote("on") as channel, worker_of(channel) as (first, one), worker_of(channel) as (second, other):
        open_chain(first)
        open_chain(second)
        users = [Path(f"/proc/{pid}/status").read_text() for pid in (one, other)]

    found = [re.findall(r"^[UG]id:\t(\d+)", text, re.MULTILINE) for text in users]
    assert [True, True] == [len(set(each)) == 1 for each in found]
    assert found[0] != found[1]


@needs_root
@pytest.mark.slow
def test_without_walls_a_worker_is_the_services() -> None:
    """With walls = "off" a worker gives up nothing, and reports no walls."""
    with zygote("off") as channel, worker_of(channel) as (near, pid):
        standing = open_chain(near)
        status = Path(f"/proc/{pid}/status").read_text()

    assert ([], {}, []) == (standing.walls, standing.no_walls, standing.needs)
    assert "Seccomp:\t0" in status


@pytest.mark.slow
def test_required_walls_that_are_missing_are_why_a_disk_is_not_served() -> None:
    """With walls = "require", a worker that cannot raise all of them says so when it is to open a chain, and opens
    nothing.
    """
    program = (
        "import sys; from xenbackend.kernel import landlock; from xenbackend.worker.zygote import main\n"
        "landlock._SYS_CREATE_RULESET = 100_000\nsys.exit(main(sys.argv[1:]))"
    )
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        command = [sys.executable, "-c", program, "--host", HOST, "--walls", "require", "--socket", str(far.fileno())]
        process = subprocess.Popen(command, pass_fds=[far.fileno()])
        far.close()
        near.settimeout(20)
        near.recv(16)
        with worker_of(near) as (ours, _):
            standing = open_chain(ours)
        near.close()
        process.wait(20)

    assert standing.failure.startswith('walls = "require", and this host cannot raise ')
    assert "landlock (use Landlock: Function not implemented)" in standing.failure
    assert "use Landlock: Function not implemented" == standing.no_walls["landlock"]
    assert [] == standing.layers


@pytest.mark.slow
def test_a_worker_by_exec_is_behind_them_too() -> None:
    """A worker that is started by exec raises all walls except that of processes, which needs a fork."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "xenbackend.worker.main", "--host", HOST, "--walls", "on", "--socket"]
    with near, far:
        process = subprocess.Popen([*command, str(far.fileno())], pass_fds=[far.fileno()])
        far.close()
        near.settimeout(20)
        standing = open_chain(near)
        near.close()
        process.wait(20)

    assert {wall.value for wall in Wall} - {"processes"} == {*standing.walls, *standing.no_walls}
    assert os.geteuid() != 0 or standing.no_walls == {}


def _late_imports() -> set[str]:
    """Return the modules that functions import in the rooms that a worker uses."""
    found = set()
    for room in ROOMS:
        path = ROOT / room
        for file in [path] if path.suffix else path.rglob("*.py"):
            if file == Path(preload.__file__):
                continue
            tree = ast.parse(file.read_text())
            for function in ast.walk(tree):
                if isinstance(function, ast.FunctionDef):
                    for node in ast.walk(function):
                        if isinstance(node, ast.ImportFrom) and node.module:
                            inner = [f"{node.module}.{each.name}" for each in node.names]
                            found |= {node.module, *(each for each in inner if _is_module(each))}
                        elif isinstance(node, ast.Import):
                            found |= {each.name for each in node.names}
    return found


def _is_module(name: str) -> bool:
    return (ROOT.parent / Path(*name.split(".")).with_suffix(".py")).exists()


@pytest.mark.slow
def test_nothing_is_left_to_be_imported() -> None:
    """Everything that a function imports late is imported before the walls are raised, since nothing can be imported
    behind them.
    """
    done = subprocess.run([sys.executable, "-c", _EVERYTHING], check=True, capture_output=True, timeout=60)
    late = _late_imports()

    assert {"shlex", "uuid"} <= late
    assert set() == late - NOT_FOR_WORKERS.keys() - set(json.loads(done.stdout))


def test_every_encoding_is_there() -> None:
    """Each encoding that a worker's rooms name is looked up before the walls are raised, since it is a module too."""
    named = set()
    for room in ROOMS:
        path = ROOT / room
        for file in [path] if path.suffix else path.rglob("*.py"):
            named |= set(re.findall(r"(?:en|de)code\(['\"]([\w-]+)['\"]", file.read_text()))

    assert {"utf-16-be", "latin-1"} <= named <= set(preload.ENCODINGS)


def test_what_was_not_there_from_the_beginning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that was not loaded ahead is refused with a sentence that says what to do, or why it could not be
    loaded.
    """
    monkeypatch.setattr(drivers, "_ahead", None)
    load_ahead(["nonesuch"])

    with pytest.raises(LookupError, match="unknown driver 'nonesuch'"):
        find_driver("nonesuch")
    for name in ("xor", "rbd"):
        with pytest.raises(LookupError, match="attach it again with this chain"):
            find_driver(name)
    assert "aio" == find_driver("aio").name


def test_a_library_is_loaded_ahead_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a driver that is named prepares itself; a failure to do so is no error until it is opened."""
    prepared = []

    def prepare() -> None:
        prepared.append("rbd")
        raise DriverError("there is no library")

    monkeypatch.setattr(drivers, "_ahead", None)
    monkeypatch.setattr(find_driver("rbd"), "prepare", prepare)
    assert [{"ceph", "network"}] == [each.needs for each in load_ahead(["log", "rbd", "vhdsync"])]
    assert ["rbd"] == prepared
    assert "rbd" == find_driver("rbd").name


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--socket 7", {"socket": "7"}),
        ("--host h --walls on --drivers a,b --socket 7", {"host": "h", "walls": "on", "drivers": "a,b", "socket": "7"}),
        ("--socket x", None),
        ("--socket", None),
        ("--sockets 7", None),
        ("--socket 7 --socket 8", None),
        ("--host h", None),
        ("", None),
    ],
)
def test_a_command_line_is_pairs(line: str, expected: dict[str, str] | None) -> None:
    """A command line that is not made of pairs of known names and values, or that has no socket, is refused."""
    assert expected == birth.parse(line.split())
