"""A worker's NBD export, used by common clients, and the moment when the guest's own driver takes over."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from struct import pack

import pytest

from tests.driven import Driven
from tests.exported import GO, HANDSHAKE
from xenbackend.nbd.abi import CMD_FLUSH, CMD_READ, CMD_WRITE, REPLY, REQUEST, REQUEST_MAGIC
from xenbackend.protocol import messages
from xenbackend.protocol.messages import Stage
from xenbackend.rig.frontend import Wishes

pytestmark = pytest.mark.slow  # each starts a process
SIZE = 16 << 20
PAGE = 4096


def needs(*tools: str) -> pytest.MarkDecorator:
    """Skip a test if one of the tools is missing."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


class Booting:
    """A worker that exports its disk, as for a guest whose own driver has not started yet."""

    def __init__(self, directory: Path, driven: Driven) -> None:
        self.directory = directory
        self.driven = driven
        self.path = directory / "nbd" / "5-51712.sock"
        self.url = f"nbd+unix:///?socket={self.path}"
        self.image = directory / "disk.img"
        self.clients: list[socket.socket] = []
        self.content = Random(1).randbytes(1 << 20) * (SIZE >> 20)

    def open(self, chain: str = "", *, read_only: bool = False) -> messages.Standing:
        """Open a chain, by default one on an image of random bytes, and export it."""
        if not chain:
            self.image.write_bytes(self.content)
            chain = f"log:|aio:{self.image}"
        return self.driven.open(chain, read_only=read_only, export=str(self.path))

    def run(self, *command: str) -> str:
        """Run a tool, which must succeed, and return its output."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def client(self) -> socket.socket:
        """Return a connection after its handshake."""
        connection = socket.socket(socket.AF_UNIX)
        self.clients.append(connection)
        connection.connect(str(self.path))
        connection.sendall(GO)
        connection.recv(HANDSHAKE, socket.MSG_WAITALL)
        return connection


@pytest.fixture
def booting(tmp_path: Path) -> Iterator[Booting]:
    """A worker with a disk and no frontend; it ends in order, and must log nothing that an administrator must read."""
    with Driven(tmp_path, drivers={"clumsy": "tests.helpers_block:Clumsy"}) as driven:
        booting = Booting(tmp_path, driven)
        yield booting
        for client in booting.clients:
            client.close()
        driven.worker.end()


def ask(client: socket.socket, kind: int, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
    """Send a request."""
    client.sendall(REQUEST.pack(REQUEST_MAGIC, 0, kind, offset, offset, length) + data)


def reply(client: socket.socket) -> tuple[int, int] | None:
    """Return error and cookie of the next reply, or None if the server has hung up."""
    try:
        head = client.recv(REPLY.size, socket.MSG_WAITALL)
    except ConnectionResetError:  # the server left data unread
        head = b""
    return REPLY.unpack(head)[1:] if len(head) == REPLY.size else None


@needs("nbdinfo")
def test_nbdinfo_sees_what_is_offered(booting: Booting) -> None:
    """Libnbd reads size, flags and block sizes without a warning."""
    booting.open()
    said = booting.run("nbdinfo", booting.url)

    for fact in (f"export-size: {SIZE}", "can_flush: true", "can_fua: true", "can_trim: true", "is_read_only: false"):
        assert fact in said
    for fact in ("block_size_minimum: 512", "block_size_preferred: 4096", "block_size_maximum: 33554432"):
        assert fact in said
    assert 'export=""' in booting.run("nbdinfo", "--list", booting.url)


@needs("nbdcopy", "qemu-img")
def test_disk_is_copied_whole(booting: Booting) -> None:
    """Copies made by libnbd over several connections and by QEMU equal the image byte for byte."""
    booting.open()
    copy = booting.directory / "copy"
    booting.run("nbdcopy", booting.url, str(copy))
    booting.run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(copy), booting.url)

    assert booting.content == copy.read_bytes()


@needs("qemu-img")
def test_disk_is_written_whole(booting: Booting) -> None:
    """An image that QEMU writes into the disk is in the file once the worker has ended."""
    booting.open()
    source = booting.directory / "source"
    source.write_bytes(booting.content[::-1])
    booting.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), booting.url)
    booting.driven.worker.close()

    assert source.read_bytes() == booting.image.read_bytes()
    booting.driven.start_successor()


@needs("qemu-io")
def test_every_command_of_qemu_io(booting: Booting) -> None:
    """Reads, writes, FUA, flushes and discards at odd offsets and sizes have their effects."""
    booting.open()
    commands = ["write -P 7 4096 3M", "write -f -P 8 512 512", "flush", "discard 4M 1M", "read -P 8 512 512"]
    commands += ["read -P 7 4096 3M", "read -P 0 4M 1M", "aio_write -P 9 8M 64k", "aio_flush", "read -P 9 8M 64k"]
    commands += ["write -P 5 100 1000", "read -P 5 100 1000"]  # QEMU aligns them to our blocks
    arguments = [word for command in commands for word in ("-c", command)]

    said = booting.run("qemu-io", "-f", "raw", *arguments, booting.url)

    assert "fail" not in said
    assert 5 == said.count("read ")


@needs("qemu-img", "qemu-io")
def test_a_file_that_ends_inside_a_sector(booting: Booting) -> None:
    """If a file ends inside a sector, clients read that sector whole, filled with zeros."""
    booting.image.write_bytes(booting.content[:-100])
    booting.open(f"aio:{booting.image}", read_only=True)
    booting.run("qemu-io", "-r", "-f", "raw", "-c", f"read -P 0 {SIZE - 100} 100", booting.url)
    copy = booting.directory / "copy"
    booting.run("qemu-img", "convert", "-f", "raw", "-O", "raw", booting.url, str(copy))

    assert booting.content[:-100] + bytes(100) == copy.read_bytes()


@needs("qemu-io")
def test_disk_that_is_only_read(booting: Booting) -> None:
    """The export says that it is read-only, so a client that wants to write is refused; one that reads is served."""
    booting.image.write_bytes(booting.content)
    booting.open(f"aio:{booting.image}", read_only=True)
    booting.run("qemu-io", "-r", "-f", "raw", "-c", "read 0 1M", booting.url)
    refused = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", booting.url], capture_output=True, text=True, check=False
    )

    assert refused.returncode
    assert booting.content == booting.image.read_bytes()


@needs("fio")
def test_fio_finds_no_fault(booting: Booting) -> None:
    """Random writes, many in flight and by two clients at once, are read back and verified without a fault."""
    booting.open()
    job = [
        "fio",
        "--ioengine=nbd",
        f"--uri={booting.url}",
        "--rw=randwrite",
        "--verify=crc32c",
        "--iodepth=32",
        "--verify_state_save=0",
    ]
    job += ["--size=4M", "--bsrange=512-64k", "--blockalign=512", "--name=one", "--name=two", "--offset=8M"]

    assert "err= 0" in booting.run(*job)


@needs("qemu-system-x86_64")
def test_seabios_boots_from_it(booting: Booting) -> None:
    """A PC's firmware boots the first sector from an emulated IDE disk; the program there prints another sector."""
    program = bytes.fromhex(
        "fa31c08ed88ec08ed0bc007c"  # no interrupts; all segments 0, the stack below us
        "be247cb442cd13"  # int 13h, ah = 42h: read by the packet at the end, from the drive in dl
        "be0080ac84c07406baf803eeebf5"  # each character there, up to a zero, to the first serial port
        "f4ebfd"  # halt
    ) + pack("<BBHHHQ", 16, 0, 1, 0x8000, 0, 100)  # one sector, number 100, to 8000h
    disk = bytearray(SIZE)
    disk[:512] = program.ljust(510, b"\0") + b"\x55\xaa"
    disk[51200:51232] = b"booted from sector 100\r\n\0".ljust(32, b"\0")
    booting.content = bytes(disk)
    booting.open()
    command = ["timeout", "60", "qemu-system-x86_64", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"]
    command += ["-serial", "stdio", "-drive", f"file={booting.url},format=raw,if=ide"]
    machine = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert machine.stdout is not None
    said = machine.stdout.readline()
    machine.terminate()  # `timeout` passes it on
    machine.communicate()

    assert b"booted from sector 100\r\n" == said


def test_guests_driver_takes_over(booting: Booting) -> None:
    """Once a ring is connected the export has ended: the ring reads what was written by it, and its socket is gone."""
    opened = booting.open("ram:1M")
    client = booting.client()
    ask(client, CMD_WRITE, 4096, PAGE, b"e" * PAGE)
    reply(client)
    frontend = booting.driven.attach(Wishes())

    assert str(booting.path) == opened.export
    assert b"e" * PAGE == frontend.read(8, 8)
    assert b"" == client.recv(1)
    assert not booting.driven.worker.stand().export  # so the service removes the socket
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(booting.path))
    booting.driven.reconnect()
    assert not booting.driven.worker.stand().export


@pytest.mark.parametrize("told", [None, messages.Leave, messages.Close])
def test_take_over_answers_what_is_in_flight(booting: Booting, told: type[messages.Order] | None) -> None:
    """Requests in the chain are answered before the ring is served, or before the worker leaves the export."""
    booting.open("delay:write=200ms|ram:1M")
    client = booting.client()
    ask(client, CMD_WRITE, 4096, PAGE, b"f" * PAGE)
    ask(client, CMD_WRITE, 8192, 2 * PAGE, b"half")
    ask_again = booting.client()  # the worker has read what was sent before this one's handshake was answered
    frontend = booting.driven.attach(Wishes()) if not told else None
    stages = []
    if told:
        booting.driven.worker.tell(told)
        ends = Stage.OPEN if told is messages.Leave else Stage.IDLE
        stages += [booting.driven.worker.expect_standing().stage, booting.driven.worker.expect_standing(ends).stage]

    assert (0, 4096) == reply(client)
    assert None is reply(client)
    assert None is reply(ask_again)
    if frontend:
        assert b"f" * PAGE + bytes(PAGE) == frontend.read(8, 16)
    if told:
        assert [Stage.LEAVING, ends] == stages
    if told is messages.Close:
        booting.driven.start_successor()


@pytest.mark.parametrize("chain", ["ram:16M", "image"])
def test_no_acknowledged_write_is_lost_over_the_take_over(booting: Booting, chain: str) -> None:
    """Clients write until the server hangs up: every write that was answered is on the disk afterwards."""
    booting.open("" if chain == "image" else chain)
    clients = [booting.client() for _ in range(3)]
    answered: list[int] = []
    places = iter(range(0, SIZE, PAGE))
    for _ in range(200):
        for client in clients:
            place = next(places)
            ask(client, CMD_WRITE, place, PAGE, pack("<Q", place) * (PAGE // 8))
    frontend = booting.driven.attach(Wishes())
    for client in clients:
        while (got := reply(client)) is not None:
            assert 0 == got[0]
            answered.append(got[1])
    found = [frontend.read(place // 512, 8) for place in answered]

    assert answered
    assert [pack("<Q", place) * (PAGE // 8) for place in answered] == found


def test_end_makes_durable(booting: Booting) -> None:
    """When the export ends the worker flushes what the device model wrote, and logs it if that fails."""
    booting.open("fault:op=flush|ram:1M")
    client = booting.client()
    ask(client, CMD_WRITE, 0, 512, b"g" * 512)
    reply(client)
    booting.driven.attach(Wishes())
    lines = [line.event for line in booting.driven.worker.lines]

    assert ["the last flush failed: Input/output error"] == lines


@pytest.mark.parametrize("at", ["submit", "complete"])
def test_layers_bug_under_the_export(booting: Booting, at: str) -> None:
    """D8: a layer's bug is answered with EIO, logged with the layer's name and counted; rings can be served later."""
    booting.open(f"clumsy:at={at}|ram:1M")
    client = booting.client()
    ask(client, CMD_WRITE, 0, 512, b"h" * 512)
    got = reply(client)
    booting.driven.attach(Wishes())
    lines = [line.event for line in booting.driven.worker.lines]

    assert (5, 0) == got
    assert "a bug in clumsy" in lines[0]
    booting.driven.worker.expect_counter("bugs", 1, at_least=True)


def spoil_directory(booting: Booting) -> None:
    """Put a file where the socket's directory would be."""
    booting.path.parent.write_text("a file")


def choose_long_path(booting: Booting) -> None:
    """Choose a path that no socket can have."""
    booting.path = booting.directory / ("x" * 120)


@pytest.mark.parametrize("spoil", [spoil_directory, choose_long_path])
def test_disk_without_its_export(booting: Booting, spoil: Callable[[Booting], None]) -> None:
    """If there can be no socket a line is logged, and the disk is still served to the guest's own driver."""
    spoil(booting)
    opened = booting.open("ram:1M")
    booting.driven.attach(Wishes()).write(0, b"i" * PAGE)
    lines = [line.event for line in booting.driven.worker.lines]

    assert "" == opened.export
    assert "device models cannot boot from this disk" in lines[0]


def test_flush_reaches_the_medium(booting: Booting) -> None:
    """A flush is answered with success once the layers have done it."""
    booting.open()
    client = booting.client()
    ask(client, CMD_FLUSH)
    ask(client, CMD_READ, 512, 512)
    got = [reply(client)]

    assert got[0] is not None
    assert 0 == got[0][0]
    assert booting.path.exists()
