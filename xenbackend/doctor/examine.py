"""Runs all looks in order: first at host, xenstore and service, then at the storage of disks that are in trouble.

Must not look at anything itself.

A cause is reported once. If a disk's storage is at fault, that replaces what the service says about the disk; if there
is no Xen, its missing devices are not reported.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from xenbackend.disks import DiskName
from xenbackend.doctor import disks, host, service, storage, store
from xenbackend.doctor.finding import Finding, Verdict, ok, unknown, wrong
from xenbackend.doctor.place import DOM0, Place, here
from xenbackend.doctor.probes import Probe, Result, run
from xenbackend.errors import ConfigError
from xenbackend.supervisor.service import settings

MOST_DISKS = 64  # whose storage is examined
_REAL_HOST = settings.Settings().host
Known = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to examine. `disk` is None for the whole host; `store` is empty for the service's xenstore."""

    control: str
    store: str = ""
    config: Path | None = None
    disk: DiskName | None = None


def examine(wanted: Wanted) -> list[Finding]:
    """Return all findings. Raises nothing, and ends in seconds."""
    chosen, place = load_or_default(wanted.config), here()
    [answer] = run([Probe("service", f"the service at {wanted.control}", partial(service.look, wanted.control, place))])
    known = answer.data
    address = wanted.store or (known["service"]["store"] if known else chosen.store)
    is_simulated = bool(known) and known["service"]["host"] != _REAL_HOST
    if is_simulated:
        place = replace(DOM0, has_systemd=place.has_systemd)
    [of_host, of_store] = run(
        [
            Probe("host", "this host", partial(_look_at_host, wanted.config, is_simulated=is_simulated)),
            Probe("xenstored", "xenstore", partial(store.look, address, chosen, wanted.disk, place)),
        ]
    )
    of_xenstore = [_of_store(of_store, known, place)]
    if any(each.check == "xen" and each.is_wrong for each in of_host.findings):
        of_xenstore = []
    of_service = [_of_service(each, of_xenstore) for each in answer.findings]
    served = known["disks"] if known else None
    return [*of_host.findings, *of_xenstore, *of_service, *_of_disks(wanted, served, of_store.data, chosen, place)]


def load_or_default(config: Path | None) -> settings.Settings:
    """Return the settings, or the defaults if they cannot be used."""
    try:
        return settings.load(config, {})
    except ConfigError:
        return settings.Settings()  # their mistakes are a separate finding


def _look_at_host(config: Path | None, *, is_simulated: bool) -> Result:
    if is_simulated:
        return Result([ok("xen", "the service runs on a simulated host"), *host.look_at_kernel()])
    return Result(host.look(config=config))


def _of_store(seen: Result, known: Known | None, place: Place = DOM0) -> Finding:
    """Return the finding about xenstore: if we may not ask it ourselves, what the service says counts."""
    [finding] = seen.findings
    if finding.verdict is not Verdict.UNKNOWN or not known:
        return finding
    if problem := known["service"]["store_error"]:
        return wrong("xenstored", f"the service has lost its connection: {problem}", place.xenstored)
    return ok("xenstored", f"the service is connected to it at {known['service']['store']}")


def _of_service(finding: Finding, of_xenstore: Sequence[Finding]) -> Finding:
    """Return the finding about the service; if it does not answer, and xenstore neither, it may wait for xenstore."""
    waits = finding.check == "service" and finding.is_wrong and "does not answer" in finding.sentence
    if not (waits and any(each.is_wrong for each in of_xenstore)):
        return finding
    return replace(
        finding, verdict=Verdict.UNKNOWN, sentence=f"{finding.sentence}; it may be waiting for xenstore", command=""
    )


def _of_disks(
    wanted: Wanted,
    served: list[Known] | None,
    seen: list[Known] | None,
    chosen: settings.Settings,
    place: Place = DOM0,
) -> list[Finding]:
    """Return the findings about disks: about those that the service knows, or else about those in xenstore."""
    named = [each for each in served or () if wanted.disk is None or _is(wanted.disk, each)]
    first = [(each, [disks.look(each, time.time(), place)]) for each in named]
    if not first:
        serves_all = chosen.serve == "all"
        without = [(each, disks.look_without_service(each, serves_all=serves_all, place=place)) for each in seen or []]
        first = without if served is None or wanted.disk is not None else []
    if not first and wanted.disk is not None:
        names = [each["vbd"] for each in served or seen or []]
        if served is not None or seen is not None:
            return [disks.not_found(wanted.disk, names, knows_store=seen is not None, place=place)]
        return [
            unknown(
                "disk",
                f"neither xenstore nor the service could be asked about the disk {wanted.disk}",
                disk=str(wanted.disk),
            )
        ]
    return _with_storage(first)


def _with_storage(first: Sequence[tuple[Known, list[Finding]]]) -> list[Finding]:
    """Add findings about the files and servers of disks for which these may be the cause."""
    doubtful = [
        (place, each)
        for place, (each, found) in enumerate(first)
        if each["chain"] and ("reason" not in each or disks.depends_on_storage(found[0], each))
    ]
    looks = [
        (place, probe)
        for place, each in doubtful[:MOST_DISKS]
        for probe in storage.probes(each["vbd"], each["chain"], read_only=bool(each["read_only"]))
    ]
    results: dict[int, list[Finding]] = {}
    for (place, _), result in zip(looks, run([probe for _, probe in looks]), strict=True):
        results.setdefault(place, []).extend(result.findings)
    told: list[Finding] = []
    for place, (_, found) in enumerate(first):
        below = results.get(place, [])
        is_cause = any(each.is_wrong for each in below)
        told += [*([] if is_cause and found[0].check == "reason" else found), *below]
    left = len(doubtful) - MOST_DISKS
    if left > 0:
        told.append(unknown("file", f"the files and servers of {left} more disks were not examined; name a disk"))
    return told


def _is(wanted: DiskName, known: Known) -> bool:
    return wanted.means(known["kind"], known["domid"], int(known["node"].rpartition("/")[2]), known["guest"])
