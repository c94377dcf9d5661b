"""Checks the settings of an image: with some of them the death of a worker would lose data.

Must not ask a cluster: it is given the settings in effect (`ceph.image.Image.settings`), which may come from the image
or its pool, and override those of the client.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Setting(Protocol):
    """As `ceph.image.Setting`."""

    @property
    def value(self) -> str:
        """As `ceph.image.Setting`."""

    @property
    def source(self) -> str:
        """As `ceph.image.Setting`."""


_LOSES = "answered writes are lost if the worker dies"
_NO_FENCE = "a client whose lock is broken could still write"
# The value that a setting has to have, and what would happen otherwise.
_WANTED = {
    "rbd_cache": ("false", _LOSES),
    "rbd_plugins": ("", f"{_LOSES}, or what is read comes from a place that others can fill"),
    "rbd_persistent_cache_mode": ("disabled", _LOSES),
    "rbd_blocklist_on_break_lock": ("true", _NO_FENCE),
    "rbd_disable_zero_copy_writes": ("true", "a guest that changes a page during its write breaks the connection"),
    "rbd_non_blocking_aio": ("true", "a slow cluster would block the worker"),
}
_EXPIRY = "rbd_blocklist_expire_seconds"
_LEAST_EXPIRY_S = 3600  # an entry in the blocklist has to outlive everything that the dead client had sent
_LIMITS = "rbd_qos_"


def why_unsafe(settings: Mapping[str, Setting]) -> str:
    """Return a sentence about the first setting that makes writing to the image unsafe, or an empty text.

    A setting that is missing is one that this release of Ceph does not have.
    """
    for name, (wanted, otherwise) in _WANTED.items():
        found = settings.get(name)
        if found is not None and found.value != wanted:
            return _sentence(name, found, repr(wanted), otherwise)
    found = settings.get(_EXPIRY)
    if found is not None and not _is_long(found.value):
        return _sentence(
            _EXPIRY, found, f"0, which is the cluster's own value, or at least {_LEAST_EXPIRY_S}", _NO_FENCE
        )
    return ""


def _is_long(expiry: str) -> bool:
    """Return whether entries in the blocklist live long enough. Ceph accepts 1K as a number, too; we do not."""
    return expiry == "0" or (expiry.isdecimal() and int(expiry) >= _LEAST_EXPIRY_S)


def limits(settings: Mapping[str, Setting]) -> str:
    """Return the limits (QoS) that librbd applies to the image, for people; empty if there are none."""
    found = {name: each for name, each in settings.items() if name.startswith(_LIMITS) and name.endswith("_limit")}
    return ", ".join(f"{name.removeprefix(_LIMITS)} {each.value}" for name, each in found.items() if each.value != "0")


def discard_granularity(settings: Mapping[str, Setting]) -> int:
    """Return the length and alignment in bytes that a discard needs to have an effect."""
    found = settings.get("rbd_discard_granularity_bytes")
    return max(512, int(found.value)) if found is not None and found.value.isdecimal() else 64 << 10


def _sentence(name: str, found: Setting, wanted: str, otherwise: str) -> str:
    return f"{name} is {found.value!r}, as {found.source} says, but must be {wanted}: otherwise {otherwise}"
