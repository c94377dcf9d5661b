"""Being the one who writes to an image: its lock taken, and whoever had it before kept out for good.

Must not take a lock from anybody who may be alive, other than our own predecessors, which are dead; nor one that was
made by hand (`rbd lock add`), as librbd does not either.

    before      the address that our predecessor noted, if it did not close the image in order
    refuse      the cluster refuses all that comes from it, and from an owner that has gone silent (blocklist)
    break       the lock is taken from it
    note        our own address, before the lock is ours
    acquire     the lock is ours, and nobody gets it by asking
    mark        the image says which disk it serves

What a dead predecessor had sent may still be on its way, or wait at an OSD. An OSD does nothing for this client before
it knows the map in which the predecessor is refused, so nothing of that client comes after what this one writes.

That holds as long as the entry of the blocklist lives. Our predecessor's process is dead, so the entry has to outlive
what the network still carries: DEAD_S. Of an owner that is silent nobody knows that. Its host may stand still, and
write on after the entry has gone: SILENT_S makes that unlikely, and is no proof.
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
SILENT_S = 365 * 86400.0  # few hosts fall silent, so there are few such entries
_NOBODY = "192.0.2.1:0/"  # an address that no host has (RFC 5737); with a number behind it, as clients have


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
    """Have the image's lock, after `noted`, our predecessor's address, which is ours afterwards.

    `step` is what that is noted within: it raises where somebody else takes the lock instead, as we took too long.

    Raises: DriverError; EBUSY where somebody else has the lock, EACCES where our key could keep nobody out.
    """
    before, owners = noted.text, image.owners()
    _leave_alone(image, owners, before)
    # One order to the monitors each time: where nobody has to be kept out, to see that we could.
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
        raise DriverError(f"the image is in use by {quicker}, which has its lock", errno=errno.EBUSY) from problem


def _leave_alone(image: Image, owners: Sequence[Owner], before: str) -> None:
    """Raise DriverError with EBUSY about an owner that may be alive, or whose lock was made by hand."""
    strangers = [each for each in owners if each.address != before]
    alive = set(image.watchers()) if strangers else set()
    for each in strangers:
        if not each.is_client:
            problem = f"the image has the lock {each.cookie!r}, which {each} has made by hand; `rbd lock rm` removes it"
            raise DriverError(problem, errno=errno.EBUSY)
        if each.address in alive:
            raise DriverError(f"the image is in use by {each}, which has its lock", errno=errno.EBUSY)


def mark(image: Image, disk: str, *, goes_on: bool) -> None:
    """Write at the image which disk it serves, by a text that no other disk of any host has; the lock is ours.

    Where it `goes_on`, a guest has used the image through this disk before, so that nobody else may have meanwhile.

    Raises: DriverError, ESTALE where another disk has.
    """
    found = image.mark()
    if found == disk:
        return
    if goes_on:
        what = f"another disk has served the image meanwhile ({found})" if found else "the image has served no disk yet"
        raise DriverError(
            f"{what}, and the guest knows nothing of what is there; only if it has all that the guest wrote: "
            f"`rbd image-meta set IMAGE {MARK} '{disk}'`",
            errno=errno.ESTALE,
        )
    image.set_mark(disk)


def refuse(cluster: Cluster, address: str, seconds: float) -> None:
    """Have a cluster refuse a client for so long. Raises: DriverError, naming the right that our key lacks."""
    try:
        cluster.refuse(address, seconds)
    except DriverError as problem:
        if problem.errno not in (errno.EACCES, errno.EPERM):
            raise
        user = f"client.{cluster.user}"
        raise DriverError(
            f"the key of {user} may not put a client on the cluster's blocklist, so nothing would keep a worker that "
            f"has died from writing; `ceph auth caps {user} mon 'profile rbd' osd 'profile rbd pool=...'` allows it",
            errno=errno.EACCES,
        ) from problem
