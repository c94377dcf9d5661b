"""What is known of each disk and of the service, as plain values for people and scripts.

Must not ask a worker: counters are read from the page that it shares, so a worker that hangs is described as well.
Times are seconds since 1970. docs/json.md says what each key means.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xenbackend import __version__, counters
from xenbackend.blkif.handshake import name
from xenbackend.disks import devid_to_vdev
from xenbackend.kernel.identity import difference, from_text
from xenbackend.protocol.opening import Meaning
from xenbackend.supervisor.xenstore.nodes import SENTENCE_MAX
from xenbackend.units import format_time

if TYPE_CHECKING:
    from xenbackend.protocol import messages
    from xenbackend.supervisor.vbd.vbd import Vbd
    from xenbackend.supervisor.xenstore.store import Store


def describe(
    vbd: Vbd, guest: str = "", meanings: Mapping[str, Meaning] | None = None, *, now: float, braked_s: float = 0.0
) -> dict[str, Any]:
    """Return what is known of one disk.

    `guest` is the name of its frontend's domain. `meanings` are what names mean now, as far as they were looked up.
    `now` is the time of the service's loop. `braked_s` is the pause between two looks at a guest that writes to
    xenstore without end.
    """
    path, device, notes = vbd.path, vbd.device, vbd.handover.notes
    page = memoryview(bytes(vbd.handover.page[: counters.SIZE]))  # also of a worker that has ended
    pid = vbd.worker.pid if vbd.worker and vbd.worker.is_there else None
    return {
        "vbd": path.disk,
        "node": str(path),
        "kind": path.kind,
        "domid": path.frontend_domid,
        "guest": guest,
        "device": devid_to_vdev(path.devid),
        "chain": vbd.chain_in_service(),
        "read_only": device.sight.spec.read_only if device.sight.spec else None,
        "state": name(device.sight.ours),
        "frontend_state": name(device.sight.theirs),
        "phase": device.phase.value,
        "since": vbd.since,
        "braked_s": braked_s,
        "paused": notes.paused is not None,
        "paused_by": notes.paused or "",
        "reason": device.reason,
        "error": device.error,
        "waits_s": None if vbd.link.waits_since is None else round(now - vbd.link.waits_since, 1),
        "waits_for": vbd.link.waits_for,
        "under_way": [{"order": each.number, "verb": each.verb} for each in vbd.orders.under_way if each.number > 0],
        "worker": pid,
        "worker_since": None if pid is None else started_at(pid),
        "worker_version": notes.program if pid is not None else "",
        "needs_upgrade": pid is not None and notes.program != __version__,
        "walls": vbd.worker.walls if vbd.worker else [],
        "no_walls": vbd.worker.no_walls if vbd.worker else {},
        "needs": vbd.worker.needs if vbd.worker else [],
        "restarts": notes.restarts,
        "layers": describe_layers(device.layers, page),
        "files": [
            describe_file(name, identity, (meanings or {}).get(name))
            for name, identity in vbd.handover.files.identities().items()
        ],
        "counters": counters.snapshot(page),
        "latency_histogram": counters.histogram(page),
        "latency_by_operation": counters.by_operation(page),
    }


def describe_layers(layers: Sequence[messages.LayerFacts], page: memoryview) -> list[dict[str, Any]]:
    """Return what is known of each layer of a chain, with its figures from the page of counters."""
    counted = counters.figures(page, [each.figures for each in layers])
    described = zip(map(asdict, layers), counted, strict=True)
    return [{"layer": values.pop("text"), **values, "figures": figures} for values, figures in described]


def describe_file(name: str, identity: str, meaning: Meaning | None) -> dict[str, Any]:
    """Return what is known of one file of a disk: whether its name still leads to it."""
    now, sentence = "", ""
    if meaning is not None and meaning.identity:
        differs = difference(from_text(identity), from_text(meaning.identity))
        now, sentence = ("other", differs) if differs else ("same", "")
    elif meaning is not None:
        now = "gone" if meaning.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENXIO) else "unknown"
        sentence = os.strerror(meaning.errno)
    return {"file": name, "now": now, "difference": sentence}


def describe_briefly(vbd: Vbd) -> dict[str, str]:
    """Return what is shown in xenstore about one disk, for people and scripts in dom0."""
    return {
        "chain": vbd.chain_in_service(),
        "worker": str(vbd.worker.pid) if vbd.worker and vbd.worker.is_there else "",
        "phase": vbd.device.phase.value,
        "since": format_time(vbd.since),
        "paused": vbd.orders.paused_by,
        "error": vbd.device.error[:SENTENCE_MAX],
    }


def describe_service(store: Store, host: str) -> dict[str, Any]:
    """Return what is known of this process, for the answer to `ping`; `host` is the module that grants come from."""
    own = {"pid": os.getpid(), "version": __version__, "since": started_at(os.getpid()), "host": host}
    return own | {"store": store.address, "store_error": "" if store.is_connected else store.why_lost}


def started_at(pid: int) -> float | None:
    """Return when a process was started, None if it has gone. Source: proc_pid_stat(5), field 22."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return round(time.time() - age_s, 2)
