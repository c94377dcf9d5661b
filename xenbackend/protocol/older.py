"""What an older service does not say yet: each key that was added to its answers, with the value that means "not told".

Must not change what was said. Whoever asks finds every key that docs/json.md has, whichever service answers: a program
is upgraded before the service that it talks to is restarted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xenbackend import counters
from xenbackend.disks import vdev_to_devid
from xenbackend.errors import ConfigError

Known = dict[str, Any]
SERVICE: Known = {
    "pid": 0, "version": "?", "since": None, "bugs": 0, "breaches": 0, "host": "", "store": "", "store_error": "",
    "waits": [],
}  # fmt: skip
DISK: Known = {
    "vbd": "", "node": "", "kind": "vbd", "domid": 0, "guest": "", "device": "", "chain": "", "read_only": None,
    "state": "Unknown", "frontend_state": "Unknown", "phase": "", "since": 0.0, "braked_s": 0.0, "paused": False,
    "paused_by": "", "reason": "", "error": "", "under_way": [], "waits_s": None, "waits_for": "", "worker": None,
    "worker_since": None, "worker_version": "", "needs_upgrade": False, "restarts": 0, "layers": [], "walls": [],
    "no_walls": {}, "needs": [], "files": [], "counters": dict.fromkeys(counters.NAMES, 0),
    "latency_histogram": [0] * counters.BUCKETS,
}  # fmt: skip
LAYER: Known = {
    "size": 0, "sector_size": 0, "read_only": False, "can_flush": False, "can_discard": False,
    "discard_granularity": 0, "discard_alignment": 0, "physical_sector_size": 0, "parent_of": "", "facts": {},
    "figures": {},
}  # fmt: skip
ORDER: Known = {
    "number": 0, "verb": "", "vbd": "", "who": {}, "from": "", "to": "", "began": 0.0, "ended": None, "code": "",
    "error": "",
}  # fmt: skip
STOP: Known = {"pid": 0, "untold": []}
_UNTOLD: Known = {"vbd": "", "chain": "", "next_chain": ""}


def completed(verb: object, data: Any) -> Any:
    """Return what a service has answered to `verb`, with every key."""
    if verb == "ping" and isinstance(data, Mapping):
        return {**SERVICE, **data}
    if verb == "stop" and isinstance(data, Mapping):
        stop = {**STOP, **data}
        return stop | {"untold": [{**_UNTOLD, **each} for each in stop["untold"]]}
    if verb == "status" and isinstance(data, list):
        return [_disk(each) for each in data]
    if verb == "orders" and isinstance(data, list):
        return [{**ORDER, **each} for each in data]
    return data


def _disk(said: Mapping[str, Any]) -> Known:
    known = {**DISK, **said}
    known["node"] = known["node"] or _node(known)
    known["counters"] = DISK["counters"] | known["counters"]
    short = counters.BUCKETS - len(known["latency_histogram"])
    known["latency_histogram"] = [*known["latency_histogram"], *[0] * short]
    known["layers"] = [_layer(each) for each in known["layers"]]
    return known


def _layer(said: Mapping[str, Any]) -> Known:
    layer = {**LAYER, **said}
    return layer if "layer" in layer else {"layer": layer.pop("text", ""), **layer}


def _node(known: Mapping[str, Any]) -> str:
    try:
        return f"{known['kind']}/{known['domid']}/{vdev_to_devid(known['device'])}"
    except ConfigError:
        return f"{known['kind']}/{known['domid']}/0"
