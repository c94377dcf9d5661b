"""The targets of measurements behind one small interface: our chains, installed peers, and fio on the file itself.

Must not order or repeat measurements: `session.py` does.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from xenbackend.bench import calls
from xenbackend.bench.blkif import PAGES, BlkifLoop
from xenbackend.bench.blkif_native import NativeBlkifLoop
from xenbackend.bench.fio import Fio
from xenbackend.bench.loop import ClosedLoop
from xenbackend.bench.native import Native
from xenbackend.bench.nbd import NbdLoop
from xenbackend.bench.plan import Sample, Work, percentiles, places
from xenbackend.bench.ring_server import RingServer
from xenbackend.bench.server import Server
from xenbackend.bench.virtqueue import VirtqueueLoop
from xenbackend.bench.worker import Worker
from xenbackend.kernel.fence import find_fence
from xenbackend.rig.guest import Guest


class Target(Protocol):
    """Something to measure. `client` is the language of its load generator, empty if it generates its own load."""

    name: str
    client: str

    def measure(self, work: Work, seconds: float, warm_up: float) -> Sample:
        """Run one workload for `seconds` after `warm_up` seconds. Raises: BenchError."""

    def count_calls(self, work: Work, seconds: float, directory: Path) -> float | None:
        """Return the system calls per request of one workload, None if they cannot be told from the load generator's.

        Nothing is timed meanwhile. Raises: BenchError; Uncountable if no tool can count them.
        """

    def close(self) -> None:
        """End all processes and guests that were started for it."""


@dataclass(frozen=True, slots=True)
class Bed:
    """Where targets run: the bench file, a directory for sockets and logs, and the backend's CPU or None.

    `image` is the format of the file, as QEMU calls it.
    """

    file: Path
    directory: Path
    direct: bool
    backend_cpu: int | None
    poll_ns: int  # how long a load generator polls before it sleeps
    native: Native
    loops_time: Callable[[], float] | None = None  # the CPU time of the loops beside the targets, if any
    image: str = "raw"
    label: str = ""  # suffix of the sockets' names, if targets with the same name run at the same time


class Served:
    """A backend process and the load generator that is connected to it."""

    def __init__(
        self,
        bed: Bed,
        server: Server,
        loop: ClosedLoop,
        close: Callable[[], None],
        rested_s: Callable[[], float] | None = None,
    ) -> None:
        """Measure `server` by `loop`. `rested_s` returns for how long a worker of ours has not polled for requests."""
        self.name = loop.name
        self.client = "C" if isinstance(loop, NativeBlkifLoop) else "Python"
        self._loops_time = bed.loops_time
        self._server = server
        self._loop = loop
        self._rested_s = rested_s
        self.close = close

    def measure(self, work: Work, seconds: float, warm_up: float) -> Sample:
        """Run the closed loop: warm up, measure, drain."""
        loop = self._loop
        begin, rested = time.monotonic(), self._rested_s and self._rested_s()
        loop.start(work, places(work, loop.size))
        loop.run(warm_up)
        before, loops = self._server.cpu_time(), self._loops_time and self._loops_time()
        window = loop.run(seconds)
        used = self._server.cpu_time() - before
        if self._loops_time and loops is not None:
            loops = (self._loops_time() - loops) / window.seconds
        loop.drain(work)
        if self._rested_s and rested is not None:
            rested = (self._rested_s() - rested) / (time.monotonic() - begin)
        latencies = percentiles(window.latencies)
        return Sample(window.requests, window.seconds, used, window.busy, *latencies, rested, loops)

    def count_calls(self, work: Work, seconds: float, directory: Path) -> float:
        """Run the closed loop while a tool counts, from the first request to the last."""
        loop = self._loop
        counting = calls.begin(self._server.pid, directory)
        try:
            loop.start(work, places(work, loop.size))
            window = loop.run(seconds)
            loop.drain(work)
        finally:
            count = counting.end()
        return count / (window.requests + work.depth)


def chain_target(
    bed: Bed,
    chain: str,
    domid: int,
    *,
    name: str,
    read_only: bool,
    verify: bool,
    persistent: bool,
    never_looks: bool = False,
) -> Served:
    """Open a chain in a worker of ours, on the rig in `bed.directory`. Raises: BenchError, KernelError."""
    stack = ExitStack()
    try:
        guest = Guest(bed.directory, domid, PAGES)
        stack.callback(guest.close)
        worker = Worker(chain, bed.directory, domid, read_only=read_only, cpu=bed.backend_cpu, never_looks=never_looks)
        stack.callback(worker.close)
        loop = _ring_loop(bed, name, guest, persistent=persistent, verify=verify)
        loop.size = worker.size
        worker.connect(loop.parameters())
    except BaseException:
        stack.close()
        raise
    return Served(bed, worker.server, loop, stack.close, worker.rested_s)


def limit_target(bed: Bed, domid: int, *, persistent: bool) -> Served:
    """Start the ring server in C, which must have been built, for a new guest. Raises: BenchError, KernelError."""
    assert bed.native.ring_server is not None  # noqa: S101 - the caller has checked it
    stack = ExitStack()
    try:
        guest = Guest(bed.directory, domid, PAGES)
        stack.callback(guest.close)
        loop = _ring_loop(bed, "C limit", guest, persistent=persistent, verify=True)
        loop.size = bed.file.stat().st_size
        limit = RingServer(
            bed.native.ring_server,
            bed.directory,
            domid,
            loop.parameters(),
            bed.file,
            direct=bed.direct,
            cpu=bed.backend_cpu,
        )
        stack.callback(limit.close)
    except BaseException:
        stack.close()
        raise
    return Served(bed, limit.server, loop, stack.close)


def _ring_loop(bed: Bed, name: str, guest: Guest, *, persistent: bool, verify: bool) -> BlkifLoop:
    """Return the load generator for a blkif ring: the one in C if it was built. A session uses only one of them."""
    fence = find_fence()[0]
    library = bed.native.loop
    if library is None:
        loop = BlkifLoop(name, guest, fence, persistent=persistent, verify=verify)
    else:
        loop = NativeBlkifLoop(name, guest, fence, persistent=persistent, verify=verify, library=library)
    loop.poll_ns = bed.poll_ns
    return loop


def _serve(bed: Bed, name: str, arguments: list[str], connect: Callable[[str], ClosedLoop]) -> Served:
    """Start a peer, with the path of its socket for `{socket}` in `arguments`, and connect to it."""
    path = str(bed.directory / f"{name.replace(' ', '-')}{bed.label}.socket")
    filled = [argument.replace("{socket}", path) for argument in arguments]
    server = Server(name, filled, Path(path).with_suffix(".log"), cpu=bed.backend_cpu)
    stack = ExitStack()
    stack.callback(server.close)
    try:
        loop = server.connect(lambda: connect(path))
    except BaseException:
        stack.close()
        raise
    stack.callback(loop.close)
    loop.poll_ns = bed.poll_ns
    return Served(bed, server, loop, stack.close)


def _nbdkit(bed: Bed) -> Target:
    return _serve(bed, "nbdkit", _nbdkit_command(bed), lambda path: NbdLoop("nbdkit", path))


def _nbdkit_log(bed: Bed) -> Target:
    # Its log goes to /dev/null: a line per request would fill a disk, and the disk would be measured.
    arguments = [*_nbdkit_command(bed, "--filter=log"), "logfile=/dev/null"]
    return _serve(bed, "nbdkit log", arguments, lambda path: NbdLoop("nbdkit log", path))


def _nbdkit_command(bed: Bed, *filters: str) -> list[str]:
    return ["nbdkit", "--foreground", "--unix", "{socket}", *filters, "file", str(bed.file)]


def _qemu_ring(bed: Bed) -> Target:
    export = "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={socket},writable=on"
    arguments = [*_qemu_command(bed), "--export", export]
    return _serve(
        bed, "qemu vhost-user", arguments, lambda path: VirtqueueLoop("qemu vhost-user", path, find_fence()[0])
    )


def _qemu_nbd(bed: Bed) -> Target:
    arguments = [*_qemu_command(bed), "--nbd-server", "addr.type=unix,addr.path={socket}"]
    arguments += ["--export", "type=nbd,id=e,node-name=n,name=bench,writable=on"]
    return _serve(bed, "qemu nbd", arguments, lambda path: NbdLoop("qemu nbd", path, "bench"))


def _qemu_command(bed: Bed) -> list[str]:
    # Several of its processes have the file open at the same time, so its locks are off.
    cache = "on" if bed.direct else "off"
    file = str(bed.file).replace(",", ",,")
    below = "n" if bed.image == "raw" else "f"
    node = f"driver=file,node-name={below},filename={file},aio=io_uring,cache.direct={cache},locking=off"
    command = ["qemu-storage-daemon", "--blockdev", node]
    if bed.image != "raw":
        command += ["--blockdev", f"driver={bed.image},node-name=n,file=f,cache.direct={cache}"]
    return command


def _fio(bed: Bed) -> Target:
    name = "fio io_uring" if bed.direct else "fio psync"
    return Fio(name, bed.file, direct=bed.direct, cpu=bed.backend_cpu)


@dataclass(frozen=True, slots=True)
class Peer:
    """A program to compare with. `direct`: it can use O_DIRECT. `image`: it can serve other formats than raw."""

    program: str
    start: Callable[[Bed], Target]
    direct: bool
    image: bool = False


PEERS = {
    "nbdkit": Peer("nbdkit", _nbdkit, direct=False),
    "nbdkit-log": Peer("nbdkit", _nbdkit_log, direct=False),
    "qemu-vhost-user": Peer("qemu-storage-daemon", _qemu_ring, direct=True, image=True),
    "qemu-nbd": Peer("qemu-storage-daemon", _qemu_nbd, direct=True),
    "fio": Peer("fio", _fio, direct=True),
}


def peers(*, direct: bool, image: bool = False) -> list[Peer]:
    """Return the installed peers that can do what is wanted: O_DIRECT (`direct`), formats other than raw (`image`)."""
    able = [peer for peer in PEERS.values() if (peer.direct or not direct) and (peer.image or not image)]
    return [peer for peer in able if shutil.which(peer.program)]
