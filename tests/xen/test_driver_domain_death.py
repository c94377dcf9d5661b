"""The death and the return of a driver domain whose disks a guest uses."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.xen.test_driver_domain import GONE, IMAGE, OTHER, blank, get, put
from tests.xen.tools.command import xl
from tests.xen.tools.driver_domain import driver_domain
from tests.xen.tools.guest import Guest
from tests.xen.tools.kills import complaints
from tests.xen.tools.load import Load, verify

STILL_S = 10  # how long a request waits, in the guest's time
pytestmark = pytest.mark.needs_host(0.7)  # as in test_driver_domain.py


def test_it_dies_and_comes_back(new_guest: Callable[..., Guest]) -> None:
    """When a driver domain dies the guest waits: no request fails or is answered, as with a dead blkback domain.

    What the guest had flushed is on the disk. A disk without requests in flight can be detached, and attached again
    from the new driver domain; with requests in flight the guest has to be restarted.
    """
    with driver_domain() as storage:
        blank(storage, IMAGE, OTHER)
        busy, idle = storage.line(f"log:|aio:{IMAGE}", "xvda"), storage.line(f"aio:{OTHER}", "xvdb")
        guest = new_guest(disks=[busy]).create().wait_until_ready()
        xl("block-attach", guest.domid, idle)
        put(guest, "xvda", "kept")
        put(guest, "xvdb", "kept")
        load = Load(guest, "xvda")
        load.wait_until_it_writes(storage)
        since, former = len(guest.log), storage.domid
        storage.end()
        guest.run(f"sleep {STILL_S}")
        stuck = guest.run("cat /sys/block/xvda/inflight").split()
        assert (False, []) == (load.is_over(), complaints(guest, since))
        assert ["0", "0"] != stuck

        storage.boot()
        assert former != storage.domid
        detached = xl("block-detach", guest.domid, "xvdb")
        guest.run(GONE.format("xvdb"))
        xl("block-attach", guest.domid, idle)
        assert "kept" == get(guest, "xvdb")

        destroyed = xl("destroy", guest.domid)
        guest.wait_until_gone()
        guest.create().wait_for("@ready.*@ready")
        assert "kept" == get(guest, "xvda")
        guest.run(verify("/dev/xvda", "1m"))
        ended = xl("destroy", guest.domid)
        guest.wait_until_gone()

    assert [False, False, False] == [each.has_waited for each in (detached, destroyed, ended)]
