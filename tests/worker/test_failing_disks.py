"""A disk that fails again and again below a guest: one is full, another fails its flushes.

`make figures` runs the tests at length: they take as many turns as `--requests` asks for, divided by 50.
"""

from __future__ import annotations

import errno
from random import Random

import pytest

from tests import figures
from tests.served import SIZE, HeldDisk, Served
from tests.workload import Load, make_model
from xenbackend.blkif.abi import BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE, BLKIF_RSP_ERROR
from xenbackend.block.request import Op, Request
from xenbackend.rig.frontend import Wishes
from xenbackend.units import PAGE, SECTOR


class FullDisk(HeldDisk):
    """A disk that has room for `room` more writes."""

    room = 1 << 30
    refused = 0

    def give_back(self, batch: list[Request] | None = None) -> None:
        """Complete a batch; writes beyond the room fail."""
        assert batch is not None
        for request in batch:
            self.errors = {}
            if request.op == Op.WRITE:
                self.room -= 1
                if self.room < 0:
                    self.refused += 1
                    self.errors = {Op.WRITE: errno.ENOSPC}
            super().give_back([request])


def turns(request: pytest.FixtureRequest) -> int:
    """Return how many turns were asked for."""
    return max(1, int(request.config.getoption("--requests")) // 50)


def test_a_full_disk_loses_nothing(vbd: Served, request: pytest.FixtureRequest) -> None:
    """However often a disk is full and has room again, the guest sees no error, and reads what it wrote."""
    disk = vbd.disk = FullDisk()
    chance = Random(request.config.getoption("--seed"))
    model = make_model(chance.getrandbits(32), SIZE // SECTOR, 32)
    load = Load(vbd.connect(Wishes(persistent=True)), model)
    was_full = 0
    for _ in range(turns(request)):
        disk.room, disk.refused = chance.randrange(8), 0
        load.top_up(16)
        for ring in vbd.frontend.rings:
            ring.push()
        vbd.step(4)
        was_full += disk.refused > 0
        disk.room = 1 << 30
        vbd.pass_time(2.0)
        load.finish()
        assert vbd.connection is not None
        assert "" == vbd.connection.trouble

    assert was_full > turns(request) // 4
    assert 0 == model.failures
    figures.add("full disks", was_full)


def test_no_failed_flush_is_acknowledged(vbd: Served, request: pytest.FixtureRequest) -> None:
    """No failed flush is answered as successful, whatever its error and however many are in flight."""
    chance = Random(request.config.getoption("--seed"))
    failed = 0
    for _ in range(turns(request)):
        vbd.disk.errors, vbd.disk.holding = {}, True
        frontend = vbd.connect()
        frontend.submit(BLKIF_OP_WRITE, 0, data=bytes(PAGE))
        flushes = [frontend.submit(BLKIF_OP_FLUSH_DISKCACHE) for _ in range(chance.randint(1, 5))]
        vbd.step(3)
        vbd.disk.errors = {
            Op.FLUSH: chance.choice((errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ETIMEDOUT))
        }
        held = vbd.disk.held
        chance.shuffle(held)
        vbd.disk.give_back(list(held))
        vbd.step(3)
        frontend.poll()
        assert [None] * len(flushes) == [each.status for each in flushes]
        assert vbd.disconnect()
        frontend.poll()
        assert [BLKIF_RSP_ERROR] * len(flushes) == [each.status for each in flushes]
        failed += len(flushes)
        for ring in frontend.rings:
            ring.close()
        vbd.alarms.clear()
    figures.add("failed flushes", failed)
