"""Finds what keeps one disk from being connected: from what the service says, or from xenstore if no service answers.

Must not examine the host or storage.

Each cause has one finding: if a disk is paused, its waiting handshake is not reported as well.
"""

from __future__ import annotations

import shlex
from typing import Any

from xenbackend.blkif.handshake import XenbusState, name
from xenbackend.disks import DiskName
from xenbackend.doctor.finding import Finding, ok, unknown, wrong
from xenbackend.doctor.handshake import Move, Who, next_move
from xenbackend.doctor.place import DOM0, Place
from xenbackend.errors import printable
from xenbackend.kernel.process import state_of
from xenbackend.supervisor.vbd.reasons import Reason

PATIENCE_S = 30.0  # that a guest may take to boot, and that any other side may take for its move
_STATES = {name(each): each for each in XenbusState}
_LOG = "{log}"
_RESUME = "xenbackend resume {vbd}"
COMMANDS = {  # by reason: what to run next
    Reason.CANNOT_OPEN: "xenbackend check {chain}",
    Reason.BAD_KEYS: "xenstore-ls -f backend/{node}",
    Reason.UNDECIDED: "xenbackend orders",
    Reason.OTHER_FILE: "xenbackend status {vbd}",
    Reason.OTHER_SIZE: "xenbackend check {chain}",
    Reason.GIVEN_UP: _LOG,
    Reason.BAD_RINGS: "xenstore-ls -f /local/domain/{domid}/device/vbd/{devid}",
    Reason.FLUSH_FAILED: _RESUME,
    Reason.STORAGE: "dmesg | tail -n 50",
    Reason.KEY: "xenbackend status {vbd}",
    Reason.TROUBLE: _LOG,
    Reason.INTERRUPTED: _LOG,
    Reason.HALTED: "xl dmesg | tail -n 50",
}
_OF_DOM0 = ("xl ",)  # commands that begin like this show nothing in a driver domain
_BY_STORAGE = (Reason.CANNOT_OPEN, Reason.STORAGE, Reason.TROUBLE, Reason.INTERRUPTED, Reason.GIVEN_UP)
_BY_WORD = {each.name.lower().replace("_", "-"): each for each in Reason}
_WHOSE = {
    Who.GUEST: "xl console {domid}",
    Who.TOOLSTACK: "xl block-list {domid}",
    Who.SERVICE: _LOG,
}
Known = dict[str, Any]


def look(known: Known, now: float, place: Place = DOM0) -> Finding:
    """Return what keeps a disk from being connected; `known` is its record in `status`, `now` seconds since 1970."""
    vbd = known["vbd"]
    if known["paused"]:
        by = printable(known["paused_by"]) or "an administrator"
        return wrong("paused", f"the disk is paused by {by}", _filled(_RESUME, known, place), disk=vbd)
    if known["reason"]:
        reason = _BY_WORD.get(known["reason"])
        command = COMMANDS[reason] if reason is not None else _LOG
        return wrong("reason", printable(known["error"]) or known["reason"], _filled(command, known, place), disk=vbd)
    if known["worker"] and state_of(known["worker"]) in ("T", "t"):
        sentence = f"its worker, process {known['worker']}, has been stopped by a signal or a debugger"
        return wrong("worker", sentence, f"kill -CONT {known['worker']}", disk=vbd)
    states = _STATES[known["state"]], _STATES[known["frontend_state"]]
    since_s = max(0.0, now - known["since"])
    return _of_handshake(known, next_move(*states), states, since_s, place)


def look_without_service(known: Known, *, serves_all: bool, place: Place = DOM0) -> list[Finding]:
    """Return what xenstore says about a disk if no service answers; `known` is as `doctor.store` describes it."""
    vbd = known["vbd"]
    if not known["ours"] and not serves_all:
        return [_of_others(known)]
    if known["hotplug_error"]:
        command = _filled(_WHOSE[Who.TOOLSTACK], known, place)
        return [wrong("hotplug", f"the hotplug script was told: {known['hotplug_error']}", command, disk=vbd)]
    if known["mistake"]:
        return [
            wrong("reason", printable(known["mistake"]), _filled(COMMANDS[Reason.BAD_KEYS], known, place), disk=vbd)
        ]
    states = XenbusState(known["ours_state"]), XenbusState(known["theirs_state"])
    move = next_move(*states, script_has_come=bool(known["hotplug"]))
    if move.who is Who.SERVICE:
        return [unknown("handshake", f"{_states(*states)}: the service {move.what}; it was not asked", disk=vbd)]
    return [_of_handshake(known, move, states, PATIENCE_S, place)]


def not_found(wanted: DiskName, served: list[str], *, knows_store: bool, place: Place = DOM0) -> Finding:
    """Return the finding that there is no such disk; `served` are the disks that there are."""
    if place.is_guest and wanted.domid is None:
        sentence = (
            f"in a driver domain guests have no names: {wanted} must be named by its domain's number, such as 5/xvda"
        )
        return unknown("disk", sentence, place.in_dom0(f"xl domid {shlex.quote(wanted.domain)}"), disk=str(wanted))
    there = f"there are {', '.join(served)}" if served else "there are none"
    if not knows_store:
        return unknown("disk", f"the service serves no disk {wanted} ({there}), and xenstore could not be read")
    sentence = f"the toolstack has made no disk {wanted} for us ({there})"
    return wrong("disk", sentence, place.in_dom0(f"xl block-list {shlex.quote(wanted.domain)}"), disk=str(wanted))


def depends_on_storage(finding: Finding, known: Known) -> bool:
    """Return whether a look at the disk's files and servers may tell more than this finding does."""
    return finding.check == "reason" and _BY_WORD.get(known["reason"]) in _BY_STORAGE


def _of_others(known: Known) -> Finding:
    script = known["script"] or "none"
    sentence = f"the disk is not for this service: its script is {script}, not block-xenbackend"
    return wrong("script", sentence, "xenbackend config show  # scripts, serve", disk=known["vbd"])


def _of_handshake(
    known: Known, move: Move, states: tuple[XenbusState, XenbusState], since_s: float, place: Place
) -> Finding:
    sentence = f"{_states(*states)}: {move.who} {move.what}"
    if place.is_guest and known.get("hotplug") == "" and move.who is Who.TOOLSTACK:
        sentence = f"{_states(*states)}: xl devd, in this domain, {move.what}"
        return wrong("handshake", sentence, "pgrep -af 'xl devd'", disk=known["vbd"])
    if move.who is Who.NOBODY or (since_s < PATIENCE_S and known.get("since") is not None):
        return ok("handshake", sentence, disk=known["vbd"])
    return wrong("handshake", sentence, _filled(_WHOSE[move.who], known, place), disk=known["vbd"])


def _states(ours: XenbusState, theirs: XenbusState) -> str:
    return f"we are {name(ours)} and the guest is {name(theirs)}"


def _filled(command: str, known: Known, place: Place) -> str:
    node = known["node"]
    words = {"vbd": known["vbd"], "node": node, "domid": _domid(known), "devid": node.rpartition("/")[2]}
    filled = command.format(**words, chain=shlex.quote(printable(known["chain"])), log=place.log)
    return place.in_dom0(filled) if filled.startswith(_OF_DOM0) else filled


def _domid(known: Known) -> str:
    return str(known["vbd"]).partition("/")[0]
