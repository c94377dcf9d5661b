"""What keeps one disk from being connected, found from what is known of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.answering import DISK
from xenbackend.disks import parse_disk
from xenbackend.doctor import disks
from xenbackend.doctor.finding import Verdict
from xenbackend.doctor.place import Place
from xenbackend.supervisor.vbd.reasons import Reason

SEEN = {
    "vbd": "5/xvda", "node": "vbd/5/51712", "guest": "mail", "ours": True, "script": "block-xenbackend",
    "chain": "aio:/img", "read_only": False, "mistake": "", "ours_state": 4, "theirs_state": 4,
    "hotplug": "connected", "hotplug_error": "",
}  # fmt: skip


def known(**changes: Any) -> dict[str, Any]:
    """Return what the service says of a disk that has no worker, with these changes."""
    return {**DISK, "worker": 0, **changes}


def test_every_reason_has_a_command() -> None:
    """For every reason that the service may give there is a command to run next, for this disk."""
    assert set(Reason) == set(disks.COMMANDS)
    for reason in Reason:
        word = reason.name.lower().replace("_", "-")
        found = disks.look(known(reason=word, error="so it is", chain="log:|aio:/a b"), 1e9)
        assert (True, "reason", "so it is") == (found.is_wrong, found.check, found.sentence)
        assert found.command
        assert "{" not in found.command


def test_a_command_can_be_pasted() -> None:
    """A chain in a command is quoted as one shell word, with control characters escaped."""
    found = disks.look(known(reason="cannot-open", error="no", chain="log:|aio:/a b\x1b[2J"), 1e9)

    assert r"xenbackend check 'log:|aio:/a b\x1b[2J'" == found.command


def test_one_cause_has_one_finding() -> None:
    """A pause is reported before the reason why a disk is not served, and that before whose move it is."""
    everything = known(paused=True, paused_by="uid 0", reason="storage", error="no answer", frontend_state="Closed")

    assert ("paused", "the disk is paused by uid 0") == (
        disks.look(everything, 0).check,
        disks.look(everything, 0).sentence,
    )
    assert "reason" == disks.look({**everything, "paused": False}, 0).check
    assert "handshake" == disks.look({**everything, "paused": False, "reason": ""}, 0).check


def test_a_guest_has_time_to_begin() -> None:
    """A disk that waits for its guest counts as well for half a minute, and as wrong afterwards."""
    waits = known(state="InitWait", frontend_state="Initialising", since=1000.0)

    early, late = disks.look(waits, 1010.0), disks.look(waits, 1031.0)

    assert (Verdict.OK, Verdict.WRONG) == (early.verdict, late.verdict)
    assert "we are InitWait and the guest is Initialising: the guest has to offer its rings" in late.sentence
    assert "xl console 5" == late.command
    assert Verdict.OK is disks.look(known(), 1e9).verdict


@pytest.mark.parametrize(
    ("changes", "verdict", "check", "words"),
    [
        ({}, Verdict.OK, "handshake", "connected"),
        ({"ours_state": 2, "theirs_state": 1}, Verdict.WRONG, "handshake", "xen-blkfront"),
        ({"ours_state": 2, "theirs_state": 3}, Verdict.UNKNOWN, "handshake", "the service has to take the rings"),
        ({"ours_state": 2, "theirs_state": 1, "hotplug": ""}, Verdict.WRONG, "handshake", "hotplug script"),
        ({"hotplug_error": "aio: no"}, Verdict.WRONG, "hotplug", "script was told: aio: no"),
        ({"mistake": "the key mode is 'x'", "chain": ""}, Verdict.WRONG, "reason", "the key mode is"),
        ({"ours": False, "script": "block"}, Verdict.WRONG, "script", "its script is block, not"),
    ],
)
def test_without_a_service_xenstore_tells(changes: dict[str, Any], verdict: Verdict, check: str, words: str) -> None:
    """Without a service, a step that it would have to take is unknown: its silence is a finding of its own."""
    [found] = disks.look_without_service({**SEEN, **changes}, serves_all=False)

    assert (verdict, check, "5/xvda") == (found.verdict, found.check, found.disk)
    assert words in found.sentence


DRIVER = Place(is_guest=True)


def test_what_helps_in_a_driver_domain() -> None:
    """In a driver domain, commands that only work in dom0 say so, and nodes are those of the driver domain."""
    commands = {
        reason: disks.look(known(reason=reason.name.lower().replace("_", "-"), error="so"), 1e9, DRIVER).command
        for reason in Reason
    }
    waits = known(state="InitWait", frontend_state="Initialising", since=0.0)
    [told] = disks.look_without_service({**SEEN, "hotplug_error": "no"}, serves_all=False, place=DRIVER)

    assert "xl dmesg | tail -n 50  # in dom0" == commands[Reason.HALTED]
    assert "xenstore-ls -f backend/vbd/5/51712" == commands[Reason.BAD_KEYS]
    assert "xenstore-ls -f /local/domain/5/device/vbd/51712" == commands[Reason.BAD_RINGS]
    assert all(each.startswith("xl ") == each.endswith("  # in dom0") for each in commands.values())
    assert "xl console 5  # in dom0" == disks.look(waits, 1e9, DRIVER).command
    assert "xl console 5" == disks.look(waits, 1e9).command
    assert "xl block-list 5  # in dom0" == told.command


def test_who_runs_the_hotplug_script_in_a_driver_domain() -> None:
    """In a driver domain `xl devd` runs the hotplug script, not a toolstack in dom0."""
    waits = {**SEEN, "ours_state": 2, "theirs_state": 1, "hotplug": ""}
    [there] = disks.look_without_service(waits, serves_all=False, place=DRIVER)
    [here] = disks.look_without_service(waits, serves_all=False)

    assert "xl devd, in this domain, has to run its hotplug script" in there.sentence
    assert (True, "pgrep -af 'xl devd'") == (there.is_wrong, there.command)
    assert ("the toolstack has to run" in here.sentence, "xl block-list 5") == (True, here.command)


def test_a_driver_domain_knows_no_guests_by_name() -> None:
    """A driver domain cannot know guests by name, so a disk that is named by its guest is unknown, not wrong."""
    found = disks.not_found(parse_disk("mail/xvda"), ["5/xvda"], knows_store=True, place=DRIVER)

    assert (Verdict.UNKNOWN, "xl domid mail  # in dom0") == (found.verdict, found.command)
    assert disks.not_found(parse_disk("6/xvda"), ["5/xvda"], knows_store=True, place=DRIVER).is_wrong


def test_a_host_without_systemd_has_a_log_in_a_file() -> None:
    """Without systemd the command shows the log file."""
    found = disks.look(known(reason="trouble", error="so"), 1e9, Place(has_systemd=False))

    assert "tail -n 50 /var/log/xenbackend.log" == found.command


def test_a_disk_that_is_not_there() -> None:
    """A disk that is not in xenstore is wrong; if xenstore could not be read, it is unknown."""
    wanted = parse_disk("5/xvdz")

    assert disks.not_found(wanted, ["5/xvda"], knows_store=True).is_wrong
    assert "(there are 5/xvda)" in disks.not_found(wanted, ["5/xvda"], knows_store=True).sentence
    assert Verdict.UNKNOWN is disks.not_found(wanted, [], knows_store=False).verdict


def test_only_what_storage_may_have_caused_is_looked_into() -> None:
    """Storage is examined for reasons that it can cause, such as "cannot open", and not for a failed flush."""
    for word, expected in (("cannot-open", True), ("storage", True), ("flush-failed", False), ("bad-keys", False)):
        each = known(reason=word, error="so")
        assert expected == disks.depends_on_storage(disks.look(each, 0), each)
