"""The site of documentation, which `make docs` builds."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from xenbackend.blkif.features import Limits
from xenbackend.block.drivers import BUILT_IN, find_driver
from xenbackend.block.options import describe_options
from xenbackend.supervisor.service.settings import Settings

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def load() -> ModuleType:
    """Return the program that makes it, which is none of ours to install."""
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs/make_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_site = load()


def test_the_site_is_built_without_a_complaint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every link leads somewhere; every page of the repository is in it, and those of drivers and settings."""
    assert 0 == make_site.main(tmp_path / "site"), capfd.readouterr().err
    html = tmp_path / "site/html"
    settings = (html / "docs/reference/settings.html").read_text()

    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        assert (html / page.relative_to(ROOT)).with_suffix(".html").exists(), page
    assert 'href="docs/install.html' in (html / "index.html").read_text()
    for name in BUILT_IN:
        text = (html / f"docs/reference/{name}.html").read_text()
        for each in describe_options(find_driver(name).Options):
            assert f">{each.name}</span>" in text, (name, each.name)
    for each in (*fields(Settings), *fields(Limits)):
        assert each.name == "limits" or f">{each.name}</span>" in settings, each.name


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[here](other.md), [there](other.md#a-part)", ""),
        ("[gone](gone.md)", "gone.md"),
        ("[nobody](other.md#nobody)", "nobody"),
        ("[nothing](prometheus/nothing.yml)", "nothing.yml"),
    ],
)
def test_a_link_that_leads_nowhere_fails_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    """To a page, a part of one, or a file."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text(f"# Front\n\n{line}\n\n{make_site._tree('', ['other.md'])}")
    (source / "other.md").write_text("# Other\n\n## A part\n")

    assert (said != "") == (make_site.build(source, tmp_path / "html") != 0)
    assert said in capfd.readouterr().err
