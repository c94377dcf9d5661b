"""The manual pages of the Debian package."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from xenbackend.blkif.features import Limits
from xenbackend.block.drivers import BUILT_IN, find_driver
from xenbackend.block.options import describe_options
from xenbackend.cli.main import MODULES
from xenbackend.supervisor.service.settings import Settings

ROOT = Path(__file__).parents[1]
needs_groff = pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")


def load() -> ModuleType:
    """Return the program that makes the pages, which is not installed."""
    spec = importlib.util.spec_from_file_location("manpages", ROOT / "debian/manpages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


manpages = load()


def shown(page: str) -> str:
    """Return a page as a reader sees it. Raises: AssertionError, if groff warns."""
    result = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-rLL=200n", "-P-cbou"],
        input=page, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert "" == result.stderr
    return result.stdout.replace("\N{HYPHEN}", "-").replace("\N{MINUS SIGN}", "-")


@pytest.mark.slow
@needs_groff
def test_every_driver_has_a_page_with_its_options() -> None:
    """A page has the sections of its driver's manual with nothing lost, and groff gives no warning."""
    pages = shown("\n".join(manpages.driver_page(name) for name in sorted(BUILT_IN)))
    for name in BUILT_IN:
        assert f"xenbackend-{name} - " in pages
        for each in describe_options(find_driver(name).Options):
            assert f" {each.name} " in pages or f"\n       {each.name}\n" in pages, (name, each)
            assert " ".join(each.text.split()) in " ".join(pages.split()), (name, each)
    for heading in ("SYNOPSIS", "DESCRIPTION", "OPTIONS", "BEHAVIOUR", "EXAMPLE", "LIMITS"):
        assert len(BUILT_IN) == pages.count(f"\n{heading}\n")


@needs_groff
def test_the_settings_have_a_page() -> None:
    """The page has each setting with its default and its purpose."""
    page = shown(manpages.settings_page())
    names = [each.name for each in (*fields(Settings), *fields(Limits)) if each.name != "limits"]

    assert [] == [name for name in names if f"\n       {name} = " not in page]
    assert "poll_us = 60" in page
    assert "How many microseconds a worker looks" in page


@needs_groff
def test_signs_of_roff_are_none_in_a_page() -> None:
    """Backslashes, dots and quotes at the beginning of a line stay text, and text in backquotes is bold."""
    lines = [manpages._line(each) for each in (r"a\|b -c", ".SH no", "'nor this", "`bold`")]

    assert r"\fBbold\fR" == lines[-1]
    page = " ".join(shown(".TH X 7\n.SH NAME\n" + "\n".join(lines)).split())
    assert r"NAME a\|b -c .SH no 'nor this bold" in page


@needs_groff
def test_the_scripts_page_is_sound() -> None:
    """Groff gives no warning for the hand-written page of the hotplug script."""
    assert "block-xenbackend - hotplug script" in shown((ROOT / "debian/block-xenbackend.8").read_text())


def test_every_command_is_known() -> None:
    """Every command and nested command is listed with a line about it."""
    known = {" ".join(words): about for words, about in manpages.commands()}

    assert set(MODULES) == {each for each in known if each and " " not in each}
    assert {"image check", "log show", "config show"} <= set(known)
    assert all(known.values())


@pytest.mark.slow
@needs_groff
@pytest.mark.skipif(shutil.which("help2man") is None, reason="help2man is not installed")
def test_a_commands_page_is_its_help() -> None:
    """The page is made by help2man, and that of a nested command names related pages."""
    page = shown(manpages.command_page(["config", "show"], "print every setting"))

    assert "xenbackend-config-show - print every setting" in page
    assert "--defaults" in page
    assert "xenbackend.toml(5)" in page


def test_the_package_has_what_is_made() -> None:
    """The package's rules install the pages and the completions of all three shells."""
    rules = (ROOT / "debian/rules").read_text()

    for part in ("debian/manpages.py", "man8/block-xenbackend.8", "bash-completion/completions/xenbackend",
                 "zsh/vendor-completions/_xenbackend", "fish/vendor_completions.d/xenbackend.fish"):  # fmt: skip
        assert part in rules
