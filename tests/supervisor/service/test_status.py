"""What `status` reports about a disk and about the service: the keys that clients use."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from tests.answering import DISK, LAYER
from xenbackend import __version__, counters
from xenbackend.blkif.handshake import XenbusState
from xenbackend.protocol.messages import LayerFacts
from xenbackend.protocol.opening import Meaning
from xenbackend.supervisor.service import status
from xenbackend.supervisor.service.status import describe_briefly, describe_service, started_at
from xenbackend.supervisor.vbd.notes import Notes
from xenbackend.supervisor.xenstore.paths import VbdPath

NOW = 5000.0  # by the loop's clock, which a test may set
FILES = {"/img": "file device=1 inode=2", "/parent": "file device=1 inode=3"}


def vbd(**changes: Any) -> Any:
    """Return a stand-in for a vbd, as far as `describe` uses it; its worker is this process."""
    page = memoryview(bytearray(counters.SIZE))
    page.cast("Q")[counters.INDEX["reads"]] = 7
    page.cast("Q")[counters.HISTOGRAM + 17] = 3
    device = SimpleNamespace(
        sight=SimpleNamespace(
            spec=SimpleNamespace(read_only=False), ours=XenbusState.CONNECTED, theirs=XenbusState.INITIALISED
        ),
        phase=SimpleNamespace(value="serving"),
        error="a flush failed: EIO",
        reason="flush-failed",
        layers=[LayerFacts(**LAYER)],
    )
    values: dict[str, Any] = {
        "path": VbdPath("vbd", 0, 5, 51712),
        "device": device,
        "worker": SimpleNamespace(
            pid=os.getpid(), is_there=True, walls=["user"], no_walls={"landlock": "no"}, needs=["network"]
        ),
        "handover": SimpleNamespace(
            notes=Notes(program="0.0.1", restarts=2), page=page, files=SimpleNamespace(identities=lambda: dict(FILES))
        ),
        "orders": SimpleNamespace(paused_by="", under_way=[SimpleNamespace(number=17, verb="set", chain="aio:/b")]),
        "link": SimpleNamespace(waits_since=NOW - 12, waits_for="storage"),
        "since": 100.0,
        "chain_in_service": lambda: "aio:/img",
    }
    return SimpleNamespace(**values | changes)


def describe(one: Any, *rest: Any, **more: Any) -> dict[str, Any]:
    """Return what is known of a disk at the time NOW."""
    return status.describe(one, *rest, now=NOW, **more)


def test_what_xenstore_shows_has_a_time_with_its_zone() -> None:
    """The time since when a disk is in its phase, as people read it in xenstore, means the same on any host."""
    since = datetime.fromisoformat(describe_briefly(vbd())["since"])

    assert (100.0, True) == (since.timestamp(), since.utcoffset() is not None)


def test_a_disk_has_the_keys_that_clients_go_by() -> None:
    """The description has exactly the keys that the command line's tests are given, and docs/json.md lists."""
    assert set(DISK) == set(describe(vbd()))
    assert set(DISK["counters"]) <= set(describe(vbd())["counters"])


def test_whether_a_name_means_the_disks_file_still() -> None:
    """Each file of a disk is listed, and, if it was looked up, whether its name still means that file."""
    not_looked = describe(vbd())["files"]
    found = {
        "same": Meaning("/img", FILES["/img"]),
        "other": Meaning("/img", "file device=1 inode=9"),
        "gone": Meaning("/img", errno=errno.ENOENT),
        "unknown": Meaning("/img", errno=errno.EIO),
    }

    assert [("/img", ""), ("/parent", "")] == [(each["file"], each["now"]) for each in not_looked]
    for now, meaning in found.items():
        assert [now, ""] == [each["now"] for each in describe(vbd(), "", {"/img": meaning})["files"]]
    other = describe(vbd(), "", {"/img": found["other"]})["files"][0]
    assert "it is another file, inode 9, not 2" == other["difference"]


def test_what_an_administrator_needs_to_know() -> None:
    """A disk is described with its guest, its chain, what stops it, the orders under way, and its worker and since when
    that runs.
    """
    known = describe(vbd(), "mail")

    assert ("5/xvda", "vbd/5/51712", "mail", "aio:/img") == tuple(
        known[key] for key in ("vbd", "node", "guest", "chain")
    )
    assert ("Connected", "Initialised", "serving") == tuple(known[key] for key in ("state", "frontend_state", "phase"))
    assert ("flush-failed", "a flush failed: EIO") == (known["reason"], known["error"])
    assert (False, "", 2, [{"order": 17, "verb": "set"}]) == (
        known["paused"], known["paused_by"], known["restarts"], known["under_way"],
    )  # fmt: skip
    assert (os.getpid(), "0.0.1", True) == (known["worker"], known["worker_version"], known["needs_upgrade"])
    assert known["worker_since"] <= time.time()
    assert 12 <= known["waits_s"] < 60
    assert "storage" == known["waits_for"]
    assert describe(vbd(link=SimpleNamespace(waits_since=None, waits_for="")))["waits_s"] is None
    assert (7, 3) == (known["counters"]["reads"], known["latency_histogram"][17])
    assert "aio:/img" == known["layers"][0]["layer"]
    assert "text" not in known["layers"][0]


def test_a_pause_is_shown_with_who_made_it() -> None:
    """A pause is shown with who made it, or with an empty text if that is not known."""
    found = []
    for by in ("uid 0", "", None):
        paused = vbd()
        paused.handover.notes = Notes(paused=by)
        known = describe(paused)
        found.append((known["paused"], known["paused_by"]))

    assert [(True, "uid 0"), (True, ""), (False, "")] == found


def test_a_worker_that_waits_for_its_turn_is_none_yet() -> None:
    """A worker that has not been started yet is shown as none: without a process, a version and a start."""
    known = describe(vbd(worker=SimpleNamespace(pid=0, is_there=False, walls=[], no_walls={}, needs=[])))

    assert [None, None, "", False] == [
        known[key] for key in ("worker", "worker_since", "worker_version", "needs_upgrade")
    ]


def test_a_disk_without_a_worker() -> None:
    """A disk without a worker shows no start, no version and no need for an upgrade, but the counters of the last
    worker.
    """
    known = describe(vbd(worker=None))

    assert (None, None, "", False) == tuple(
        known[key] for key in ("worker", "worker_since", "worker_version", "needs_upgrade")
    )
    assert 7 == known["counters"]["reads"]
    handover = vbd().handover
    current = SimpleNamespace(notes=Notes(program=__version__), page=handover.page, files=handover.files)
    assert not describe(vbd(handover=current))["needs_upgrade"]


def test_a_process_has_a_start() -> None:
    """The start of a process is what the kernel says, to about a hundredth of a second; a process that has ended has
    none.
    """
    before = time.time()
    with subprocess.Popen(["sleep", "60"]) as process:
        started = started_at(process.pid)
        process.kill()
    store: Any = SimpleNamespace(address="/store", is_connected=False, why_lost="it has gone")
    service = describe_service(store, "xenbackend.rig.host")

    assert started is not None
    assert before - 0.1 <= started <= time.time() + 0.1
    assert started_at(process.pid) is None
    assert (os.getpid(), __version__) == (service["pid"], service["version"])
    assert service["since"] <= before
    assert ("xenbackend.rig.host", "/store", "it has gone") == tuple(
        service[key] for key in ("host", "store", "store_error")
    )
    store.is_connected = True
    assert "" == describe_service(store, "")["store_error"]


def test_what_layers_count_is_shown_by_name() -> None:
    """Each layer's figures are shown by name, read from the counters' page without asking the worker."""
    shown = vbd()
    shown.handover.page.cast("Q")[counters.FIGURES + 1] = 12
    shown.device.layers = [LayerFacts(**LAYER | {"figures": figures}) for figures in (["held"], ["waiting"], [])]

    assert [{"held": 0}, {"waiting": 12}, {}] == [layer["figures"] for layer in describe(shown)["layers"]]
