"""Tests of `xenbackend.block.rbd.settings`: with which settings a worker may die at any moment."""

from __future__ import annotations

import pytest

from xenbackend.block.rbd.settings import discard_granularity, limits, why_unsafe
from xenbackend.ceph.image import Setting

SAFE = {
    "rbd_cache": "false",
    "rbd_plugins": "",
    "rbd_persistent_cache_mode": "disabled",
    "rbd_blocklist_on_break_lock": "true",
    "rbd_blocklist_expire_seconds": "0",
    "rbd_disable_zero_copy_writes": "true",
    "rbd_non_blocking_aio": "true",
    "rbd_cache_policy": "writeback",
}


def of(**changes: str) -> dict[str, Setting]:
    """Return safe settings, except for these, which are set in the image."""
    settings = {name: Setting(value, "ceph.conf or its default") for name, value in SAFE.items()}
    return settings | {name: Setting(value, "the image") for name, value in changes.items()}


def test_what_is_safe() -> None:
    """The settings that a client asks for are safe, even if a release does not know some of them."""
    assert "" == why_unsafe(of())
    assert "" == why_unsafe({})
    assert "" == why_unsafe(of(rbd_blocklist_expire_seconds="86400"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rbd_cache", "true"),
        ("rbd_plugins", "pwl_cache"),
        ("rbd_persistent_cache_mode", "ssd"),
        ("rbd_blocklist_on_break_lock", "false"),
        ("rbd_blocklist_expire_seconds", "30"),
        ("rbd_blocklist_expire_seconds", "1K"),
        ("rbd_disable_zero_copy_writes", "false"),
        ("rbd_non_blocking_aio", "false"),
    ],
)
def test_what_is_not_safe_is_named(name: str, value: str) -> None:
    """For any other value, the message has the setting's name, its value, and where it is set."""
    assert why_unsafe(of(**{name: value})).startswith(f"{name} is {value!r}, as the image says, but must be ")


def test_limits_are_told() -> None:
    """The limits that librbd itself enforces are reported if they are set."""
    assert "" == limits(of(rbd_qos_iops_limit="0"))
    assert "iops_limit 500" == limits(of(rbd_qos_iops_limit="500", rbd_qos_iops_burst="9", rbd_qos_bps_limit="0"))


def test_granularity() -> None:
    """The discard granularity is the setting's value, at least a sector, and 64 KiB by default."""
    assert 64 << 10 == discard_granularity({})
    assert 4096 == discard_granularity(of(rbd_discard_granularity_bytes="4096"))
    assert 512 == discard_granularity(of(rbd_discard_granularity_bytes="0"))
