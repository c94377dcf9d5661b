"""The chroots that this suite's tests share; each test leaves them as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chroots import place


@pytest.fixture(scope="session", params=place.RELEASES)
def chroot(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[place.Chroot]:
    """A chroot of a Debian release."""
    if reason := place.why_not():
        pytest.skip(reason)
    archive = place.build(request.param)
    chroot = place.Chroot(archive, tmp_path_factory.mktemp(request.param) / "root")
    yield chroot
    chroot.close()
