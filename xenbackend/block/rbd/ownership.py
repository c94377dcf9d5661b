"""Becomes the only writer of an image: takes its lock, and shuts out the former owner for good.

Must not take a lock from anybody who may be alive, other than our own predecessors, which are dead; nor one that was
made by hand (`rbd lock add`), as librbd does not either.

    before      the address that our predecessor noted, if it did not close the image in order
    refuse      the cluster refuses everything from there, and from an owner that has gone silent (blocklist)
    break       their locks are removed
    note        our own address is noted, before the lock is ours
    acquire     the lock is ours, and nobody gets it by asking
    mark        the image records which disk it serves

Requests that a dead predecessor sent may still be on their way, or waiting at an OSD. An OSD does nothing for this
client before it has the map in which the predecessor is refused, so no write of the predecessor lands after one of
ours.

That is true as long as the entry in the blocklist exists. Our predecessor's process is dead, so the entry only has to
outlive what the network still carries: DEAD_S. A silent owner may not be dead: its host may be suspended, and write
again after the entry has expired. SILENT_S makes that unlikely, but not impossible.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from xenbackend.block.rbd.noted import Noted
from xenbackend.ceph.image import MARK, Owner
from xenbackend.errors import DriverError

DEAD_S = 86400.0
SILENT_S = 365 * 86400.0  # hosts rarely fall silent, so there are few such entries
_NOBODY = "192.0.2.1:0/"  # an address that no host has (RFC 5737); a number follows it, as for clients


class Cluster(Protocol):
    """As `ceph.cluster.Cluster`."""

    user: str

    def address(self) -> str:
        """As `ceph.cluster.Cluster`."""

    def refuse(self, address: str, seconds: float) -> None:
        """As `ceph.cluster.Cluster`."""


class Image(Protocol):
    """As `ceph.image.Image`."""

    def owners(self) -> list[Owner]:
        """As `ceph.image.Image`."""

    def watchers(self) -> list[str]:
        """As `ceph.image.Image`."""

    def break_lock(self, owner: Owner) -> None:
        """As `ceph.image.Image`."""

    def acquire(self) -> None:
        """As `ceph.image.Image`."""

    def mark(self) -> str:
        """As `ceph.image.Image`."""

    def set_mark(self, disk: str) -> None:
        """As `ceph.image.Image`."""


def take(
    cluster: Cluster, image: Image, noted: Noted, step: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    """Take the image's lock. `noted` has our predecessor's address before, and our own afterwards.

    Our address is noted inside `step()`, which raises if we took too long, so that somebody else takes the lock now.

    Raises: DriverError; EBUSY if somebody else has the lock, EACCES if our key does not let us shut anybody out.
    """
    before, owners = noted.text, image.owners()
    _leave_alone(image, owners, before)
    # There is always a command to the monitors: if nobody has to be refused, it tells whether we could do that.
    mine = cluster.address()
    refused = {owner.address: SILENT_S for owner in owners} | ({before: DEAD_S} if before else {})
    if refused:
        for address, seconds in refused.items():
            refuse(cluster, address, seconds)
    else:
        refuse(cluster, _NOBODY + mine.rpartition("/")[2], 1.0)
    for owner in owners:
        image.break_lock(owner)
    with step():
        noted.text = mine
    try:
        image.acquire()
    except DriverError as problem:
        if problem.errno != errno.EROFS:
            raise
        quicker = ", ".join(map(str, image.owners())) or "somebody"
        raise DriverError(f"the image is in use by {quicker}, which holds its lock", errno=errno.EBUSY) from problem


def _leave_alone(image: Image, owners: Sequence[Owner], before: str) -> None:
    """Raise DriverError (EBUSY) if an owner may be alive, or if its lock was made by hand."""
    strangers = [each for each in owners if each.address != before]
    alive = set(image.watchers()) if strangers else set()
    for each in strangers:
        if not each.is_client:
            problem = (
                f"the image has the lock {each.cookie!r}, which {each} has taken by hand; remove it with `rbd lock rm`"
            )
            raise DriverError(problem, errno=errno.EBUSY)
        if each.address in alive:
            raise DriverError(f"the image is in use by {each}, which holds its lock", errno=errno.EBUSY)


def mark(image: Image, disk: str, *, goes_on: bool) -> None:
    """Record in the image which disk it serves: a text that is unique among all hosts' disks. The lock is ours.

    `goes_on`: a guest has used the image through this disk before, so no other disk may have served it meanwhile.

    Raises: DriverError, ESTALE if another disk has.
    """
    found = image.mark()
    if found == disk:
        return
    if goes_on:
        what = (
            f"the image has meanwhile been served as another disk ({found})"
            if found
            else "the image has not been served as any disk yet"
        )
        raise DriverError(
            f"{what}, so it may not hold what the guest wrote; if you are certain that it does: `rbd image-meta set "
            f"IMAGE {MARK} '{disk}'`",
            errno=errno.ESTALE,
        )
    image.set_mark(disk)


def refuse(cluster: Cluster, address: str, seconds: float) -> None:
    """Have the cluster refuse a client for so many seconds. Raises: DriverError that names the right our key lacks."""
    try:
        cluster.refuse(address, seconds)
    except DriverError as problem:
        if problem.errno not in (errno.EACCES, errno.EPERM):
            raise
        user = f"client.{cluster.user}"
        raise DriverError(
            f"the key of {user} may not put a client on the cluster's blocklist, so a dead worker's writes could "
            f"still arrive; allow it: `ceph auth caps {user} mon 'profile rbd' osd 'profile rbd pool=...'`",
            errno=errno.EACCES,
        ) from problem
