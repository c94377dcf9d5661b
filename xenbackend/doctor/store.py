"""Looks at xenstore: whether it answers, and what it has about our disks, in case no service answers.

Must not write a node or set a watch.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator
from typing import Any

from xenbackend.blkif.handshake import parse_state
from xenbackend.disks import DiskName
from xenbackend.doctor.finding import Finding, ok, unknown, wrong
from xenbackend.doctor.place import DOM0, Place
from xenbackend.doctor.probes import Result
from xenbackend.errors import ConfigError, StoreError, printable
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.vbd.spec import frontend_path, in_one_line, is_ours, parse_spec
from xenbackend.supervisor.xenstore.paths import VbdPath, domain_path, parse_backend_path
from xenbackend.supervisor.xenstore.store import Store, find_address

ANSWER_S = 2.0
_KEYS = ("script", "frontend", "params", "state", "online", "mode", "device-type", "removable", "hotplug-status",
         "hotplug-error")  # fmt: skip
_REFUSED = (errno.EACCES, errno.EPERM)
Known = dict[str, Any]


def look(address: str, settings: Settings, wanted: DiskName | None, place: Place = DOM0) -> Result:
    """Return whether xenstore answers. The result's data are a record for each of our disks, or for the `wanted` one.

    `address` is that of xenstore; if it is empty, it is found as xenstore's own tools do.
    """
    try:
        with Store(address or find_address(), timeout_s=ANSWER_S) as store:
            domid = store.own_domid()
            found = [ok("xenstored", f"it answers at {store.address}; our domain is {domid}")]
            return Result(found, _disks(store, domid, settings, wanted))
    except StoreError as error:
        return Result([_why_not(error, place)])


def _why_not(error: StoreError, place: Place) -> Finding:
    cause = error.__context__
    if isinstance(cause, OSError) and cause.errno in _REFUSED:
        return unknown("xenstored", f"{error}: only root may ask it", "sudo xenbackend doctor")
    where = "; it does not run in this domain, but in dom0 or in one of its own" if place.is_guest else ""
    return wrong("xenstored", f"{error}{where}", place.xenstored)


def _disks(store: Store, domid: int, settings: Settings, wanted: DiskName | None) -> list[Known]:
    found = []
    for path in paths(store, domid, settings.kinds):
        name = store.read_if_allowed(f"{domain_path(path.frontend_domid)}/name") or ""
        known = _disk(store, path, name, settings.scripts)
        if wanted is None:
            is_meant = known["ours"] or settings.serve == "all"
        else:
            is_meant = wanted.means(path.kind, path.frontend_domid, path.devid, name)
        if is_meant:
            found.append(known)
    return found


def paths(store: Store, domid: int, kinds: Collection[str]) -> Iterator[VbdPath]:
    """Yield the disks that toolstacks have created for our domain, `domid`. Raises: StoreError."""
    home = f"{domain_path(domid)}/backend"
    for kind in kinds:
        for guest in store.directory(f"{home}/{kind}"):
            for device in store.directory(f"{home}/{kind}/{guest}"):
                found = parse_backend_path(f"{home}/{kind}/{guest}/{device}", domid)
                if found is not None:
                    yield found[0]


def _disk(store: Store, path: VbdPath, guest: str, scripts: Collection[str]) -> Known:
    """Return what xenstore has about one disk; keys that `status` has, too, have the same names."""
    keys = store.read_many(path.backend, _KEYS)
    chain = mistake = ""
    read_only = None
    theirs = None
    try:
        spec = parse_spec(path, keys)
        chain, read_only = spec.chain, spec.read_only
    except ConfigError as error:
        mistake = in_one_line(error)
    try:
        frontend = frontend_path(path, keys)
        theirs = store.read_optional(f"{frontend}/state") if frontend else None
    except (ConfigError, StoreError):
        theirs = None  # `mistake` is about that
    return {
        "vbd": path.disk,
        "node": str(path),
        "guest": printable(guest),
        "ours": is_ours(keys, scripts),
        "script": printable(keys.get("script", "")),
        "chain": chain,
        "read_only": read_only,
        "mistake": mistake,
        "ours_state": parse_state(keys.get("state")).value,
        "theirs_state": parse_state(theirs).value,
        "hotplug": keys.get("hotplug-status", ""),
        "hotplug_error": printable(keys.get("hotplug-error", "")),
    }
