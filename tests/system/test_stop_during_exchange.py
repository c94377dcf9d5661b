"""If a service is stopped while a disk's chain is exchanged, what the guest has written is there afterwards."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.until import until
from xenbackend.blkif.abi import BLKIF_OP_WRITE
from xenbackend.embedded.machine import Machine
from xenbackend.errors import XenbackendError
from xenbackend.rig.frontend import Wishes

pytestmark = pytest.mark.slow

PATIENCE_S = 30.0  # limit for events that must happen; only a failing test takes this long
_PAGE = 4096


@contextmanager
def _asking(machine: Machine, request: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Give an order in the background; its answer is in the list once the block has ended."""
    answers: list[dict[str, Any]] = []

    def ask() -> None:
        with suppress(XenbackendError):
            answers.append(machine.ask(request))

    asking = threading.Thread(target=ask)
    asking.start()
    yield answers
    asking.join(PATIENCE_S)
    assert not asking.is_alive()


def _ask_to_stop(machine: Machine) -> None:
    with suppress(XenbackendError):
        machine.ask({"verb": "stop"})


def _stop(machine: Machine, how: str) -> None:
    """Start to stop the service by SIGTERM or by the order `stop`, and return once it has begun."""
    if how == "SIGTERM":
        os.kill(machine.service_pid, signal.SIGTERM)
    else:
        threading.Thread(target=_ask_to_stop, args=(machine,)).start()
    until(lambda: '"stopping"' in machine.log.read_text())


@pytest.mark.parametrize("how", ["SIGTERM", "stop"])
@pytest.mark.parametrize("phase", ["asked", "drains", "flushes", "done"])
def test_a_service_that_is_stopped_loses_no_chain(tmp_path: Path, phase: str, how: str) -> None:
    """In whatever step of an exchange a service is stopped, the next one serves the chain with the guest's last write.

    Nothing is kept for the next service.
    """
    image, new = tmp_path / "img", tmp_path / "new"
    for each in (image, new):
        each.write_bytes(bytes(1 << 20))
    slow = {"drains": "delay:write=1s|", "flushes": "delay:flush=1s|"}.get(phase, "")
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        frontend = guest.connect(machine.attach(5, "xvda", f"{slow}aio:{image}"), Wishes())
        worker = machine.ask({"verb": "status"})["data"][0]["worker"]
        pidfd = os.pidfd_open(worker)
        early = [frontend.submit(BLKIF_OP_WRITE, 0, data=b"a" * _PAGE)] if phase == "drains" else []
        if phase == "asked":
            os.kill(worker, signal.SIGSTOP)
        order = {"verb": "set", "vbd": "5/xvda", "chain": f"aio:{new}", "replace": True}
        with _asking(machine, order) as answers:
            until(lambda: answers or machine.ask({"verb": "status"})["data"][0]["under_way"])
            if phase == "done":
                until(lambda: answers)
            _stop(machine, how)
            if phase == "asked":
                waits = machine.ask({"verb": "ping"})["data"]["waits"]
                os.kill(worker, signal.SIGCONT)
                assert [{"vbd": "5/xvda", "for": "its chain, which is being exchanged"}] == waits
            late = frontend.submit(BLKIF_OP_WRITE, 8, data=b"b" * _PAGE)
            assert machine.service is not None
            machine.service.wait(PATIENCE_S)
        machine.service = None
        assert select.select([pidfd], [], [], PATIENCE_S)[0]
        os.close(pidfd)
        machine.start_service()
        frontend.wait([*early, late], PATIENCE_S)
        known = machine.ask({"verb": "status"})["data"][0]

        assert {0} == {each.status for each in [*early, late]}
        assert b"b" * _PAGE == frontend.read(8, 8)
        assert (f"aio:{new}", "") == (known["chain"], known["error"])
        assert [("ok", f"aio:{new}")] == [(each["code"], each["data"]["chain"]) for each in answers]
        frontend.close()
