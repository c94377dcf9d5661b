"""What a toolstack has asked for, read strictly."""

from __future__ import annotations

import pytest

from xenbackend.errors import ChainError
from xenbackend.supervisor.vbd.spec import is_ours, parse_spec
from xenbackend.supervisor.xenstore.paths import VbdPath

KEYS = {"frontend": "/local/domain/5/device/vbd/51712", "mode": "w", "params": "null:1G"}
VBD = VbdPath("vbd", 0, 5, 51712)
VBD3 = VbdPath("vbd3", 0, 5, 51712)


@pytest.mark.parametrize(
    ("mode", "read_only", "shareable"), [("r", True, False), ("w", False, False), ("w!", False, True)]
)
def test_modes(mode: str, read_only: bool, shareable: bool) -> None:
    """Only the exact letters w and w! may write, and only w! gives up the lock."""
    spec = parse_spec(VBD, {**KEYS, "mode": mode})

    assert (read_only, shareable) == (spec.read_only, spec.shareable)


@pytest.mark.parametrize(
    ("path", "params", "chain"),
    [
        (VBD3, "aio:log:|null:1G", "log:|null:1G"),
        (VBD3, "vhd:log:|null:1G", "log:|null:1G"),
        (VBD3, "aio:/img/disk.raw", "aio:/img/disk.raw"),
        (VBD, "aio:/img/disk.raw", "aio:/img/disk.raw"),
    ],
)
def test_libxl_carrier_falls_away(path: VbdPath, params: str, chain: str) -> None:
    """The prefix that libxl puts before a target of kind vbd3 is dropped before a chain, and kept before a path."""
    assert chain == parse_spec(path, {**KEYS, "params": params}).chain


@pytest.mark.parametrize(
    ("change", "is_alike"),
    [
        ({"device-type": "cdrom", "removable": "1"}, True),
        ({"params": "null:2G"}, False),
        ({"mode": "r"}, False),
        ({"mode": "w!"}, False),
    ],
)
def test_what_only_the_guest_is_told_asks_for_no_other_worker(change: dict[str, str], *, is_alike: bool) -> None:
    """A change that only the guest is told, such as a CD-ROM's properties, needs no other worker."""
    assert is_alike == parse_spec(VBD, KEYS).is_served_like(parse_spec(VBD, {**KEYS, **change}))


def test_a_bad_chain_is_refused_early() -> None:
    """An invalid chain is refused before any process is started."""
    with pytest.raises(ChainError):
        parse_spec(VBD, {**KEYS, "params": "log:|"})


@pytest.mark.parametrize(
    ("script", "ours"),
    [
        ("/etc/xen/scripts/block-xenbackend", True),
        ("tap2", True),
        ("/etc/xen/scripts/block", False),
        ("/tap2/block", False),
        ("", False),
    ],
)
def test_our_vbds_are_known_by_their_script(script: str, ours: bool) -> None:
    """A vbd is ours by the base name of its script, whatever the directory."""
    assert ours == is_ours({"script": script}, ["block-xenbackend", "tap2"])
