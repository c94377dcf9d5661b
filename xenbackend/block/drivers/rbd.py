"""rbd: an image of a Ceph cluster (RADOS Block Device).

Synopsis:
    rbd:POOL[/NAMESPACE]/IMAGE[@SNAPSHOT][,id=USER][,conf=FILE]

Description:
    Reads and writes an image by Ceph's own library, librbd, which has to be installed on the host (Debian: librbd1).
    The opener reads the configuration and the user's key, as `rbd -c FILE --id USER` would; the worker behind its
    walls gets both as bytes, and connects to monitors and OSDs itself. A key needs `profile rbd` for the monitors, and
    `profile rbd pool=POOL`, or `pool=POOL namespace=NAMESPACE`, for the OSDs. In a name, put a backslash before a comma
    or a bar.

Behaviour:
    A write is answered only when the cluster has it: librbd's cache is off. Options that were set on the image or its
    pool override those of the client. So the settings in effect are read when the image is opened, and an image is
    refused if they would lose answered writes, or let a dead client write.

    The exclusive lock of the image is taken when the disk is opened, and not given to anybody else. If somebody else
    has it, the disk is refused, and the error names the owner. A worker that dies leaves its lock behind, and perhaps
    writes that are still on their way. Its successor first has the cluster refuse the dead client (by an entry in the
    blocklist, for 24 hours), then takes the lock: so no write of a dead worker lands after one of its successor. That
    takes 0.1 to 1 s, for which the guest waits. A key that may not write to the blocklist is noticed when the
    disk is attached or checked. An owner that has been silent so long that it has no watch on the image any more (30 s)
    is treated in the same way, but for a year: its host may only be suspended, and would otherwise write again when the
    entry has expired. A lock that somebody made by `rbd lock add` is left alone.

    If the cluster refuses a worker, or if a worker loses its lock or a right of its key, it says so and ends. Its
    successor continues if nobody else has the lock and the key may write, and waits otherwise. It also waits if another
    disk of xenbackend, on any host, has served the image meanwhile, since the guest knows nothing of what was written
    there (`other-file`). The image records which disk it serves (`xenbackend.served` in `rbd image-meta list`). So
    another image of the same name is recognised even after the service was stopped.

    An image is identified by the ids of its cluster, its pool and itself, and that of the snapshot. If the name refers
    to another image than the one that the disk was served from, or to none, the disk waits (`other-file`): give the
    image its name back, and use `xenbackend resume`. An image may be renamed while it is served.

    If OSDs do not answer, the disk waits for them as long as it takes; `status` says for how long it has waited
    (`cluster`). No operation is ever timed out, since it could still be done later. A cluster that is full delays
    writes in the same way.

    `xenbackend snapshot DISK @NAME` makes an RBD snapshot, which holds all answered writes as of one moment. `image
    map` tells data from ranges that were never written, and with `--since NAME` shows what has changed since a
    snapshot. `image convert` can create an image in a cluster, and copy one from there; `image unlock` takes the lock
    from an owner that is dead.

    If the image has grown, `status` says so (`size`), and `xenbackend resize` gives the new size to the guest. If the
    image has become smaller than the disk, the disk waits (`other-size`).

    A discard frees the 64 KiB ranges that it covers completely; the content of its range is undefined afterwards. A
    snapshot is a read-only disk, and needs no lock. Neither does an image that is attached read-only; others may change
    its content meanwhile.

Example:
    rbd:rbd/guest1
    log:|throttle:iops=500|rbd:ssd/tenant7/guest1,id=xen
    cow:/img/1.cow|rbd:rbd/template@v3,id=reader,conf=/etc/ceph/site2.conf

Limits:
    To be written to, an image needs the feature exclusive-lock. A mirror of another cluster's image is read-only until
    it is promoted. An image cannot have several writers (`w!`, share=on).
    The worker has the host's network and a key. A guest that takes over its worker can do all that the key allows; a
    separate key for the namespace of each tenant limits that.
    The monitors are those in `mon host`; neither DNS (SRV records) nor sections for single monitors are used.
    A disk that was attached without rbd: in its chain cannot be given one while it runs.
    If the cluster is unreachable when a worker dies, the successor waits. The addresses of monitors are resolved when
    the disk is opened; later the cluster itself says where its monitors are.
    `image map`, and any other command that reads an image for a long time, needs one that nobody writes to, such as a
    snapshot.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

from xenbackend.block.driver import Driver, Env, Geometry
from xenbackend.block.extents import Extent, Kind
from xenbackend.block.options import Kind as Way
from xenbackend.block.options import option
from xenbackend.block.rbd import ownership, settings
from xenbackend.block.rbd.changed import extents_of
from xenbackend.block.rbd.disk import RbdDisk
from xenbackend.block.rbd.noted import SIZE, Noted
from xenbackend.block.rbd.target import Target, parse_name, parse_target
from xenbackend.block.request import Request
from xenbackend.block.servers import DISK, Account
from xenbackend.ceph import library
from xenbackend.ceph.bounded import Attempt, NotBack, within
from xenbackend.ceph.cluster import Cluster
from xenbackend.ceph.image import HAS_EXCLUSIVE_LOCK, Image, Pool
from xenbackend.errors import DriverError

SNAPSHOT_S = 25.0  # shorter than a client waits for the answer to an order
_STEP = 1 << 36  # bytes of an image that one call of `diff` covers
OPEN_S, CLOSE_S = 40.0, 10.0  # the supervisor takes a worker for hung if opening takes more than a minute


class Rbd(Driver):
    """Opens the image, and then gets out of the way: the layer above calls the `RbdDisk` directly."""

    name = "rbd"
    needs = frozenset({"ceph", "network"})

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `rbd:`."""

        image: Annotated[Target, Way("image", parse_target)] = option("POOL[/NAMESPACE]/IMAGE[@SNAPSHOT]", target=True)
        id: str = option("user of the cluster, without client.", default="admin")
        conf: str = option("whole path of the cluster's ceph.conf", default="/etc/ceph/ceph.conf")

        def __post_init__(self) -> None:
            """Refuse invalid values. Raises: ValueError."""
            if self.id.startswith("client."):
                raise ValueError(f"write id without the prefix client., as in id={self.id.removeprefix('client.')}")
            if not re.fullmatch(r"[^\s\x00/,]+", self.id):
                raise ValueError(f"{self.id!r} is not the name of a user of a cluster")
            if not self.conf.startswith("/") or "\0" in self.conf:
                raise ValueError(f"conf={self.conf} is not an absolute path")

        @property
        def account(self) -> Account:
            """The account with which the cluster is accessed."""
            return Account(self.conf, self.id)

    options: Options
    _cluster: Cluster | None = None
    _pool: Pool | None = None
    _image: Image | None = None
    _disk: RbdDisk | None = None
    _owner: Noted | None = None
    _identity = ""

    @classmethod
    def prepare(cls) -> None:
        """Load librados and librbd."""
        library.load()

    def open(self, env: Env) -> Geometry:
        """Connect, open the image, and take its lock unless it is only read."""
        target = self.options.image
        read_only = env.read_only or bool(target.snapshot)
        if env.shareable and not read_only:
            raise DriverError("an image of a cluster has only one writer; leave out shared writing (w!, share=on)")
        wanted = env.files.read_cluster(self.options.account)
        owner, identity = Noted(env.memory("owner", SIZE)), Noted(env.memory("image", SIZE))

        attempt = Attempt(OPEN_S, f"{target} is not open yet")

        def steps() -> tuple[Geometry, str]:
            return self._steps(env, wanted, owner, identity, attempt, read_only=read_only)

        def undo() -> None:
            self._owner = None  # the note belongs to whoever opens the image next
            with suppress(DriverError):
                self._close()

        try:
            geometry, limits = attempt.run(steps, undo)
            self._report(limits, read_only=read_only)
            assert self._image is not None  # noqa: S101 - it is open
            self._disk = RbdDisk(env, self._image, geometry.size, self._give_back, watches_size=not read_only)
        except NotBack:
            raise
        except BaseException:
            with suppress(DriverError):  # the failure to report is that of the opening
                within(CLOSE_S, "", self._close)
            raise
        self.submit = self._disk.submit  # type: ignore[method-assign]  # one call less
        return geometry

    def content(self) -> str:
        """See `Driver`."""
        return self._identity

    def extents(self, size: int, *, all_holes: bool = False) -> Iterator[Extent]:  # noqa: ARG002 - it knows all of them
        """See `Driver`. Data are what the cluster has, including that of the image's parents."""
        return self._diff("", size, Kind.ZERO)

    def changes(self, since: str, size: int) -> Iterator[Extent]:
        """See `Driver`."""
        return self._diff(since, size, Kind.ABSENT)

    def snapshot(self, name: str) -> None:
        """See `Driver`: make an RBD snapshot, which holds every answered request, and no half-done one."""
        image, target = self._image, self.options.image
        if target.snapshot or image is None or self.env.read_only:
            raise DriverError(f"{target} is opened read-only, so there is nothing to keep", errno=errno.EROFS)
        parse_name(name)
        within(SNAPSHOT_S, f"the snapshot {name} may still appear", lambda: image.snapshot(name))

    def writer(self) -> str:
        """See `Driver`."""
        if self.options.image.snapshot or self._image is None or not self.env.read_only:
            return ""
        return ", ".join(map(str, self._image.owners()))

    def submit(self, batch: list[Request]) -> None:
        """Raise RuntimeError, since nothing is open; `open` replaces this method by the disk's own `submit`."""
        raise RuntimeError(f"submitted before the image was opened: {batch!r}")

    def close(self) -> None:
        """Close the image, and release its lock. Raises: DriverError if the cluster does not answer.

        In that case a worker's process ends instead, and its successor takes the lock from it.
        """
        if self._disk is None:
            return
        disk, self._disk = self._disk, None
        disk.close()
        try:
            within(CLOSE_S, "the image's lock could not be given back", self._close)
        except DriverError as problem:
            self.env.give_up(str(problem))
            raise
        disk.closed()

    def _steps(
        self,
        env: Env,
        wanted: Mapping[str, str],
        owner: Noted,
        identity: Noted,
        attempt: Attempt,
        *,
        read_only: bool,
    ) -> tuple[Geometry, str]:
        """Connect and open the image; return its geometry, and its limits for people.

        Raises: DriverError; the caller then closes what is open.
        """
        target = self.options.image
        cluster = self._cluster = Cluster(self.options.id, wanted)
        pool = self._pool = Pool(cluster, target.pool, target.namespace)
        try:
            image = self._image = Image(cluster, pool, target.image, target.snapshot, read_only=read_only)
        except DriverError as problem:
            if problem.errno != errno.ENOENT or not identity.text:
                raise
            raise DriverError(f"{problem}; the disk was served from {identity.text}", errno=errno.ESTALE) from problem
        snapshot = f"@{target.snapshot}#{image.snapshot_id(target.snapshot)}" if target.snapshot else ""
        self._identity = f"rbd {cluster.fsid()}/{pool.number()}/{target.namespace}/{image.id()}{snapshot}"
        if identity.text not in ("", self._identity):
            raise DriverError(
                f"{target} means another image now, {self._identity}; the disk was served from {identity.text}",
                errno=errno.ESTALE,
            )
        size, holds = image.size(), image.settings()
        if not read_only:
            self._see_that_it_is_safe(image, settings.why_unsafe(holds))
            ownership.take(cluster, image, owner, attempt.step)
            self._owner = owner
            if DISK in wanted:
                ownership.mark(image, wanted[DISK], goes_on=env.continues or bool(identity.text))
        with attempt.step():
            identity.text = self._identity
        granularity = settings.discard_granularity(holds)
        geometry = Geometry(
            size=size,
            read_only=read_only,
            can_discard=not read_only,
            discard_granularity=0 if read_only else granularity,
            physical_sector_size=4096,
        )
        return geometry, settings.limits(holds)

    def _see_that_it_is_safe(self, image: Image, why_unsafe: str) -> None:
        """Raise DriverError if an image must not be written to, as data would be lost with a worker or to others."""
        target = self.options.image
        if not image.features() & HAS_EXCLUSIVE_LOCK:
            raise DriverError(
                f"{target} lacks the feature exclusive-lock, so nothing would keep others from writing to it; enable "
                f"it: `rbd feature enable {target} exclusive-lock`",
                errno=errno.EPERM,
            )
        if image.is_mirror():
            raise DriverError(
                f"{target} is a mirror of an image in another cluster, and cannot be written to; demote the other "
                f"one, then make this one the primary: `rbd mirror image promote {target}`",
                errno=errno.EROFS,
            )
        if why_unsafe:
            raise DriverError(f"{target} is not safe to write to: {why_unsafe}", errno=errno.EPERM)

    def _report(self, limits: str, *, read_only: bool) -> None:
        env, cluster = self.env, self._cluster
        assert cluster is not None  # noqa: S101 - it is open
        env.report("mode", "librbd, eventfd")
        env.report("image", self._identity)
        if not read_only:
            env.report("lock", f"exclusive, as {cluster.address()}")
            env.report("barrier", f"for how long the cluster refuses a dead worker: {ownership.DEAD_S / 3600:.0f} h")
        if limits:
            env.report("limits", limits)

    def _diff(self, since: str, size: int, gaps: Kind) -> Iterator[Extent]:
        """Yield the extents that have data, or changed since a snapshot, in whole sectors; the others are `gaps`."""
        image = self._image
        assert image is not None  # noqa: S101 - only open layers are asked
        for start in range(0, size, _STEP):
            end = min(size, start + _STEP)
            yield from extents_of(image.diff(since, start, end - start), start, end, gaps)

    def _close(self) -> None:
        """Close image, pool and cluster, as far as they are open. Raises: DriverError if the image cannot be closed."""
        image, self._image = self._image, None
        pool, self._pool = self._pool, None
        cluster, self._cluster = self._cluster, None
        try:
            if image is not None:
                image.close()
                if self._owner is not None:
                    self._owner.text = ""  # nothing is under way, and the lock is released
        finally:
            if pool is not None:
                pool.close()
            if cluster is not None:
                cluster.close()

    def _give_back(self, batch: list[Request]) -> None:
        self.complete(batch)
