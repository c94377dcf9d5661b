"""The vbds in service, by each of the keys that they are looked up by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xenbackend.errors import ConfigError
from xenbackend.supervisor.service.vbds import Vbds
from xenbackend.supervisor.xenstore.paths import VbdPath


def _vbd(kind: str, domid: int, devid: int) -> Any:
    path = VbdPath(kind, 0, domid, devid)
    return SimpleNamespace(path=path, token=f"frontend/{path}")


def _nobody(_: int) -> str | None:
    pytest.fail("no guest's name was given")


def test_a_path_has_one_or_none() -> None:
    """Adding a second vbd with the same path is an error. A vbd that was removed is not found by any key."""
    vbds, first, second = Vbds(), _vbd("vbd", 5, 51712), _vbd("vbd", 5, 51712)
    vbds.add(first)
    with pytest.raises(ValueError, match="vbd/5/51712 is already being served"):
        vbds.add(second)
    assert (first, first, [first]) == (vbds[first.path], vbds.of_token(first.token), vbds.of_domain(5))
    assert not vbds.remove(second)
    assert vbds.remove(first)
    assert not vbds.remove(first)

    assert ({}, None, []) == (dict(vbds), vbds.of_token(first.token), vbds.of_domain(5))


def test_a_number_needs_no_name() -> None:
    """Xenstore is asked for guests' names only if a disk is named by its guest."""
    vbds, vbd = Vbds(), _vbd("vbd3", 5, 51712)
    vbds.add(vbd)

    assert vbd is vbds.find("5/xvda", _nobody) is vbds.find("vbd3/5/51712", _nobody)
    assert vbd is vbds.find("web/xvda", {5: "web"}.get)


def test_what_there_is_is_said_in_a_sentence_of_some_length() -> None:
    """The error for an unknown disk lists some of the disks in service, but never a long list."""
    vbds = Vbds()
    with pytest.raises(ConfigError, match="there is no disk '5/xvda' in service; none is"):
        vbds.find("5/xvda", _nobody)
    for domid in range(1, 13):
        vbds.add(_vbd("vbd", domid, 51712))
    with pytest.raises(ConfigError, match=r"there are 1/xvda, 2/xvda, .*, 10/xvda and 2 others"):
        vbds.find("99/xvda", _nobody)
