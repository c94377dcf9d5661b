"""Settings that outlive a service."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.supervisor.helpers import Kept
from xenbackend.blkif.features import Limits
from xenbackend.errors import ConfigError
from xenbackend.supervisor.service import former_settings
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.service.settings import Settings

pytestmark = pytest.mark.usefixtures("descriptors")

BEFORE = Settings(serve="all", scripts=["mine"], poll_us=7, limits=Limits(max_queues=3))


@pytest.fixture
def first(kept: Kept) -> Keeper:
    """The keeper as the first service has it."""
    return kept.keeper()


def _keep(first: Keeper, name: str, content: bytes = b"") -> None:
    fd = os.memfd_create(name)
    os.write(fd, content)
    first.keep(name, fd)
    os.close(fd)


def _choose(kept: Kept, read: Callable[[], Settings]) -> tuple[Settings, str, list[str]]:
    """Return the settings that the next service chooses, the mistake that it reports, and what is left of its
    inheritance.
    """
    keeper = kept.keeper()
    try:
        return *former_settings.choose(read, keeper), [*keeper.inherited]
    finally:
        for fd in keeper.inherited.values():
            os.close(fd)


def _broken() -> Settings:
    raise ConfigError("x.toml: there is no setting frob")


def test_a_mistake_harms_no_disk(kept: Kept, first: Keeper) -> None:
    """If the settings are wrong while disks are in service, all settings of the former service stay in force, and the
    mistake is reported.
    """
    former_settings.leave(BEFORE, first)
    _keep(first, "vbd-0-5-51712.worker")

    assert (BEFORE, "x.toml: there is no setting frob", ["vbd-0-5-51712.worker"]) == _choose(kept, _broken)


def test_the_last_ones_count(kept: Kept, first: Keeper) -> None:
    """Each service leaves its settings to the next one, and only the latest are kept."""
    former_settings.leave(Settings(), first)
    former_settings.leave(BEFORE, first)
    _keep(first, "vbd-0-5-51712.journal")

    assert BEFORE == _choose(kept, _broken)[0]


def test_one_is_let_go_before_the_next_is_kept(tmp_path: Path) -> None:
    """The former descriptor is removed before a new one of the same name is kept: systemd would keep both, and each
    service would leave one more.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(5)
        systemd.bind(str(tmp_path / "notify"))
        former_settings.leave(BEFORE, Keeper({"NOTIFY_SOCKET": str(tmp_path / "notify"), "FDSTORE": "8"}))
        said = [systemd.recv(1000).decode() for _ in range(2)]

    assert ["FDSTOREREMOVE=1\nFDNAME=settings", "FDSTORE=1\nFDNAME=settings\nFDPOLL=0"] == said


def test_ours_are_gone_by_where_they_can_be(kept: Kept, first: Keeper) -> None:
    """Settings that are right take effect, whatever the former service had."""
    former_settings.leave(BEFORE, first)
    _keep(first, "vbd-0-5-51712.worker")

    assert (Settings(), "") == _choose(kept, Settings)[:2]


def test_another_version_s_settings_count_as_far_as_they_are_known(kept: Kept, first: Keeper) -> None:
    """Of the settings of a service of another version, those that both versions know take effect."""
    _keep(first, "vbd-0-5-51712.worker")
    _keep(first, "settings", b'{"serve": "all", "later": 1, "limits": {"max_queues": 3, "later": 1}}')

    assert Settings(serve="all", limits=Limits(max_queues=3)) == _choose(kept, _broken)[0]


def test_without_a_disk_a_mistake_is_said(kept: Kept, first: Keeper) -> None:
    """If no disk is in service, a mistake in the settings is an error at once, as nothing can be lost."""
    former_settings.leave(BEFORE, first)
    _keep(first, "control")
    with pytest.raises(ConfigError, match="frob"):
        _choose(kept, _broken)


@pytest.mark.parametrize(
    "content",
    [
        None, b"", b"{", b"[1]", b"1", b"null", b"[" * 9999, b"\xff",
        b'{"serve": "all"}', b'{"serve": "none", "limits": {}}', b'{"serve": "all", "limits": 1}',
    ],
)  # fmt: skip
def test_what_another_program_left_does_not_count(kept: Kept, first: Keeper, content: bytes | None) -> None:
    """Whatever is kept under that name and holds no settings counts as none, so that a mistake is an error."""
    _keep(first, "vbd-0-5-51712.worker")
    if content is not None:
        _keep(first, "settings", content)
    with pytest.raises(ConfigError, match="frob"):
        _choose(kept, _broken)
