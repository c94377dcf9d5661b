"""Looks at the service: whether it answers, why not, which resources it has left, and what it says about its disks.

Must not give an order, nor wait for a service that does not answer.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from xenbackend.doctor.finding import Finding, ok, unknown, wrong
from xenbackend.doctor.place import DOM0, Place
from xenbackend.doctor.probes import Result
from xenbackend.host import activate
from xenbackend.host.files import UNIT
from xenbackend.kernel.process import state_of
from xenbackend.protocol.client import ServiceError, call
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.service.settings import Settings

ANSWER_S = 2.0
_FULL = 0.9  # of a limit of descriptors
_START = "systemctl start xenbackend"
_PROC = Path("/proc")


def look(control: str, place: Place = DOM0) -> Result:
    """Return whether the service answers on this socket.

    The result's data are a dictionary: `service`, its answer to `ping`, or as much of it as its process shows; `disks`,
    its answer to `status`, None if there was none. The data are None if nothing is known.
    """
    service: dict[str, Any] | None = None
    try:
        service = call(control, {"verb": "ping"}, ANSWER_S).data
        disks = call(control, {"verb": "status"}, ANSWER_S).data
    except ServiceError as problem:
        finding, shown = _why_not(control, problem, place)
        known = service if service and service["host"] else shown
        return Result([finding], {"service": known, "disks": None} if known else None)
    if not service["host"]:  # it is of a version that does not say
        service = {**service, **_shown_by(service["pid"])}
    found = [ok("service", f"version {service['version']}, process {service['pid']}, answers")]
    found += [*descriptors(service["pid"]), *look_at_walls(disks)]
    return Result(found, {"service": service, "disks": disks})


def descriptors(pid: int, proc: Path = _PROC) -> list[Finding]:
    """Return findings about the descriptors that the service has left, and systemd's store for it."""
    try:
        used = sum(1 for _ in (proc / str(pid) / "fd").iterdir())
        limits = (proc / str(pid) / "limits").read_text()
    except OSError as error:
        sentence = f"the descriptors of process {pid} cannot be counted: {error.strerror}"
        return [unknown("descriptors", sentence, "sudo xenbackend doctor")]
    most = int(next(line for line in limits.splitlines() if line.startswith("Max open files")).split()[3])
    unit = activate.unit_facts(ANSWER_S)
    stored, room = (int(unit.get(each) or 0) for each in ("NFileDescriptorStore", "FileDescriptorStoreMax"))
    if used > most * _FULL:
        sentence = f"the service has {used} of {most} descriptors open; each disk needs at least two"
        return [wrong("descriptors", sentence, "systemctl edit xenbackend  # LimitNOFILE=")]
    if room and unit.get("MainPID") == str(pid) and stored > room * _FULL:
        sentence = f"systemd keeps {stored} of {room} descriptors for the service; each disk needs at least four"
        command = "systemctl edit xenbackend  # FileDescriptorStoreMax=, and Environment=FDSTORE="
        return [wrong("descriptors", sentence, command)]
    kept = f", and systemd keeps {stored} of {room}" if room else ""
    return [ok("descriptors", f"the service has {used} of {most} open{kept}")]


def _why_not(control: str, problem: ServiceError, place: Place) -> tuple[Finding, dict[str, Any] | None]:
    """Return why the service does not answer, from its socket, its process and systemd; and what its process shows."""
    try:
        with socket.socket(socket.AF_UNIX) as near:
            near.settimeout(ANSWER_S)
            near.connect(control)
            pid, _, _ = struct.unpack("iii", near.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    except PermissionError:
        sentence = f"{control} may be used by root, and by members of the group that the settings name"
        return unknown("service", sentence, "sudo xenbackend doctor"), None
    except OSError:
        return _not_running(control, activate.unit_facts(ANSWER_S), place), None
    known = _shown_by(pid)
    if problem.answer.code is Code.GONE and os.geteuid() != 0:  # it hung up
        sentence = f"this user may not ask the service at {control}"
        return unknown("service", sentence, "sudo xenbackend doctor"), known
    if state_of(pid) in ("T", "t"):
        sentence = f"its process, {pid}, has been stopped by a signal or a debugger"
        return wrong("service", sentence, f"kill -CONT {pid}"), known
    return wrong("service", f"its process, {pid}, runs but does not answer: {problem}", place.log), known


def _shown_by(pid: int, proc: Path = _PROC) -> dict[str, Any]:
    """Return the host and xenstore that a service's command line names, or else the defaults."""
    try:
        words = (proc / str(pid) / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
    except OSError:
        words = []
    given = dict(pairwise(words)) | dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    defaults = Settings()
    return {
        "host": given.get("--host", defaults.host),
        "store": given.get("--store", defaults.store),
        "store_error": "",
    }


def _not_running(control: str, unit: Mapping[str, str], place: Place) -> Finding:
    nobody = f"no service answers at {control}"
    if not unit:
        return wrong("service", f"{nobody}, and systemd does not run this host", "xenbackend run --detach")
    if unit.get("LoadState") == "not-found":
        return wrong("service", f"{nobody}; its unit is not installed", "xenbackend install")
    if unit.get("LoadState") == "masked":
        return wrong("service", f"{nobody}; its unit is masked", f"systemctl unmask {UNIT}")
    state = unit.get("ActiveState", "")
    if state == "active":
        where = "xenbackend config show"
        return wrong("service", f"{nobody}, although its unit is active: it may listen on another socket", where)
    if state == "failed":
        return wrong("service", f"{nobody}; its unit has failed ({unit.get('Result', '')})", place.log)
    if state == "activating":
        return wrong(
            "service", f"{nobody}: it is being started, {unit.get('StatusText') or 'for the moment'}", place.log
        )
    if unit.get("ConditionResult") == "no" and unit.get("ConditionTimestampMonotonic", "0") != "0":
        return wrong(
            "service",
            f"{nobody}; systemd did not start it, as this host was not booted under Xen",
            f"systemctl status {UNIT}",
        )
    return wrong("service", f"{nobody}; its unit is {state or 'unknown to systemd'}", _START)


def look_at_walls(disks: list[dict[str, Any]]) -> list[Finding]:
    """Return which walls are missing around workers; the same wall for the same reason is named once."""
    missing: dict[str, list[str]] = {}
    for known in disks:
        for wall, why in known["no_walls"].items():
            missing.setdefault(f"{wall} ({why})", []).append(known["vbd"])
    if not missing:
        return [ok("walls", "each worker is behind all of its walls")] if disks else []
    walls = "; ".join(missing)
    count = len({vbd for vbds in missing.values() for vbd in vbds})
    sentence = f"{count} worker{'s are' if count != 1 else ' is'} not behind all walls: {walls}"
    return [wrong("walls", sentence, "uname -r  # docs/compatibility.md says which kernel has them")]
