"""rbd: an image of a Ceph cluster (RADOS Block Device).

Synopsis:
    rbd:POOL[/NAMESPACE]/IMAGE[@SNAPSHOT][,id=USER][,conf=FILE]

Description:
    Reads and writes an image by Ceph's own library, librbd, which the host has to have (Debian: librbd1). The
    configuration and the user's key are read by the opener, as `rbd -c FILE --id USER` would; the worker behind its
    walls gets both as bytes, and connects to monitors and OSDs itself. A key needs `profile rbd` for the monitors, and
    `profile rbd pool=POOL`, or `pool=POOL namespace=NAMESPACE`, for the OSDs. A backslash before a comma or bar makes
    it a part of a name.

Behaviour:
    Nothing is answered that the cluster does not have: librbd's cache is off. Options that were set at the image or its
    pool beat those of the client, so what holds is read when the image is opened, and an image is refused whose
    settings would lose answered writes, or let a dead client write.

    The image's exclusive lock is taken when the disk is opened, and given to nobody. Somebody else's lock is refused
    with that one's name. A worker that dies leaves its lock, and perhaps writes on their way. Its successor has the
    cluster refuse that client first (an entry of the blocklist, for 24 hours), then takes the lock: so no write of a
    dead worker lands after its successor's. That takes some 0.1 to 1 s; the guest waits. A key that may not write to
    the blocklist is found out when the disk is attached, or checked. An owner that has gone silent, so that it has no
    watch on the image any more (30 s), is treated likewise, for a year: its host may only stand still, and write on
    when the entry has gone. A lock that somebody made by `rbd lock add` is left alone.

    A worker that the cluster refuses, or that has lost its lock or a right of its key, ends, and says so. Its successor
    goes on if nobody else has the lock and the key may write, and waits otherwise. It also waits where another disk of
    xenbackend, on whatever host, has served the image meanwhile, since its guest knows nothing of what was written
    there (`other-file`). The image says which disk it serves: `xenbackend.served` of `rbd image-meta list`. So an image
    is told from another one of its name also over a stop of the service.

    An image is its cluster's number, its pool's and its own id, and that of the snapshot. Where the name means another
    image than the one that the disk was served from, or none, the disk waits (`other-file`): give the image its name
    back, and `xenbackend resume`. While it is served it may be renamed.

    OSDs that do not answer are waited for as long as it takes; `status` says for how long (`cluster`). No operation is
    ever timed out, since it might be done later all the same. A cluster that is full holds writes back likewise.

    `xenbackend snapshot DISK @NAME` makes an RBD snapshot: all that the guest was answered, at one moment. `image map`
    tells data from what was never written, and with `--since NAME` what has changed since a snapshot. `image convert`
    makes an image of a cluster, and copies one; `image unlock` takes the lock from an owner that is dead.

    A larger image is offered by `xenbackend resize`; `status` says that there is one (`size`). An image that has become
    smaller than the disk is a pause (`other-size`).

    A discard frees what it covers of 64 KiB ranges, and promises nothing of what is read there afterwards. A snapshot
    is a disk that is only read, and needs no lock; so is an image that is attached read-only, of which others may
    change what is read.

Example:
    rbd:rbd/guest1
    log:|throttle:iops=500|rbd:ssd/tenant7/guest1,id=xen
    cow:/img/1.cow|rbd:rbd/template@v3,id=reader,conf=/etc/ceph/site2.conf

Limits:
    An image needs the feature exclusive-lock to be written to. A mirror of another cluster's image is only read, until
    it is promoted. Nobody else may write to it meanwhile (`w!`, share=on).
    The worker has the host's network, and a key: if a guest takes it over, it has all that the key allows. A key for
    each tenant's namespace bounds that.
    Monitors are those that `mon host` names; neither DNS (SRV) nor sections of single monitors are asked.
    A disk that was attached without rbd: in its chain cannot be given one while it runs.
    If the cluster is unreachable when a worker dies, its successor waits. A monitor's address is resolved when the disk
    is opened; later ones come from the cluster.
    `image map`, and what else looks at an image for long, wants one that nobody writes to, such as a snapshot.
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

SNAPSHOT_S = 25.0  # less than a client waits for an order
_STEP = 1 << 36  # bytes of an image that are asked for at once
OPEN_S, CLOSE_S = 40.0, 10.0  # a worker that opens its chain for longer than a minute is taken for one that hangs


class Rbd(Driver):
    """Opens the image, and gets out of the way."""

    name = "rbd"
    needs = frozenset({"ceph", "network"})

    @dataclass(frozen=True, slots=True)
    class Options:
        """Which image, and as whom it is asked for."""

        image: Annotated[Target, Way("image", parse_target)] = option("POOL[/NAMESPACE]/IMAGE[@SNAPSHOT]", target=True)
        id: str = option("user of the cluster, without client.", default="admin")
        conf: str = option("whole path of the cluster's ceph.conf", default="/etc/ceph/ceph.conf")

        def __post_init__(self) -> None:
            """Refuse what cannot be. Raises: ValueError."""
            if self.id.startswith("client."):
                raise ValueError(f"id is written without client., as in id={self.id.removeprefix('client.')}")
            if not re.fullmatch(r"[^\s\x00/,]+", self.id):
                raise ValueError(f"{self.id!r} is no user of a cluster")
            if not self.conf.startswith("/") or "\0" in self.conf:
                raise ValueError(f"conf={self.conf} is not the whole path of a file")

        @property
        def account(self) -> Account:
            """As whom the cluster is asked."""
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
        """Connect, open the image, and have its lock where it is to be written to."""
        target = self.options.image
        read_only = env.read_only or bool(target.snapshot)
        if env.shareable and not read_only:
            raise DriverError("an image of a cluster has one writer; shared writing (w!, share=on) is not possible")
        wanted = env.files.read_cluster(self.options.account)
        owner, identity = Noted(env.memory("owner", SIZE)), Noted(env.memory("image", SIZE))

        attempt = Attempt(OPEN_S, f"{target} is not open yet")

        def steps() -> tuple[Geometry, str]:
            return self._steps(env, wanted, owner, identity, attempt, read_only=read_only)

        def undo() -> None:
            self._owner = None  # what is noted there belongs to who opens it now
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
            with suppress(DriverError):  # why it could not be opened is what to report
                within(CLOSE_S, "", self._close)
            raise
        self.submit = self._disk.submit  # type: ignore[method-assign]  # one call less
        return geometry

    def content(self) -> str:
        """See `Driver`."""
        return self._identity

    def extents(self, size: int, *, all_holes: bool = False) -> Iterator[Extent]:  # noqa: ARG002 - it knows all of them
        """See `Driver`: what the cluster has, an image's parents with it."""
        return self._diff("", size, Kind.ZERO)

    def changes(self, since: str, size: int) -> Iterator[Extent]:
        """See `Driver`."""
        return self._diff(since, size, Kind.ABSENT)

    def snapshot(self, name: str) -> None:
        """See `Driver`: an RBD snapshot, which holds what was answered, and nothing by halves."""
        image, target = self._image, self.options.image
        if target.snapshot or image is None or self.env.read_only:
            raise DriverError(f"{target} is only read, so that there is nothing to keep", errno=errno.EROFS)
        parse_name(name)
        within(SNAPSHOT_S, f"the snapshot {name} may still be made", lambda: image.snapshot(name))

    def writer(self) -> str:
        """See `Driver`."""
        if self.options.image.snapshot or self._image is None or not self.env.read_only:
            return ""
        return ", ".join(map(str, self._image.owners()))

    def submit(self, batch: list[Request]) -> None:
        """Say that nothing is open; `open` puts another one in this place."""
        raise RuntimeError(f"submitted before the image was opened: {batch!r}")

    def close(self) -> None:
        """Let go of the image and its lock. Raises: DriverError, where the cluster does not answer.

        Then the process ends if it is a worker: its successor has the lock taken from it.
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
        """Open all of it, and return its limits, too; whoever calls closes what is open where this raises.

        Raises: DriverError.
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
        """Raise DriverError where a worker that dies would lose something."""
        target = self.options.image
        if not image.features() & HAS_EXCLUSIVE_LOCK:
            raise DriverError(
                f"{target} has not the feature exclusive-lock, so that nothing would keep others from writing to it; "
                f"`rbd feature enable {target} exclusive-lock` gives it that",
                errno=errno.EPERM,
            )
        if image.is_mirror():
            raise DriverError(
                f"{target} is a mirror of an image in another cluster, and nobody writes to it here; "
                f"`rbd mirror image promote {target}` makes it the one that is written to, once that one is demoted",
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
            env.report("barrier", f"the cluster refuses a dead worker, for {ownership.DEAD_S / 3600:.0f} h")
        if limits:
            env.report("limits", limits)

    def _diff(self, since: str, size: int, gaps: Kind) -> Iterator[Extent]:
        """Yield what has changed, in whole sectors."""
        image = self._image
        assert image is not None  # noqa: S101 - only open layers are asked
        for start in range(0, size, _STEP):
            end = min(size, start + _STEP)
            yield from extents_of(image.diff(since, start, end - start), start, end, gaps)

    def _close(self) -> None:
        """Close what is open, the last one first. Raises: DriverError, about the image."""
        image, self._image = self._image, None
        pool, self._pool = self._pool, None
        cluster, self._cluster = self._cluster, None
        try:
            if image is not None:
                image.close()
                if self._owner is not None:
                    self._owner.text = ""  # nothing is under way, and the lock is given back
        finally:
            if pool is not None:
                pool.close()
            if cluster is not None:
                cluster.close()

    def _give_back(self, batch: list[Request]) -> None:
        self.complete(batch)
