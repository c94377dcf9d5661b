"""The driver nbd with real servers, below real guests of the embedded machine: kills, restarts, stops, names, sizes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from random import Random

import pytest

from tests.certificates import Authority
from tests.chaos.link import Fault, Link
from tests.driven import Driven
from tests.engines.guest import DOMID, SIZE, Guest
from tests.engines.servers import Engine, tls_of
from tests.until import until
from xenbackend.block.chain import parse_chain
from xenbackend.cli.main import main
from xenbackend.embedded.machine import Machine
from xenbackend.image.extents import map_chain
from xenbackend.image.session import Session
from xenbackend.nbd.abi import CMD_WRITE, REQUEST, REQUEST_MAGIC
from xenbackend.protocol import messages
from xenbackend.protocol.client import ServiceError
from xenbackend.protocol.messages import Stage
from xenbackend.rig.frontend import Wishes
from xenbackend.units import PAGE

KINDS = ("nbdkit", "qemu-nbd", "qemu-storage-daemon")


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """Each server in turn."""
    with Engine(request.param, tmp_path, SIZE) as engine:
        yield engine


@pytest.fixture
def guest(machine: Machine, engine: Engine, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest on each server in turn."""
    with ExitStack() as stack:
        yield Guest(machine, engine.chain, request.config.getoption("--seed"), stack)


def test_demo(engine: Engine) -> None:
    """The demo runs on such a disk and verifies every sector."""
    assert 0 == main(["demo", "--quiet", "--area", "16M", "--seconds", "1", engine.chain])


def test_workers_are_killed_under_load(guest: Guest, engine: Engine, request: pytest.FixtureRequest) -> None:
    """If its worker dies amid requests, a guest sees a pause and no error, even if the server aborts over that."""
    random = Random(request.config.getoption("--seed"))
    for _ in range(3):
        guest.load.run(random.randrange(20, 120))
        guest.load.top_up()
        guest.kill()
        if not engine.is_alive():  # nbdkit 1.32 aborts if a client dies with requests in flight
            engine.start()
    guest.load.run(200)
    guest.end()


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
def test_tls_and_several_connections(
    machine: Machine, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """With TLS and several connections, a guest sees a pause and no error if its worker or server dies."""
    ours = Authority(tmp_path / "ours")
    more = f",certificates={ours.client('client', shows_itself=True)},connections=3"
    with Engine(kind, tmp_path, SIZE, tls_of(kind, ours.server("server")), more) as engine, ExitStack() as stack:
        guest = Guest(machine, engine.chain, request.config.getoption("--seed"), stack)
        guest.outlive(engine)
        guest.load.run(50)
        guest.end()
        assert guest.connection().startswith("3 to")
        assert guest.fact("encryption") == "TLSv1.3"


@pytest.mark.parametrize("mode", ["off", "on", "require"])
def test_who_wants_tls_and_who_has_it(tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each combination of the server's TLS mode and the client's certificates is served or has its own message."""
    ours = Authority(tmp_path / "ours")
    server = ours.server("server")
    tls = [f"--tls={mode}", f"--tls-certificates={server}", "--tls-verify-peer"]
    us, nobody = (ours.client(f"client-{shows}", shows_itself=shows) for shows in (True, False))
    strangers = Authority(tmp_path / "theirs", "theirs").client("client", shows_itself=True)
    with Engine("nbdkit", tmp_path, SIZE, tls) as engine:
        for directory, refused in (
            ("", "it requires TLS" if mode == "require" else ""),
            (us, "it does not offer TLS" if mode == "off" else ""),
            (nobody, "it does not offer TLS" if mode == "off" else "certificate"),
            (strangers, "it does not offer TLS" if mode == "off" else "not from an authority that"),
        ):
            capsys.readouterr()
            status = main(["check", "--read-only", engine.chain + (f",certificates={directory}" if directory else "")])
            assert (2 if refused else 0) == status
            assert refused in " ".join(capsys.readouterr().err.split())


def test_the_server_is_killed_under_load(guest: Guest, engine: Engine, request: pytest.FixtureRequest) -> None:
    """If its server dies, a guest waits until it is back, and keeps its worker."""
    random = Random(request.config.getoption("--seed"))
    worker = guest.status()["worker"]
    for _ in range(2):
        guest.load.run(random.randrange(20, 120))
        guest.load.top_up()
        engine.kill()
        until(lambda: "cannot be reached" in guest.connection())
        engine.start()
    guest.load.run(200)
    guest.end()
    assert worker == guest.status()["worker"]


def test_everything_dies_at_once(guest: Guest, engine: Engine) -> None:
    """If server, worker and service die at the same time, a guest sees only a longer pause."""
    guest.load.run(50)
    guest.load.top_up()
    engine.kill()
    guest.kill()
    os.kill(guest.machine.service_pid, signal.SIGKILL)
    engine.start()
    guest.load.run(100)
    guest.end()


def test_a_server_that_stands_still_is_waited_for(guest: Guest, engine: Engine) -> None:
    """If a worker dies while its server is stopped, its successor waits until the former connection has ended."""
    guest.load.run(50)
    guest.load.top_up()
    engine.send(signal.SIGSTOP)
    guest.kill()
    until(lambda: "has not ended a former connection" in str(guest.status().get("error", "")))
    engine.send(signal.SIGCONT)
    if not engine.is_alive():
        engine.start()
    guest.load.run(100)
    guest.end()


def test_a_worker_is_replaced_while_its_server_is_away(guest: Guest, engine: Engine) -> None:
    """While a server is away, `upgrade` replaces the worker and says what the disk waits for. No `resume` is needed
    when the server is back.
    """
    guest.load.run(50)
    worker = guest.status()["worker"]
    engine.kill()
    guest.load.top_up()
    until(lambda: "cannot be reached" in guest.connection())
    with pytest.raises(ServiceError, match="cannot be reached"):
        guest.machine.ask({"verb": "upgrade", "vbd": "5/xvda"})
    assert worker != guest.status()["worker"]
    engine.start()
    guest.load.run(100)
    guest.end()


def test_a_service_is_stopped_while_the_server_is_away(guest: Guest, engine: Engine) -> None:
    """A service that is stopped while a server is away answers nothing; the next one serves the disk when the server
    is back: no `resume` is needed, since no flush of the guest has failed.
    """
    guest.load.run(50)
    engine.kill()
    guest.load.top_up()
    until(lambda: "cannot be reached" in guest.connection())
    guest.machine.ask({"verb": "stop"})
    guest.machine.stop_service()
    engine.start()
    guest.machine.start_service()
    guest.load.run(100)
    guest.end()
    assert "" == guest.status()["error"]


def test_exports_are_called_as_libnbd_calls_them(tmp_path: Path) -> None:
    """For each URI, we ask nbdkit for the same export as nbdinfo does."""
    asked = tmp_path / "asked"
    script = f'printf "%s\\n" "$3" >>{asked}'
    with Engine(
        "nbdkit", tmp_path, SIZE, ["eval", f"open={script}", "get_size=echo 1048576", "pread=exit 1"]
    ) as engine:
        for export in ("", "/", "/a", "//a", "/a%2Fb", "/a/b", "/%7C%2C", "/a%20b", "/%25", "/%C3%A4", "/a+b"):
            uri = f"nbd+unix://{export}?socket={engine.socket}"
            subprocess.run(["nbdinfo", "--size", uri], check=True, stdout=subprocess.DEVNULL, timeout=20)
            assert 0 == main(["check", "--read-only", f"nbd:{uri}"])
            theirs, ours = asked.read_text().splitlines()[-2:]
            assert theirs == ours, uri


def test_limits_of_requests_are_kept(machine: Machine, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A guest sees no error with a server that answers too small, too large and unaligned requests with errors."""
    policy = ["blocksize-minimum=4096", "blocksize-maximum=128K", "blocksize-error-policy=error"]
    options = ["--filter=blocksize-policy", "memory", "64M", *policy]
    with Engine("nbdkit", tmp_path, SIZE, options) as engine, ExitStack() as stack:
        guest = stack.enter_context(closing(machine.create_guest(DOMID)))
        path = machine.attach(DOMID, "xvda", engine.chain)
        frontend = stack.enter_context(closing(guest.connect(path, Wishes(indirect=256))))
        assert 4096 == frontend.facts.sector_size
        data = Random(1).randbytes(1 << 20)
        frontend.write(0, data)
        assert data == frontend.read(0, 2048)


def test_images_are_made_of_it(engine: Engine, tmp_path: Path) -> None:
    """`image convert` from a server copies every byte and leaves holes for zeros. `image map` shows these zeros."""
    data = Random(1).randbytes(1 << 20)
    with engine.image.open("r+b") as file:
        file.seek(1 << 20)
        file.write(data)
    copy = tmp_path / "copy.img"
    assert 0 == main(["image", "convert", engine.chain, f"aio:{copy}"])
    assert engine.image.read_bytes() == copy.read_bytes()
    assert copy.stat().st_blocks * 512 < 4 << 20
    chain = parse_chain(engine.chain)
    with Session(direct=False) as session:
        disk = session.open(chain, read_only=True)
        found = [(each.start, each.length) for each in map_chain(disk.chain.layers) if not each.is_zeros]
    assert [(1 << 20, 1 << 20)] == found


_SLOW_WRITE = """\
data=$tmpdir/data.$$
cat >"$data"
if mkdir "$tmpdir/first" 2>/dev/null; then
    : >{begun}
    while [ ! -e {go} ]; do sleep 0.05; done
fi
dd if="$data" of={image} oflag=seek_bytes seek="$4" conv=notrunc status=none
"""


@pytest.mark.parametrize(
    ("threads", "is_ended_in_between"),
    [(16, False), (1, False), (1, True)],
    ids=["as-by-default", "one", "one-behind-what-ends-connections"],
)
def test_when_the_end_of_a_connection_proves_something(
    tmp_path: Path, threads: int, *, is_ended_in_between: bool
) -> None:
    """If a connection ends inside a request, nbdkit closes it at once, although another thread may still be writing.
    With one thread, there is no other. An end that something between the hosts has made proves nothing.

    So with `drain=0s` a late write of a dead worker can land, unless nbdkit has only one thread and is connected to
    directly.
    """
    proves = threads == 1 and not is_ended_in_between
    image, begun, go = (tmp_path / name for name in ("image", "begun", "go"))
    image.write_bytes(bytes(SIZE))
    slow_write = _SLOW_WRITE.format(begun=begun, go=go, image=image)
    script = [
        "thread_model=echo parallel", f"get_size=echo {SIZE}", "can_write=exit 0", "can_flush=exit 0", "flush=exit 0",
        f"pread=dd if={image} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none", f"pwrite={slow_write}",
    ]  # fmt: skip
    a, b = b"A" * PAGE, b"B" * PAGE
    with (
        Engine("nbdkit", tmp_path, SIZE, [f"--threads={threads}", "eval", *script]) as engine,
        Link(tmp_path / "link", engine.socket) as link,
        Driven(tmp_path) as driven,
    ):
        chain = engine.chain.replace(str(engine.socket), str(link.path))
        driven.connect(chain)
        driven.begin_write(a)
        until(begun.exists)
        driven.worker.process.kill()
        driven.worker.process.wait()
        [fd] = driven.worker.openers.connections.values()
        with socket.socket(fileno=os.dup(fd)) as dead:  # the beginning of the worker's next write
            dead.sendall(REQUEST.pack(REQUEST_MAGIC, 0, CMD_WRITE, 99, 1 << 20, PAGE) + bytes(100))
        if is_ended_in_between:
            link.fail(Fault.HALF, Random(1))
        driven.start_successor()
        opening = threading.Thread(target=driven.open, args=[chain])
        opening.start()
        if proves:
            opening.join(1.0)
            assert opening.is_alive(), "it has not waited"
            go.touch()
        opening.join(20)
        assert not opening.is_alive()
        driven.worker.tell(messages.Serve, None)
        assert not driven.worker.expect_standing(Stage.SERVING).failure
        driven.frontend.drain()  # if two writes to one place are in flight, either may be done last
        driven.frontend.write(0, b)
        driven.frontend.flush()
        assert b == image.read_bytes()[:PAGE]
        go.touch()
        if not proves:
            until(lambda: a == image.read_bytes()[:PAGE])
