"""What a release consists of: consistent versions, and archives that are the same whoever builds them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from tests.former_release import VERSION as FORMER
from xenbackend import __version__

ROOT = Path(__file__).parents[1]
SOURCES = ("xenbackend", "systemd", "udev", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE")


def build(checkout: Path, place: Path) -> list[Path]:
    """Build an sdist and a wheel from a directory, and return their paths."""
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(place)]
    subprocess.run(command, check=True, capture_output=True, cwd=checkout)
    return sorted(place.iterdir())


def metadata(wheel: Path) -> Message:
    """Return the metadata that a registry gets."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [each for each in archive.namelist() if each.endswith("/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_a_version_has_its_day() -> None:
    """A new version is in the changelog, with the same date as in Debian's."""
    released = re.findall(r"^## (\S+) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    debian = (ROOT / "debian/changelog").read_text()
    day = parsedate_to_datetime(re.findall(r"^ -- .*>  (.*)$", debian, re.MULTILINE)[0]).date().isoformat()

    assert released[:1] == [(__version__, day)] or (not released and __version__ == FORMER)


@pytest.mark.slow
def test_the_same_sources_are_the_same_archives(tmp_path: Path) -> None:
    """Archives are the same byte for byte, wherever they are built, and whatever the files' modes and times."""
    built = []
    for number, mode in enumerate((0o644, 0o664)):
        checkout = tmp_path / f"checkout{number}" / "xenbackend"
        checkout.mkdir(parents=True)
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, checkout / name)
        for each in sorted(checkout.rglob("*"), reverse=number == 0):
            if each.is_file():
                each.chmod(mode)
        built.append([each.read_bytes() for each in build(checkout, tmp_path / f"dist{number}")])

    assert 2 == len(built[0])
    assert built[0] == built[1]


@pytest.mark.slow
def test_what_a_registry_shows_leads_somewhere(tmp_path: Path) -> None:
    """The long description has only absolute links, to this version; the licence is an SPDX expression."""
    [wheel, *_] = build(ROOT, tmp_path)
    found = metadata(wheel)
    links = re.findall(r"\]\(([^)\s]+)\)", str(found.get_payload()))
    own = [each for each in links if f"/blob/v{__version__}/" in each]

    assert (__version__, "MIT", ["LICENSE"]) == (
        found["Version"],
        found["License-Expression"],
        found.get_all("License-File"),
    )
    assert [] == [each for each in links if not each.startswith(("https://", "#"))]
    assert [] == [
        each for each in own if not (ROOT / each.partition(f"/v{__version__}/")[2].partition("#")[0]).exists()
    ]
    assert len(own) > 20
    assert {"Source", "Documentation", "Changelog"} <= {
        each.partition(",")[0] for each in found.get_all("Project-URL", [])
    }
    assert "Programming Language :: Python :: 3.13" in found.get_all("Classifier", [])


@pytest.mark.slow
def test_an_sdist_is_enough(tmp_path: Path) -> None:
    """A wheel built from the sdist equals the one built from the checkout."""
    of_checkout = build(ROOT, tmp_path / "dist")
    [sdist] = [each for each in of_checkout if each.suffix == ".gz"]
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "again")

    assert [each.read_bytes() for each in again if each.suffix == ".whl"] == [
        each.read_bytes() for each in of_checkout if each.suffix == ".whl"
    ]
