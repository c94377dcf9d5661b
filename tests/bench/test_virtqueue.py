"""The vhost-user handshake and the virtqueue load generator, against qemu-storage-daemon."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct

import pytest

from xenbackend.bench.plan import SMALLEST, WORKS, BenchError, places, select_works
from xenbackend.bench.server import Server
from xenbackend.bench.session import bench_file
from xenbackend.bench.vhost_user import VhostUser
from xenbackend.bench.virtqueue import VirtqueueLoop
from xenbackend.kernel.fence import find_fence
from xenbackend.units import SECTOR

READ = next(work for work in WORKS if work.name == "rr4k")
needs_qemu = pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="QEMU is not installed")


@contextmanager
def exported(tmp_path: Path, poll_ns: int) -> Iterator[VirtqueueLoop]:
    """Run QEMU as the server of `tmp_path`/file while the block lasts."""
    path = str(tmp_path / "socket")
    node = f"driver=file,node-name=n,filename={tmp_path / 'file'},aio=threads,cache.direct=off"
    export = f"type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={path},writable=on"
    arguments = ["qemu-storage-daemon", "--blockdev", node, "--export", export]
    server = Server("qemu", arguments, tmp_path / "log", cpu=None)
    loop = server.connect(lambda: VirtqueueLoop("qemu", path, find_fence()[0]))
    loop.poll_ns = poll_ns
    try:
        yield loop
    finally:
        loop.close()
        server.close()


@needs_qemu
@pytest.mark.slow
@pytest.mark.parametrize("poll_ns", [0, 10**9], ids=["asleep", "looking"])
def test_every_workload(tmp_path: Path, poll_ns: int) -> None:
    """Reads bring their stamps, writes leave them in the file, whether the generator sleeps or polls."""
    with bench_file(tmp_path / "file", SMALLEST), exported(tmp_path, poll_ns) as loop:
        assert SMALLEST == loop.size

        os.truncate(tmp_path / "file", SMALLEST // 2)  # stamps made before would not prove a write
        os.truncate(tmp_path / "file", SMALLEST)
        works = select_works([], read_only=False)
        for work in works:
            loop.start(work, places(work, loop.size))

            assert loop.run(0.02).requests > 0

            loop.drain(work)
        with (tmp_path / "file").open("rb") as file:
            for place in places(works[-1], SMALLEST):
                assert place.to_bytes(8, "little") == os.pread(file.fileno(), 8, place * SECTOR)


@needs_qemu
def test_wrong_data_ends_the_measurement(tmp_path: Path) -> None:
    """On a disk without stamps the first answer is an error."""
    with (tmp_path / "file").open("wb") as file:
        file.truncate(SMALLEST)
    with exported(tmp_path, 10**9) as loop:
        loop.start(READ, [8, 16] * 16)
        with pytest.raises(BenchError, match=r"qemu answered a read of sector \d+ with the data of sector 0"):
            loop.run(1)


@needs_qemu
def test_an_error_ends_the_measurement(tmp_path: Path) -> None:
    """A request beyond the end of the disk is answered with a status, which ends the measurement."""
    with bench_file(tmp_path / "file", SMALLEST), exported(tmp_path, 10**9) as loop:
        loop.start(READ, [SMALLEST // SECTOR])
        with pytest.raises(BenchError, match="answered a request with status 1"):
            loop.run(1)


def test_a_backend_without_what_we_need_is_refused(tmp_path: Path) -> None:
    """A vhost-user backend without event indices is refused before any memory is shared."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(12)
                connection.sendall(Struct("=IIIQ").pack(1, 1 | 4, 8, 1 << 32 | 1 << 30))

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(BenchError, match="offers features 0x140000000 and lacks some of"):
            VhostUser(path)
        thread.join()
