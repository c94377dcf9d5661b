"""The fast suite, in a clone of the last commit, on releases with a newer Python than CI's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.chroots import place

ROOT = Path(__file__).parents[2]
CLONE = Path("/root/xenbackend")


@pytest.mark.parametrize("suite", place.DEVELOPED_ON)
def test_the_fast_suite_passes(suite: str, tmp_path: Path) -> None:
    """`make test` passes there unchanged, with the release's own Python, kernel headers and tools."""
    if reason := place.why_not():
        pytest.skip(reason)
    chroot = place.Chroot(place.build(suite, place.TOOLS), tmp_path / "root")
    try:
        chroot.connect()
        clone = chroot.root / CLONE.relative_to("/")
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, clone], check=True)
        said = chroot.run("make", "-C", CLONE, "test", check=False, as_system=True)
    finally:
        chroot.close()

    assert 0 == said.returncode, said.stdout[-20000:] + said.stderr[-4000:]
