"""What is known of each vbd, as plain values for people and scripts, and the rates between two such pictures.

Must not ask a worker: counters are read from the page that it shares, so a worker that hangs is described as well.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from xenbackend import counters
from xenbackend.blkif.handshake import name
from xenbackend.supervisor.vbd.vbd import Vbd
from xenbackend.supervisor.xenstore.paths import devid_to_vdev

_PERCENTILES = (0.5, 0.99, 0.999)


def describe(vbd: Vbd) -> dict[str, Any]:
    """Return one vbd; durations in seconds unless the key says ns, times in seconds since 1970."""
    device, spec = vbd.device, vbd.device.spec
    page = vbd.counters_page()
    return {
        "vbd": str(vbd.path),
        "kind": vbd.path.kind,
        "domid": vbd.path.frontend_domid,
        "device": devid_to_vdev(vbd.path.devid),
        "chain": spec.chain if spec else "",
        "read_only": spec.read_only if spec else None,
        "state": name(device.ours),
        "frontend_state": name(device.theirs),
        "phase": device.phase.value,
        "worker": vbd.worker.pid if vbd.worker else None,
        "since": vbd.since,
        "error": device.error,
        "layers": [asdict(layer) for layer in device.layers],
        "counters": counters.snapshot(page) if page else {},
        "latency_ns": {f"{100 * each:g}%": counters.percentile_ns(page, each) for each in _PERCENTILES} if page else {},
    }


def rates(before: dict[str, Any], after: dict[str, Any], seconds: float) -> dict[str, float]:
    """Return requests and bytes per second of one vbd between two pictures; zeros where its worker is another one."""
    names = ("reads", "writes", "read_bytes", "written_bytes")
    if seconds <= 0 or before.get("worker") != after.get("worker"):
        return dict.fromkeys(names, 0.0)
    old, new = before.get("counters", {}), after.get("counters", {})
    return {each: max(0, new.get(each, 0) - old.get(each, 0)) / seconds for each in names}
