"""nbd: a disk that another program serves by NBD, on this host or on another one.

Synopsis:
    nbd:SERVER[,export=NAME][,drain=DURATION][,timeout=DURATION][,durable=on][,connections=N]
        [,certificates=DIRECTORY]
    SERVER is one of unix:PATH, HOST:PORT, URI

Description:
    Reads and writes an export of an NBD server: nbdkit with its plug-ins (S3, ssh, curl, ...), qemu-nbd,
    qemu-storage-daemon, nbd-server, or another host's. A server is named by the whole path of its socket, by host and
    port (an address of IPv6 in brackets), or by a URI as libnbd writes it: nbd://HOST[:PORT]/EXPORT,
    nbd+unix:///EXPORT?socket=PATH, nbds:// where TLS is wanted. What a URI cannot hold is written with a % there, so
    that `%7C` is a bar and `%2C` a comma; elsewhere a backslash before a bar or comma does. A URI that begins a chain
    may be written as it is: nbd://host/export.

    Names are resolved and connections made by the opener, a process of its own with the host's network. The worker
    behind its walls gets the socket.

    With TLS (nbds://, nbds+unix://, or certificates=) nothing is said in plain text, and no server is gone on with that
    is not the one it should be. `certificates`, or a URI's tls-certificates, is the directory with ca-cert.pem: whom we
    believe; and client-cert.pem with client-key.pem, where the server wants to know who we are. A server's certificate
    has to be of the host that the chain names; over a unix socket any that the authority has signed will do. The opener
    reads the files when the disk is opened, and the worker keeps what is in them. Keys that both sides share (PSK) are
    not spoken.

    `connections` is how many are made, 1 by default and 8 at most. More need a server that says that all of them see
    the same (multi-conn), and bring more where it does the work of each in a thread of its own: nbdkit, `--threads=1`.

Behaviour:
    A server that goes away is a pause: reads, writes and flushes wait, by the policy's kind `away`, and the connection
    is made again, after 0.1 s at first and every 5 s at last. What was in flight is sent again then. A server that
    comes back with a smaller disk, without the export, or only to be read, is not served from; the disk waits, and
    `status` says why, as it says what it waits for in any case (`connection`). A server that owes answers, and
    gives none for `timeout`, nor 4 KiB of one, is treated as one that has gone. A connection that has nothing to do may
    be silent for ever.
    A server that breaks the protocol loses its connection, and is connected to again. Where there are several, and one
    is lost, the disk waits until all of them are there.

    What was sent by a connection that is lost, also as the worker died, may still be under way at the server. Done
    later than what the guest writes next, it would destroy that. So the former connection is seen to its end before
    anything is sent again: our direction is shut down, and what comes is read until the server closes. That is enough
    for a server that closes a connection only when it has done all that came by it: nbdkit does, with `--threads=1`.
    With several threads, which it has by default, it closes at once where a connection ends within a request, while
    another thread still writes. qemu-nbd and qemu-storage-daemon always close at once. There a write may reach the disk
    seconds later, if that is slow, and `drain` is the time to wait after that end, 5 s by default: longer than a write
    may take. Only with a server that closes as nbdkit with one thread does should it be `drain=0s`; the guest then
    waits milliseconds and not seconds when a worker dies. `status` says which holds (`barrier`). A server, or a
    network, that does not end the former connection within 10 s keeps the disk waiting until it does, or until an
    administrator, who knows that nothing is under way there, says `xenbackend resume`. A connection that is reset
    counts as ended.

    A flush is NBD's, and covers what the guest wrote before. A discard is a trim, and promises nothing of what is read
    there afterwards. `image map` and `image convert` ask for block status, and skip what reads as zeros. Sectors are as
    large as the smallest request that the server takes, 512 bytes at least. Larger requests than it takes are cut.

Example:
    log:|nbd:unix:/run/nbdkit.sock,drain=0s
    nbd:storage.example:10809,export=guest1
    nbd:nbd+unix:///guest1?socket=/run/qemu-nbd.sock
    nbd:nbds://storage.example/guest1,certificates=/etc/pki/xenbackend

Limits:
    Nothing keeps two hosts from writing to one export: NBD has no lock. One writer is the administrator's duty.
    The disk's size is that at opening; `xenbackend resize` asks for it anew. `set` and `resize` look at the export by
    one connection more, which qemu-nbd takes with `-e 2`. Certificates that were renewed count when the disk is next
    opened: `xenbackend upgrade` does that.
    A worker that a guest has taken over has the client's key. One for each tenant bounds what that is worth.
    A server whose host crashes loses what it had not made durable; the guest does not learn of that, as it had not
    crashed itself. `durable=on` has each write made durable before it is answered.
    A disk that is detached by force while its server is silent is let go of at once: what is attached in its place may
    meet late writes.
    nbdkit 1.32 aborts when a client dies while requests are in flight; it needs to be restarted by its unit then.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from xenbackend.block.driver import Driver, Env, Geometry
from xenbackend.block.extents import Extent
from xenbackend.block.opening import SECTOR_SIZES
from xenbackend.block.options import Duration, Kind, option
from xenbackend.block.remote import negotiation
from xenbackend.block.remote.deadline import Deadline
from xenbackend.block.remote.disk import RemoteDisk
from xenbackend.block.remote.lane import Wanted
from xenbackend.block.remote.negotiation import Stream
from xenbackend.block.remote.target import Target, parse_target
from xenbackend.block.remote.tls import Tls, TlsFailed, TlsSocket
from xenbackend.block.request import Request
from xenbackend.errors import DriverError
from xenbackend.nbd.abi import SEND_FLUSH, SEND_FUA, SEND_MULTI_CONN, SEND_READ_ONLY, SEND_TRIM
from xenbackend.nbd.client import MAX_NAME, Offer

MAX_CONNECTIONS = 8
MAX_DRAIN_S = 30.0  # a worker that opens its chain for longer than a minute is taken for one that hangs


class Nbd(Driver):
    """Forwards to the connection, and gets out of the way."""

    name = "nbd"

    @dataclass(frozen=True, slots=True)
    class Options:
        """Which export, and how far its server is trusted."""

        server: Annotated[Target, Kind("server", parse_target)] = option("unix:PATH, HOST:PORT or a URI", target=True)
        export: str = option("the export's name; by default the one without a name, or the URI's", default="")
        drain: Duration = option("how long the server may still write once a connection has ended", default=5.0)
        timeout: Duration = option("how long a server may answer nothing while it owes an answer", default=30.0)
        durable: bool = option("writes are answered when they are on the server's medium", default=False)
        connections: int = option("how many connections are made to the server", default=1)
        certificates: str = option("directory with the certificates for TLS; by default the URI's", default="")

        def __post_init__(self) -> None:
            """Refuse what contradicts itself. Raises: ValueError."""
            if self.export and self.server.export not in (None, self.export):
                raise ValueError(f"the URI names the export {self.server.export!r}, and export= another one")
            if len(self.export.encode(errors="surrogateescape")) > MAX_NAME:
                raise ValueError(f"the export's name is longer than {MAX_NAME} bytes")
            if not 0 <= self.drain <= MAX_DRAIN_S:
                raise ValueError(f"drain is from 0s to {MAX_DRAIN_S:.0f}s")
            if not 2 <= self.timeout <= 3600:
                raise ValueError("timeout is from 2s to 3600s")
            if not 1 <= self.connections <= MAX_CONNECTIONS:
                raise ValueError(f"connections is from 1 to {MAX_CONNECTIONS}")
            self._check_tls()

        def _check_tls(self) -> None:
            server, directory = self.server, self.credentials
            if self.certificates and server.certificates not in (None, self.certificates):
                raise ValueError(f"the URI names the certificates in {server.certificates}, and certificates= others")
            if directory and server.tls is False:
                raise ValueError("nbd:// is without TLS; nbds:// is with it, and needs certificates")
            if server.tls and not directory:
                raise ValueError("nbds:// needs certificates=DIRECTORY, which has at least ca-cert.pem")
            if directory and (not directory.startswith("/") or "\0" in directory):
                raise ValueError(f"certificates={directory} is not the whole path of a directory")

        @property
        def credentials(self) -> str:
            """The directory with what TLS goes by; empty: without TLS."""
            return self.certificates or self.server.certificates or ""

    options: Options
    _disk: RemoteDisk | None = None

    @property
    def _export(self) -> str:
        return self.options.export or self.options.server.export or ""

    def open(self, env: Env) -> Geometry:
        """Connect, and agree with the server."""
        options = self.options
        wanted = Wanted(options.server.endpoint, self._export, options.timeout, options.durable, self._tls(env))
        streams: list[Stream] = []
        try:
            offer = self._agree(env, wanted, streams)
            geometry = _geometry(offer, read_only=env.read_only)
            if options.durable and not (geometry.read_only or offer.flags & SEND_FUA):
                raise DriverError(
                    "the server cannot make single writes durable, as durable=on wants", errno=errno.ENOTSUP
                )
            wanted = replace(wanted, durable=options.durable and not geometry.read_only)
            self._disk = RemoteDisk(env, wanted, streams, offer, self._give_back)
        except BaseException:
            for place, stream in enumerate(streams):
                stream.close()
                env.disconnected(wanted.endpoint, place)
            raise
        self.submit = self._disk.submit  # type: ignore[method-assign]  # one call less
        if wanted.tls is not None:
            env.report("encryption", streams[0].version if isinstance(streams[0], TlsSocket) else "")
        env.report(
            "barrier", f"the server's end of a connection{f', and {options.drain:g} s' if options.drain else ''}"
        )
        return geometry

    def _tls(self, env: Env) -> Tls | None:
        """Return how the server is to be spoken to; None: in plain text. Raises: DriverError."""
        directory = self.options.credentials
        if not directory:
            return None
        try:
            return Tls(env.files.read_certificates(directory), self.options.server.endpoint.host)
        except TlsFailed as problem:
            raise DriverError(f"{directory}: {problem}", path=directory) from problem

    def _agree(self, env: Env, wanted: Wanted, streams: list[Stream]) -> Offer:
        """Make all connections, put each into `streams`, and return what is offered. Raises: DriverError."""
        first: Offer | None = None
        left_s = negotiation.HANDSHAKE_S
        for place in range(self.options.connections):
            near = env.connect(wanted.endpoint, place)  # which waits for former ones to end, and for `drain`
            streams.append(near)
            deadline = Deadline(left_s)
            streams[place], offer = negotiation.negotiate(near, wanted.export, wanted.tls, deadline)
            left_s = deadline.left_s
            if self.options.connections > 1 and not offer.flags & SEND_MULTI_CONN:
                raise DriverError(
                    "the server does not say that its connections see the same (multi-conn); leave connections= out",
                    errno=errno.ENOTSUP,
                )
            offer = replace(offer, context=offer.context if first is None else first.context)
            if first is not None and offer != first:
                raise DriverError("the export was changed while connections to it were made", errno=errno.EAGAIN)
            first = offer
        assert first is not None  # noqa: S101 - there is one at least
        return first

    def content(self) -> str:
        """See `Driver`."""
        return f"nbd {self.options.server.endpoint} {self._export}"

    def extents(self, size: int, *, all_holes: bool = False) -> Iterator[Extent]:  # noqa: ARG002 - it shows them always
        """See `Driver`: what the server says reads as zeros."""
        assert self._disk is not None  # noqa: S101 - only open layers are asked
        return self._disk.extents(size)

    def submit(self, batch: list[Request]) -> None:
        """Say that nothing is open; `open` puts another one in this place."""
        raise RuntimeError(f"submitted before the server was connected to: {batch!r}")

    def close(self) -> None:
        """Let go of the connection."""
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _give_back(self, batch: list[Request]) -> None:
        self.complete(batch)


def _geometry(offer: Offer, *, read_only: bool) -> Geometry:
    """Return what an export is as a disk. Raises: DriverError where it cannot be one."""
    sector = max(512, offer.min_block)
    if sector not in SECTOR_SIZES:
        raise DriverError(
            f"the server takes requests of {offer.min_block} bytes at least; {SECTOR_SIZES[-1]} are the most"
        )
    if offer.size % sector or not offer.size:
        raise DriverError(f"the export has {offer.size} bytes, which is no whole number of sectors of {sector} bytes")
    if offer.max_block < sector:
        raise DriverError(f"the server takes requests of {offer.max_block} bytes at most, and sectors have {sector}")
    read_only = read_only or bool(offer.flags & SEND_READ_ONLY)
    can_discard = bool(offer.flags & SEND_TRIM) and not read_only
    return Geometry(
        size=offer.size,
        sector_size=sector,
        read_only=read_only,
        can_flush=bool(offer.flags & SEND_FLUSH),
        can_discard=can_discard,
        discard_granularity=max(sector, offer.preferred_block) if can_discard else 0,
        physical_sector_size=min(max(sector, offer.preferred_block), 4096),
    )
