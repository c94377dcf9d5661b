"""What keeps one disk from being connected, by what is known of it."""

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
    """Return what the service says of a disk, as the process that looks at it may be."""
    return {**DISK, "worker": 0, **changes}


def test_every_reason_has_a_command() -> None:
    """Whatever the service says of a disk, there is something to run next, for this disk."""
    assert set(Reason) == set(disks.COMMANDS)
    for reason in Reason:
        word = reason.name.lower().replace("_", "-")
        found = disks.look(known(reason=word, error="so it is", chain="log:|aio:/a b"), 1e9)
        assert (True, "reason", "so it is") == (found.is_wrong, found.check, found.sentence)
        assert found.command
        assert "{" not in found.command


def test_a_command_can_be_pasted() -> None:
    """A chain is one word of a shell, and moves no cursor."""
    found = disks.look(known(reason="cannot-open", error="no", chain="log:|aio:/a b\x1b[2J"), 1e9)

    assert r"xenbackend check 'log:|aio:/a b\x1b[2J'" == found.command


def test_one_cause_has_one_finding() -> None:
    """Who has paused a disk is told before why it is not served, and that before whose move it is."""
    everything = known(paused=True, paused_by="uid 0", reason="storage", error="no answer", frontend_state="Closed")

    assert ("paused", "the disk is paused by uid 0") == (
        disks.look(everything, 0).check,
        disks.look(everything, 0).sentence,
    )
    assert "reason" == disks.look({**everything, "paused": False}, 0).check
    assert "handshake" == disks.look({**everything, "paused": False, "reason": ""}, 0).check


def test_a_guest_has_time_to_begin() -> None:
    """A disk that waits for its guest is well for half a minute, and then it is not."""
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
    """What the service would have to do is not known to be wrong: that it does not answer is told of itself."""
    [found] = disks.look_without_service({**SEEN, **changes}, serves_all=False)

    assert (verdict, check, "5/xvda") == (found.verdict, found.check, found.disk)
    assert words in found.sentence


DRIVER = Place(is_guest=True)


def test_what_helps_in_a_driver_domain() -> None:
    """Its xl knows of no guest, so what only dom0 can tell is asked there; nodes are those of this domain."""
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
    """It is `xl devd` in there, and no toolstack of dom0."""
    waits = {**SEEN, "ours_state": 2, "theirs_state": 1, "hotplug": ""}
    [there] = disks.look_without_service(waits, serves_all=False, place=DRIVER)
    [here] = disks.look_without_service(waits, serves_all=False)

    assert "xl devd, in this domain, has to run its hotplug script" in there.sentence
    assert (True, "pgrep -af 'xl devd'") == (there.is_wrong, there.command)
    assert ("the toolstack has to run" in here.sentence, "xl block-list 5") == (True, here.command)


def test_a_driver_domain_knows_no_guests_by_name() -> None:
    """So a disk that is called by its guest's name may well be there."""
    found = disks.not_found(parse_disk("mail/xvda"), ["5/xvda"], knows_store=True, place=DRIVER)

    assert (Verdict.UNKNOWN, "xl domid mail  # in dom0") == (found.verdict, found.command)
    assert disks.not_found(parse_disk("6/xvda"), ["5/xvda"], knows_store=True, place=DRIVER).is_wrong


def test_a_host_without_systemd_has_a_log_in_a_file() -> None:
    """The command shows that."""
    found = disks.look(known(reason="trouble", error="so"), 1e9, Place(has_systemd=False))

    assert "tail -n 50 /var/log/xenbackend.log" == found.command


def test_a_disk_that_is_not_there() -> None:
    """It is wrong where xenstore has none, and not known where that could not be asked."""
    wanted = parse_disk("5/xvdz")

    assert disks.not_found(wanted, ["5/xvda"], knows_store=True).is_wrong
    assert "(there are 5/xvda)" in disks.not_found(wanted, ["5/xvda"], knows_store=True).sentence
    assert Verdict.UNKNOWN is disks.not_found(wanted, [], knows_store=False).verdict


def test_only_what_storage_may_have_caused_is_looked_into() -> None:
    """A flush that failed is over; a chain that cannot be opened may have a file that is not there."""
    for word, expected in (("cannot-open", True), ("storage", True), ("flush-failed", False), ("bad-keys", False)):
        each = known(reason=word, error="so")
        assert expected == disks.depends_on_storage(disks.look(each, 0), each)
