"""Answers of a service of any release, under the names of docs/json.md.

Must not import anything that draws or asks. Keys that this version does not know are passed on. Keys that an older
service leaves out get the values below, which mean "not told": a program is upgraded before the service is restarted,
and no command has to think of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from xenbackend import counters
from xenbackend.disks import vdev_to_devid
from xenbackend.errors import ConfigError

Values = dict[str, Any]

SERVICE: Values = {
    "pid": 0, "version": "", "since": None, "bugs": 0, "breaches": 0, "host": "", "store": "", "store_error": "",
    "waits": [],
}  # fmt: skip
DISK: Values = {  # without the keys that say which disk it is
    "guest": "", "chain": "", "read_only": None, "state": "Unknown", "frontend_state": "Unknown", "phase": "",
    "since": 0.0, "braked_s": 0.0, "paused": False, "paused_by": "", "reason": "", "error": "", "under_way": [],
    "waits_s": None, "waits_for": "", "worker": None, "worker_since": None, "worker_version": "",
    "needs_upgrade": False, "restarts": 0, "layers": [], "walls": [], "no_walls": {}, "needs": [], "files": [],
    "counters": dict.fromkeys(counters.NAMES, 0), "latency_histogram": [0] * counters.BUCKETS,
    "latency_by_operation": {each: {"sum_ns": 0, "buckets": [0] * counters.BUCKETS} for each in counters.OPERATIONS},
}  # fmt: skip
LAYER: Values = {
    "size": 0, "sector_size": 0, "read_only": False, "can_flush": False, "can_discard": False,
    "discard_granularity": 0, "discard_alignment": 0, "physical_sector_size": 0, "parent_of": "", "facts": {},
    "figures": {},
}  # fmt: skip
ORDER: Values = {
    "number": 0, "verb": "", "vbd": "", "who": {}, "from": "", "to": "", "began": 0.0, "ended": None, "code": "",
    "error": "", "token": "",
}  # fmt: skip
_NAMING = {"vbd", "kind", "domid", "device"}
STOP: Values = {"pid": 0, "untold": []}
UNTOLD: Values = {"vbd": "", "chain": "", "next_chain": ""}


def completed(verb: object, data: Any) -> Any:
    """Return a service's answer to `verb`, with every key.

    Raises: TypeError, AttributeError, for what no service answers.
    """
    if verb == "ping" and isinstance(data, Mapping):
        return _with(SERVICE, data)
    if verb == "stop" and isinstance(data, Mapping):
        stop = _with(STOP, data)
        return stop | {"untold": [_with(UNTOLD, each) for each in stop["untold"]]}
    if verb == "status" and isinstance(data, list):
        return [_disk(each) for each in data]
    if verb == "orders" and isinstance(data, list):
        return [_with(ORDER, each) for each in data]
    return data


def answered(data: Any) -> Values:
    """Return the data of the answer to an order, with its layers as `layer` has them; empty if it is no map."""
    values = dict(data) if isinstance(data, Mapping) else {}
    for key in ("layers", "before", "after"):
        if isinstance(values.get(key), list):
            values[key] = [layer(each) for each in values[key]]
    return values


def layer(said: Mapping[str, Any] | str) -> Values:
    """Return what a layer reported, or only its text, which becomes `layer`."""
    values = {"text": said} if isinstance(said, str) else dict(said)
    if isinstance(values.get("figures"), list):  # names only, as the chain is not in service
        del values["figures"]
    return {"layer": values.pop("text"), **values} if "text" in values else values


def _with(defaults: Values, said: Mapping[str, Any]) -> Values:
    """Return what was said, completed by copies of the defaults, as the caller may change the result."""
    return {**{key: value if key in said else deepcopy(value) for key, value in defaults.items()}, **said}


def _disk(said: Mapping[str, Any]) -> Values:
    values = _with(DISK, said)
    if "node" not in said and said.keys() >= _NAMING:
        values |= {"node": _node(said), "vbd": f"{said['domid']}/{said['device']}"}
    values["counters"] = DISK["counters"] | values["counters"]
    short = counters.BUCKETS - len(values["latency_histogram"])
    values["latency_histogram"] = [*values["latency_histogram"], *[0] * short]
    values["layers"] = [_with(LAYER, layer(each)) for each in values["layers"]]
    return values


def _node(said: Mapping[str, Any]) -> str:
    if str(said["vbd"]).count("/") == 2:  # release 0.1.0: its `vbd` was the node
        return str(said["vbd"])
    try:
        return f"{said['kind']}/{said['domid']}/{vdev_to_devid(said['device'])}"
    except ConfigError:
        return f"{said['kind']}/{said['domid']}/0"
