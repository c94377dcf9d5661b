"""nbd: a disk that another program serves by NBD, on this host or on another one.

Synopsis:
    nbd:SERVER[,export=NAME][,drain=DURATION][,timeout=DURATION][,durable=on][,connections=N]
        [,certificates=DIRECTORY]
    SERVER is one of unix:PATH, HOST:PORT, URI

Description:
    Reads and writes an export of an NBD server: nbdkit with its plug-ins (S3, ssh, curl, ...), qemu-nbd,
    qemu-storage-daemon, nbd-server, or one on another host. SERVER is the absolute path of the server's socket; its
    host and port (with an IPv6 address in brackets); or a URI as for libnbd: nbd://HOST[:PORT]/EXPORT,
    nbd+unix:///EXPORT?socket=PATH, or nbds:// for TLS. In a URI, characters that it cannot hold are percent-encoded:
    `%7C` is a bar and `%2C` a comma; elsewhere a bar or a comma has a backslash before it. A URI that begins with nbd:
    needs no second `nbd:` before it: nbd://host/export.

    The opener, a process of its own with the host's network, resolves names and makes the connections. The worker
    behind its walls gets the sockets.

    With TLS (nbds://, nbds+unix://, or certificates=) nothing is sent in plain text, and a server that cannot prove its
    identity is refused. `certificates`, or tls-certificates in a URI, is a directory with ca-cert.pem, the authorities
    that we trust, and, if the server wants to know who we are, client-cert.pem with client-key.pem. A server's
    certificate has to be for the host that the chain names; over a unix socket any certificate that an authority has
    signed will do. The opener reads the files when the disk is opened, and the worker keeps their content. Pre-shared
    keys (PSK) are not supported.

    `connections` is how many connections are made, 1 by default and 8 at most. More than one needs a server that
    declares all of them consistent with one another (multi-conn), and is faster only if the server does the work of
    each connection in a thread of its own, as nbdkit does with `--threads=1`.

Behaviour:
    If the server goes away, the disk waits: the policy's kind `away` applies to reads, writes and flushes, and the
    connection is made again, after 0.1 s at first, later every 5 s. Then the requests that were in flight are sent
    again. If the server comes back with a smaller disk, without the export, or with a read-only one, it is not used;
    the disk goes on waiting, and `status` says why, as it always says what the disk is waiting for (`connection`). A
    server that owes answers, and for the time of `timeout` sends none, nor 4 KiB of one, is treated as one that has
    gone away. A connection without requests may be silent for ever.
    A server that breaks the protocol loses its connection, and is connected to again. If there are several connections
    and one is lost, the disk waits until all of them are there again.

    When a connection is lost, or its worker dies, requests that were sent by it may still be under way at the server.
    If they are done later than what the guest writes next, they destroy that. So the old connection is drained before
    anything is sent again: our direction is shut down, and what comes is read until the server closes the connection.
    That is enough for a server that closes a connection only when it has done everything that came by it, as nbdkit
    does with `--threads=1`. With several threads, its default, nbdkit closes at once if the connection ends within a
    request, while another thread is still writing. qemu-nbd and qemu-storage-daemon always close at once: on a slow
    disk a write may land seconds later. For those servers `drain` is the time to wait after the end of the connection,
    5 s by default; it has to be longer than a write can take. Use `drain=0s` only with a server that closes as nbdkit
    with one thread does; when a worker dies, the guest then waits for milliseconds instead of seconds. `status` shows
    what applies (`barrier`). If the server or the network does not end the old connection within 10 s, the disk
    waits until it does, or until an administrator who knows that nothing is under way there uses `xenbackend resume`.
    A connection that is reset counts as ended. So the server itself has to end it: if something between the hosts may
    end or reset connections (a load balancer, `ssh -L`, a firewall that rejects by a TCP reset), an end proves nothing,
    and `drain` has to be as for qemu-nbd, and longer than such a program may hold data back.

    A flush is an NBD flush, and covers what the guest wrote before it. A discard is a trim, after which the content of
    the range is undefined. `image map` and `image convert` ask for the block status, and skip what reads as zeros.
    Sectors are as large as the smallest request that the server accepts, at least 512 bytes. Requests that are larger
    than the server accepts are split.

Example:
    log:|nbd:unix:/run/nbdkit.sock,drain=0s
    nbd:storage.example:10809,export=guest1
    nbd:nbd+unix:///guest1?socket=/run/qemu-nbd.sock
    nbd:nbds://storage.example/guest1,certificates=/etc/pki/xenbackend

Limits:
    Nothing stops two hosts from writing to one export, as NBD has no locks: the administrator must make sure that there
    is one writer.
    The disk's size is determined when it is opened; `xenbackend resize` asks for it again. `set` and `resize` look at
    the export by one more connection, which qemu-nbd accepts with `-e 2`. Renewed certificates are used when the disk
    is next opened: `xenbackend upgrade` does that.
    If a guest takes over its worker, it has the client's key. With a key for each tenant, that is worth no more than
    what the tenant may do anyway.
    If the server's host crashes, data that the server had not made durable are lost; the guest does not notice, since
    it has not crashed itself. With `durable=on` each write is durable before it is answered.
    If a disk is detached by force while its server is silent, its connections are given up at once: late writes may
    reach what is attached in its place.
    nbdkit 1.32 aborts if a client dies while requests are in flight; have its unit restart it.
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
MAX_DRAIN_S = 30.0  # the supervisor takes a worker for hung if opening the chain takes more than a minute


class Nbd(Driver):
    """Connects to the server, and then gets out of the way: the layer above calls the `RemoteDisk` directly."""

    name = "nbd"

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `nbd:`."""

        server: Annotated[Target, Kind("server", parse_target)] = option("unix:PATH, HOST:PORT or a URI", target=True)
        export: str = option("the export's name; by default the one without a name, or the URI's", default="")
        drain: Duration = option("how long the server may still write once a connection has ended", default=5.0)
        timeout: Duration = option("how long the server may be silent while it owes an answer", default=30.0)
        durable: bool = option("writes are answered when they are on the server's medium", default=False)
        connections: int = option("how many connections are made to the server", default=1)
        certificates: str = option("directory with the certificates for TLS; by default the URI's", default="")

        def __post_init__(self) -> None:
            """Refuse options that contradict one another. Raises: ValueError."""
            if self.export and self.server.export not in (None, self.export):
                raise ValueError(f"the URI names the export {self.server.export!r}, and export= another one")
            if len(self.export.encode(errors="surrogateescape")) > MAX_NAME:
                raise ValueError(f"the export's name is longer than {MAX_NAME} bytes")
            if not 0 <= self.drain <= MAX_DRAIN_S:
                raise ValueError(f"drain is from 0s to {MAX_DRAIN_S:.0f}s")
            if not 2 <= self.timeout <= 3600:
                raise ValueError("timeout must be from 2s to 3600s")
            if not 1 <= self.connections <= MAX_CONNECTIONS:
                raise ValueError(f"connections must be from 1 to {MAX_CONNECTIONS}")
            self._check_tls()

        def _check_tls(self) -> None:
            server, directory = self.server, self.credentials
            if self.certificates and server.certificates not in (None, self.certificates):
                raise ValueError(
                    f"the URI names the certificates in {server.certificates}, but certificates= names others"
                )
            if directory and server.tls is False:
                raise ValueError("nbd:// does not use TLS; for TLS write nbds://, which needs certificates")
            if server.tls and not directory:
                raise ValueError("nbds:// needs certificates=DIRECTORY, which has at least ca-cert.pem")
            if directory and (not directory.startswith("/") or "\0" in directory):
                raise ValueError(f"certificates={directory} is not an absolute path")

        @property
        def credentials(self) -> str:
            """The directory with the certificates for TLS; empty: without TLS."""
            return self.certificates or self.server.certificates or ""

    options: Options
    _disk: RemoteDisk | None = None

    @property
    def _export(self) -> str:
        return self.options.export or self.options.server.export or ""

    def open(self, env: Env) -> Geometry:
        """Connect to the server, and negotiate the export."""
        options = self.options
        wanted = Wanted(options.server.endpoint, self._export, options.timeout, options.durable, self._tls(env))
        streams: list[Stream] = []
        try:
            offer = self._agree(env, wanted, streams)
            geometry = _geometry(offer, read_only=env.read_only)
            if options.durable and not (geometry.read_only or offer.flags & SEND_FUA):
                raise DriverError(
                    "the server cannot make single writes durable (FUA), which durable=on requires; leave durable= out",
                    errno=errno.ENOTSUP,
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
        """Return the settings of TLS, or None for plain text. Raises: DriverError."""
        directory = self.options.credentials
        if not directory:
            return None
        try:
            return Tls(env.files.read_certificates(directory), self.options.server.endpoint.host)
        except TlsFailed as problem:
            raise DriverError(f"{directory}: {problem}", path=directory) from problem

    def _agree(self, env: Env, wanted: Wanted, streams: list[Stream]) -> Offer:
        """Make all connections, append each to `streams`, and return the server's offer. Raises: DriverError."""
        first: Offer | None = None
        left_s = negotiation.HANDSHAKE_S
        for place in range(self.options.connections):
            near = env.connect(wanted.endpoint, place)  # this drains former connections, and waits for `drain`
            streams.append(near)
            deadline = Deadline(left_s)
            streams[place], offer = negotiation.negotiate(near, wanted.export, wanted.tls, deadline)
            left_s = deadline.left_s
            if self.options.connections > 1 and not offer.flags & SEND_MULTI_CONN:
                raise DriverError(
                    "the server does not promise that all connections see the same data (multi-conn); leave "
                    "connections= out",
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
        """See `Driver`. The server's block status says what reads as zeros."""
        assert self._disk is not None  # noqa: S101 - only open layers are asked
        return self._disk.extents(size)

    def submit(self, batch: list[Request]) -> None:
        """Raise RuntimeError, since nothing is open; `open` replaces this method by the disk's own `submit`."""
        raise RuntimeError(f"submitted before the server was connected to: {batch!r}")

    def close(self) -> None:
        """Close the connections."""
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _give_back(self, batch: list[Request]) -> None:
        self.complete(batch)


def _geometry(offer: Offer, *, read_only: bool) -> Geometry:
    """Return the geometry of an export. Raises: DriverError if it cannot be a disk."""
    sector = max(512, offer.min_block)
    if sector not in SECTOR_SIZES:
        raise DriverError(
            f"the server takes only requests of at least {offer.min_block} bytes; a sector has at most "
            f"{SECTOR_SIZES[-1]}"
        )
    if offer.size % sector or not offer.size:
        raise DriverError(
            f"the export has {offer.size} bytes, which is not a whole number of sectors of {sector} bytes"
        )
    if offer.max_block < sector:
        raise DriverError(
            f"the server takes requests of at most {offer.max_block} bytes, less than a sector of {sector}"
        )
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
