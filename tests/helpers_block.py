"""What the tests of chains and drivers share: a real worker's surroundings, requests, and drivers with parents."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from xenbackend.block.chain import Chain, open_chain, parse_chain
from xenbackend.block.driver import Driver, Env, Filter, Geometry, ParentRef
from xenbackend.block.length import SIZE as LENGTHS_SIZE
from xenbackend.block.length import Lengths
from xenbackend.block.options import Duration, FilePath, Kind, option
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.block.servers import Endpoint
from xenbackend.errors import DriverError
from xenbackend.loop.reactor import Reactor
from xenbackend.opener.local import LocalOpener
from xenbackend.worker.env import EnvFactory
from xenbackend.worker.files import HostFiles

SIZE = 1 << 20


class Machine:
    """A worker without a guest: opens chains on real files, and runs its loop until requests are back.

    `parents` are the places that the settings of its host allow: by default images may lead to any file, since most
    tests are not about that. `scratch` is the directory of unnamed files.
    """

    def __init__(self, parents: Sequence[str] = ("/",), scratch: str = "/dev/shm") -> None:
        self.reactor = Reactor()
        self.files = HostFiles(self.reactor, opener=LocalOpener(lambda: parents, scratch=lambda: scratch))
        self.reactor.before_sleep(self.files.kick)
        self.make_env = EnvFactory(self.reactor, self.files, serves=True)
        self.slept: list[float] = []

    def open(self, text: str, *, read_only: bool = False, checked: bool = True, shareable: bool = False) -> Chain:
        """Open a chain, with the asserting layer unless told otherwise."""
        self.make_env.begin()
        return open_chain(
            parse_chain(text),
            self.make_env,
            read_only=read_only,
            shareable=shareable,
            checked=checked,
            sleep=self.slept.append,
        )

    def do(self, chain: Chain, *batch: Request) -> list[int]:
        """Submit one batch and return the status of each request in it, in its order."""
        waiting = set(batch)

        def take(done: list[Request]) -> None:
            waiting.difference_update(done)
            if not waiting:
                self.reactor.stop()

        chain.complete = take
        chain.submit(list(batch))
        if waiting:
            self.reactor.run()
        return [request.status for request in batch]

    def everything(self, chain: Chain) -> bytes:
        """Return what a disk holds."""
        request = read(0, chain.geometry.size)
        assert [0] == self.do(chain, request)
        return content(request)

    def contents(self, text: str) -> bytes:
        """Return what the disk of a chain holds; the chain is opened only for this."""
        chain = self.open(text, read_only=True)
        found = self.everything(chain)
        chain.close()
        return found

    def close(self) -> None:
        """Release everything."""
        self.files.close()
        self.reactor.close()
        self.make_env.close()


def read(offset: int, *lengths: int) -> Request:
    """Return a read into one buffer per length; the buffers are not zero before."""
    request = Request()
    request.op, request.offset, request.length = Op.READ, offset, sum(lengths)
    request.iov = [memoryview(bytearray(b"\xee" * length)) for length in lengths]
    return request


def write(offset: int, *pieces: bytes) -> Request:
    """Return a write from one buffer per piece."""
    request = read(offset, *map(len, pieces))
    request.op = Op.WRITE
    for view, piece in zip(request.iov, pieces, strict=True):
        view[:] = piece
    return request


def flush() -> Request:
    """Return a flush."""
    request = Request()
    request.op = Op.FLUSH
    return request


def discard(offset: int, length: int) -> Request:
    """Return a discard."""
    request = Request()
    request.op, request.offset, request.length = Op.DISCARD, offset, length
    return request


def again(request: Request) -> Request:
    """Return a request that came back, ready to be submitted once more."""
    request.status = PENDING
    return request


def content(request: Request) -> bytes:
    """Return the bytes that a request holds."""
    return b"".join(request.iov)


def image(path: Path, size: int = SIZE) -> Path:
    """Make an image of zeros."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


@dataclass
class StepEnv:
    """An `Env` whose clock moves only when the test says so."""

    read_only: bool = False
    shareable: bool = False
    resumes: bool = False
    continues: bool = False
    serves: bool = True
    is_check: bool = False
    is_draft: bool = False
    files: Any = field(default_factory=LocalOpener)
    facts: dict[str, str] = field(default_factory=dict)
    timers: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    memories: dict[str, bytearray] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)

    def now(self) -> float:
        """See `Env`."""
        return 0.0

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        """Keep the timer for `ring`."""
        self.timers.append((delay_s, function))

    def run_in_thread(self, function: Callable[[], None], then: Callable[[], None]) -> None:
        """Do it at once."""
        function()
        then()

    def wait_for(self, is_done: Callable[[], bool]) -> None:
        """Let timers go off until it is done."""
        while not is_done():
            assert self.timers, "nothing will ever happen"
            self.ring()

    def memory(self, name: str, size: int) -> memoryview:
        """Return what was written under this name before."""
        if len(self.memories.get(name, b"")) != size:
            self.memories[name] = bytearray(size)
        return memoryview(self.memories[name])

    def lengths(self) -> Lengths:
        """See `Env`."""
        return Lengths(self.memory("lengths", LENGTHS_SIZE))

    def report(self, key: str, value: str) -> None:
        """See `Env`."""
        self.facts[key] = value

    def alarm(self, sentence: str) -> None:
        """See `Env`."""
        self.alarms.append(sentence)

    def ring(self) -> None:
        """Make every waiting timer go off, the soonest first."""
        due, self.timers = sorted(self.timers, key=lambda timer: timer[0]), []
        for _, function in due:
            function()


class Bottom(Driver):
    """A source that keeps what it is given until the test gives it back."""

    name = "bottom"

    def __init__(self) -> None:
        super().__init__(None)
        self.batches: list[list[Request]] = []

    def submit(self, batch: list[Request]) -> None:
        """Take the batch."""
        self.batches.append(list(batch))


EVENTS: list[str] = []  # what the drivers below did, in order; a test clears it before


class Child(Driver):
    """A source whose file names its parent: the file's content is the parent's layer text, or nothing."""

    name = "child"
    always_read_only = False

    @dataclass(frozen=True, slots=True)
    class Options:
        """See the class."""

        file: FilePath = option("the image", target=True)
        refuse: bool = option("refuse every parent", default=False)

    def open(self, env: Env) -> Geometry:
        """Answer as the options say."""
        EVENTS.append(f"open {self.options.file} {env.read_only} {env.shareable}")
        text = Path(self.options.file).read_text()
        self.parent = ParentRef(text) if text else None
        return Geometry(size=SIZE, read_only=env.read_only or self.always_read_only)

    def check_parent(self, parent: Geometry) -> None:
        """Look at the parent, and refuse it if the options say so."""
        EVENTS.append(f"check {parent.size} {self.below == parent}")
        if self.options.refuse:
            raise DriverError("does not like it")

    def submit(self, batch: list[Request]) -> None:
        """Take the batch."""
        assert self.next is not None
        self.next.submit(batch)

    def close(self) -> None:
        """Remember it."""
        EVENTS.append(f"close {self.options.file}")


class Clumsy(Filter):
    """A filter that fails at the point that its options name."""

    name = "clumsy"
    is_transparent = True

    @dataclass(frozen=True, slots=True)
    class Options:
        """See the class."""

        at: str = option("open, oserror, eio, submit, complete, close, parent, watch or nothing", default="")
        times: int = option("how often", default=1000)

    failures = 0

    def open(self, env: Env) -> Geometry:
        """Answer as the options say."""
        EVENTS.append("open clumsy")
        geometry = super().open(env)
        match self.options.at:
            case "open":
                raise KeyError("x")
            case "oserror":
                raise OSError(errno.ENXIO, "no such thing")
            case "eio" if Clumsy.failures < self.options.times:
                Clumsy.failures += 1
                raise OSError(errno.EIO, "not yet")
            case "parent":
                self.parent = ParentRef("null:")
            case "watch":
                self._bell = os.eventfd(0, os.EFD_CLOEXEC)  # it stays readable once it was rung
                env.watch(self._bell, self._fail)
        return geometry

    def submit(self, batch: list[Request]) -> None:
        """Take the batch."""
        if self.options.at == "submit":
            raise KeyError("submit")
        super().submit(batch)

    def on_complete(self, batch: list[Request]) -> None:
        """Give the batch back."""
        if self.options.at == "complete":
            raise KeyError("complete")
        self.complete(batch)

    def _fail(self) -> None:
        raise KeyError("watch")

    def control(self, verb: str, arguments: Sequence[str]) -> bytes:
        """Fail, or answer with so many bytes."""
        if verb == "ring":
            os.eventfd_write(self._bell, 1)
            return b""
        if verb == "bytes":
            return bytes(int(arguments[0]))
        return super().control(verb, arguments)

    def close(self) -> None:
        """Remember it."""
        EVENTS.append("close clumsy")
        if self.options.at == "close":
            raise OSError(errno.EIO, "close")


class Lingering(Filter):
    """A filter that lets the loop run while it closes, as a cache does until its last requests are back."""

    name = "lingering"
    is_transparent = True

    @dataclass(frozen=True, slots=True)
    class Options:
        """See the class."""

        close: Duration = option("how long it takes", default=0.2)  # longer than a message that was sent before

    def close(self) -> None:
        """Wait."""
        over: list[bool] = []
        self.env.call_later(self.options.close, lambda: over.append(True))
        self.env.wait_for(lambda: bool(over))


class Silent(Filter):
    """The empty filter."""

    name = "silent"
    is_transparent = True


class Busy(Filter):
    """A filter that has requests of its own from the moment when it is open."""

    name = "busy"
    is_transparent = True

    def open(self, env: Env) -> Geometry:
        """Look at the layer below, and answer for it."""
        self.own: list[Request] = []
        self.back: list[Request] = []
        self.look(0, 512)
        return super().open(env)

    def ask(self) -> None:
        """Send a request of its own to the layer below."""
        assert self.next is not None
        self.own.append(flush())
        self.next.submit(self.own[-1:])

    def on_complete(self, batch: list[Request]) -> None:
        """Keep what is its own."""
        self.back += [each for each in batch if each in self.own]
        if others := [each for each in batch if each not in self.own]:
            self.complete(others)


class Coarse(Filter):
    """A filter that shows sectors of 4096 bytes."""

    name = "coarse"
    is_transparent = True

    def open(self, env: Env) -> Geometry:
        """Answer for the layer below."""
        return replace(super().open(env), sector_size=4096)


@dataclass(frozen=True, slots=True)
class Named:
    """The server that the text of an option names."""

    endpoint: Endpoint


def _named(path: str) -> Named:
    return Named(Endpoint(path=path))


class Served(Driver):
    """A source whose disk is on a server."""

    name = "served"

    @dataclass(frozen=True, slots=True)
    class Options:
        """See the class."""

        server: Annotated[Named, Kind("server", _named)] = option("a path", target=True)


TEST_DRIVERS = {
    "child": "tests.helpers_block:Child",
    "busy": "tests.helpers_block:Busy",
    "clumsy": "tests.helpers_block:Clumsy",
    "coarse": "tests.helpers_block:Coarse",
    "lingering": "tests.helpers_block:Lingering",
    "served": "tests.helpers_block:Served",
    "silent": "tests.helpers_block:Silent",
}
