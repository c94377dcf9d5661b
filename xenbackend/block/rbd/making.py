"""Commands on a cluster's images that no guest uses: makes one that appears complete, takes a lock from a dead owner.

Must not be called by a worker, nor write an image's data: a command that makes an image opens its chain for that.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from xenbackend.block import grammar
from xenbackend.block.rbd.ownership import SILENT_S, refuse
from xenbackend.block.rbd.target import Target
from xenbackend.block.servers import Account
from xenbackend.block.spec import LayerSpec
from xenbackend.ceph.bounded import within
from xenbackend.ceph.cluster import Cluster
from xenbackend.ceph.image import Image, Owner, Pool
from xenbackend.errors import DriverError

CALL_S = 60.0  # seconds that each operation of a cluster may take
PARTIAL = ".partial"  # appended to the name of an image that is not complete yet


@dataclass(frozen=True, slots=True)
class Place:
    """The place of an image: a pool of a cluster to which this process is connected."""

    cluster: Cluster
    pool: Pool

    def create(self, name: str, size: int) -> None:
        """Create an image of zeros, of `size` bytes. Raises: DriverError, EEXIST if there is one of that name."""
        within(CALL_S, f"{name} is not made yet", lambda: self.pool.create(name, size))

    def rename(self, former: str, name: str) -> None:
        """Rename an image. Raises: DriverError, EEXIST if there is an image called `name`."""
        within(CALL_S, f"{former} is not renamed yet", lambda: self.pool.rename(former, name))

    def remove(self, name: str) -> None:
        """Remove an image that nobody has open. Raises: DriverError."""
        within(CALL_S, f"{name} is not removed yet", lambda: self.pool.remove(name))

    def has(self, name: str) -> bool:
        """Return whether there is an image of this name. Raises: DriverError."""

        def look() -> bool:
            try:
                Image(self.cluster, self.pool, name, read_only=True).close()
            except DriverError as problem:
                if problem.errno != errno.ENOENT:
                    raise
                return False
            return True

        return within(CALL_S, f"{name} is not found yet", look)

    def take_lock(self, name: str, owner: str) -> Owner:
        """Take an image's lock from `owner`, have the cluster refuse that client, and return it.

        Raises: DriverError; ENOENT if nobody has the lock, EBUSY if somebody else has it.
        """

        def take() -> Owner:
            image = Image(self.cluster, self.pool, name, read_only=True)
            try:
                return _take_from(self.cluster, image, owner)
            finally:
                image.close()

        return within(CALL_S, f"the lock of {name} is not taken yet", take)


@contextmanager
def place_of(options: Any, settings: Mapping[str, str]) -> Iterator[Place]:
    """Connect to the place where the image of a layer's options is, or will be. Raises: DriverError."""
    target, account = _target(options), _account(options)

    def connect() -> Place:
        cluster = Cluster(account.user, settings)
        try:
            return Place(cluster, Pool(cluster, target.pool, target.namespace))
        except BaseException:
            cluster.close()
            raise

    def disconnect() -> None:
        place.pool.close()
        place.cluster.close()

    place = within(CALL_S, f"{target.pool} is not open yet", connect)
    try:
        yield place
    finally:
        with suppress(DriverError):  # the connection is given up in any case
            within(CALL_S, "", disconnect)


def partial_of(layer: LayerSpec) -> str:
    """Return the text of the layer for an image while it is being made. Raises: DriverError if it cannot be made."""
    target = _target(layer.options)
    if target.snapshot:
        raise DriverError(f"{target} is a snapshot, and can only be opened read-only", errno=errno.EROFS)
    (parsed,) = grammar.parse(layer.text)
    partial = replace(target, image=f"{target.image}{PARTIAL}")
    return grammar.format_layer(parsed.name, str(partial), *(item.text for item in parsed.items[1:]))


def _take_from(cluster: Cluster, image: Image, owner: str) -> Owner:
    found = image.owners()
    if not found:
        raise DriverError("no client has the image's lock", errno=errno.ENOENT)
    for each in found:
        if not each.is_client:
            problem = (
                f"the image has the lock {each.cookie!r}, which {each} has taken by hand; remove it with `rbd lock rm`"
            )
            raise DriverError(problem, errno=errno.EBUSY)
        if owner not in (each.client, each.address):
            is_named = f"{each} has the image's lock"
            raise DriverError(f"{is_named}, and not {owner}" if owner else is_named, errno=errno.EBUSY)
    for each in found:
        refuse(cluster, each.address, SILENT_S)
        image.break_lock(each)
    return found[0]


def _target(options: Any) -> Target:
    target = getattr(options, "image", None)
    assert isinstance(target, Target)  # noqa: S101 - the options are those of the driver rbd
    return target


def _account(options: Any) -> Account:
    account = getattr(options, "account", None)
    assert isinstance(account, Account)  # noqa: S101 - the same
    return account
