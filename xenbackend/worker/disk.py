"""The disk of one worker: opens its chain, probes, exchanges, flushes and closes it.

Must not know a ring, nor speak to the supervisor: callers get a value or an exception.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from xenbackend.block.chain import Chain, open_chain, parse_chain
from xenbackend.block.driver import Geometry
from xenbackend.block.opening import OpenLayer, explained
from xenbackend.block.options import files_of
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.block.spec import only_read_from
from xenbackend.block.successor import keeps_content, shows_the_same
from xenbackend.errors import ConfigError, DriverError, XenbackendError
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import messages
from xenbackend.worker.env import Connections, EnvFactory, tell_nobody
from xenbackend.worker.facts import facts_of
from xenbackend.worker.files import HostFiles, Opener
from xenbackend.worker.opener import NoOpener
from xenbackend.worker.probe import probe, probing

LOCK_TIMEOUT_S = 5.0  # a predecessor's last writes hold the image's lock until they have landed


class ChainOpener(Opener, Protocol):
    """An opener that knows several chains: `worker.opener.RemoteOpener`."""

    def for_chain(self, chain: int) -> Opener:
        """Return the same opener for another chain of its job."""

    def make_memory(self, name: str, size: int) -> int:
        """Return the descriptor of a new memory of `size` bytes, which successors get. Raises: DriverError, OSError."""


class Disk:
    """The disk that the supervisor wants open. `text` is the text of its chain; `chain` is None until it is open."""

    def __init__(
        self,
        message: messages.Open,
        memories: Mapping[str, int],
        reactor: Reactor,
        drop: Callable[[str], None],
        on_bug: Callable[[Exception], None],
        connections: Connections | None = None,
        on_report: Callable[[], None] = tell_nobody,
        on_stopped: Callable[[str], None] = tell_nobody,
        give_up: Callable[[str], None] = tell_nobody,
        *,
        alarm: Callable[[str], None] = tell_nobody,
    ) -> None:
        """Open nothing yet. `memories` are descriptors by name, ours from now on; the rest is as for `EnvFactory`."""
        self.text = message.chain
        self.chain: Chain | None = None
        waits = message.may_wait  # for a lock: the caller tries again and again, and tells nobody meanwhile
        self.files = HostFiles(
            reactor,
            NoOpener(),
            lock_timeout_s=0.0 if waits else LOCK_TIMEOUT_S,
            names_users=not waits,
            disk=number_of(message.frontend_domid, message.vbd),
        )
        self.files.on_short = on_stopped
        self._opener: ChainOpener | None = None
        self._read_only, self._shareable = message.read_only, message.shareable
        self._reactor = reactor
        self._env = EnvFactory(
            reactor, self.files, memories, self._make_memory, drop, connections=connections,
            on_report=on_report, on_stopped=on_stopped, give_up=give_up, alarm=alarm, resumes=message.resumes,
            continues=message.resumes and not message.may_wait,  # else an earlier worker may have only probed
            serves=True,
        )  # fmt: skip
        self._on_bug = on_bug

    @property
    def layers(self) -> list[messages.LayerFacts]:
        """The facts of each layer of the open chain, top first."""
        return [facts_of(layer) for layer in self.chain.layers] if self.chain else []

    @contextmanager
    def opening_by(self, opener: ChainOpener) -> Iterator[None]:
        """Open files by `opener` in this context, and none afterwards. The second chain of its job is a successor."""
        self._opener = opener
        self.files.opener = opener
        try:
            yield
        finally:
            self._opener, self.files.opener = None, NoOpener()

    def open(self) -> Chain:
        """Open the chain. Raises: XenbackendError."""
        self.chain = self._open(self.text)
        self._env.drop_unwanted()
        return self.chain

    def probe(self) -> list[messages.LayerFacts]:
        """Return the layers of a chain that cannot be opened yet. Raises: XenbackendError."""
        return probe(self.text, self._reactor, self.files.opener, read_only=self._read_only)

    def check_successor(self, text: str, *, replaces: bool) -> list[str]:
        """Probe another chain while ours stays in service, and return its layers' texts.

        Raises: ConfigError, if it cannot be opened, a guest that uses ours could not use it, or, unless it `replaces`
        ours, it is over another image or shows that otherwise.
        """
        assert self.chain is not None  # noqa: S101 - the order of messages
        try:
            with probing(text, self._reactor, self._for_chain(1), read_only=self._read_only) as found:
                self._check(text, found.layers[0].geometry.size, found.layers[0].geometry.sector_size)
                if not replaces and not keeps_content(self.chain.layers, found.layers):
                    raise ConfigError(
                        f"{text} is over an image other than the one that the guest writes to, in {self.text}; if "
                        "both have the same content, add --replace"
                    )
                if not replaces and not shows_the_same(self.chain.layers, found.layers):
                    raise ConfigError(
                        f"{text} shows the image differently from {self.text}: a filter that changes what is read, "
                        "such as partition, must stay; if the guest should see something else, add --replace"
                    )
                with self._through(1):
                    first = only_read_from([layer.driver for layer in found.layers])
                    for place, layer in enumerate(found.layers):
                        self._check_free(layer, read_only=self._read_only or place >= first)
                return [layer.text for layer in found.layers]
        except ConfigError:
            raise
        except XenbackendError as problem:  # nothing was touched
            raise ConfigError(str(problem)) from problem

    def exchange(self, text: str) -> Chain:
        """Close the chain and open another one; if that fails, open the former one again.

        Call it with nothing in flight and the chain flushed.

        Raises: XenbackendError, if the former chain is open again; any other exception means that none is open.
        """
        with self.files.kept():  # only while the opener can be asked
            return self._exchange(text)

    def _exchange(self, text: str) -> Chain:
        assert self.chain is not None  # noqa: S101 - the order of messages
        former, self.chain = self.chain, None
        former.close()
        try:
            self.files.opener = self._for_chain(1)
            chain = self._open(text)
            try:
                self._check(text, chain.geometry.size, chain.geometry.sector_size, former.geometry)
            except XenbackendError:
                chain.close()
                raise
        except XenbackendError as problem:
            try:
                self.files.opener = self._for_chain(0)
                self.open()
            except XenbackendError as second:
                raise RuntimeError(
                    f"{problem}; after that the former chain could not be opened either: {second}"
                ) from second
            raise
        self.chain, self.text = chain, text
        self._env.drop_unwanted()  # not before: the former chain might have been opened again with them
        return chain

    def resume(self) -> None:
        """Resume the callbacks of layers that were stopped because they kept failing."""
        self._env.resume()

    def flush(self, done: Callable[..., None]) -> None:
        """Make every answered write durable, as a step (`loop.steps`) that ends with 0 or an errno.

        `complete` and `contain` of the chain are ours from now on.
        """
        assert self.chain is not None  # noqa: S101 - the order of messages
        chain = self.chain
        if chain.geometry.read_only or not chain.geometry.can_flush:
            done(0)
            return
        waiting = [done]

        def finish(code: int) -> None:
            if waiting:
                call = waiting.pop()
                self._reactor.call_soon(lambda: call(code))

        def flushed(batch: list[Request]) -> None:
            if request in batch:  # requests that a bug had ended may come back late (D8)
                finish(0 if request.status == errno.EOPNOTSUPP else request.status)

        def contain(bug: Exception, _given: object = ()) -> None:  # D8: a layer's bug must not keep the disk open
            self._on_bug(bug)
            finish(0)

        request = Request()
        request.op, request.status = Op.FLUSH, PENDING
        chain.contain = contain
        chain.complete = flushed
        try:
            chain.submit([request])
            self.files.kick()
        except Exception as bug:
            contain(bug)

    def close(self) -> None:
        """Close the chain and release everything. Raises: the exception of the first layer that failed."""
        chain, self.chain = self.chain, None  # first: messages may come while a layer waits for its last requests
        try:
            if chain is not None:
                chain.close()
        finally:
            self._env.close()
            self.files.close()

    @contextmanager
    def _through(self, number: int) -> Iterator[None]:
        """Open files for chain `number` of the opener's job within this context."""
        former, self.files.opener = self.files.opener, self._for_chain(number)
        try:
            yield
        finally:
            self.files.opener = former

    def _make_memory(self, name: str, size: int) -> int:
        if self._opener is None:
            raise OSError(errno.EPERM, f"the memory {name} was to be made while no order under way may open files")
        return self._opener.make_memory(name, size)

    def _for_chain(self, number: int) -> Opener:
        assert self._opener is not None  # noqa: S101 - callers are within `opening_by`
        return self._opener.for_chain(number)

    def _open(self, text: str) -> Chain:
        self._env.begin()
        return open_chain(parse_chain(text), self._env, read_only=self._read_only, shareable=self._shareable)

    def _check_free(self, layer: OpenLayer, *, read_only: bool) -> None:
        """Refuse a layer whose files somebody else uses: to find that out during an exchange would pause the guest."""
        if layer.driver.is_filter:
            return
        options = layer.driver.options
        shareable = getattr(options, "share", False) or (self._shareable and not layer.parent_of)
        read_only = read_only or bool(layer.parent_of)
        files = files_of(options)
        with explained(layer.text, files):
            for path in files.values():
                self.files.check_free(path, read_only=read_only, shareable=shareable)

    def _check(self, text: str, size: int, sector_size: int, former: Geometry | None = None) -> None:
        """Raise DriverError if a guest that uses the former geometry could not continue with another one."""
        former = former or (self.chain.geometry if self.chain else None)
        assert former is not None  # noqa: S101 - there is a chain, or there was one
        if size < former.size:
            raise DriverError(
                f"{text} has {size} bytes; the guest's disk has {former.size}, and cannot shrink while it is in use",
                errno=errno.EINVAL,
            )
        if sector_size != former.sector_size:
            raise DriverError(
                f"{text} has sectors of {sector_size} bytes; the guest uses {former.sector_size}", errno=errno.EINVAL
            )


def number_of(domid: int, vbd: str) -> int:
    """Return a number that no other disk of this host has; -1 if `vbd` does not end in a device number."""
    devid = vbd.rpartition("/")[2]
    return domid << 32 | int(devid) if devid.isdecimal() and len(devid) < 10 else -1


def is_locked(problem: XenbackendError) -> bool:
    """Return whether somebody else has the image."""
    return isinstance(problem, DriverError) and problem.errno == errno.EBUSY
