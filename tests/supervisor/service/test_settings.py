"""Settings: defaults, the file, the command line, and the errors for mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend.errors import ConfigError
from xenbackend.supervisor.service.settings import SettingsError, load


def test_every_setting_is_optional(tmp_path: Path) -> None:
    """An empty file gives the defaults: the real host and only vbds with our script."""
    (tmp_path / "x.toml").touch()
    settings = load(tmp_path / "x.toml", {})

    assert ("xenbackend.kernel.xen", "ours", 4) == (settings.host, settings.serve, settings.limits.max_queues)
    assert ["block-xenbackend", "tap2"] == settings.scripts


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    """A value on the command line overrides the file; otherwise the file's value counts."""
    path = tmp_path / "x.toml"
    path.write_text('serve = "ours"\nstore = "/s"\n[limits]\nmax_queues = 8\n')
    settings = load(path, {"serve": "all", "store": None})

    assert ("all", "/s", 8, 256) == (
        settings.serve,
        settings.store,
        settings.limits.max_queues,
        settings.limits.max_segments,
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('sorcket = "/x"', "there is no setting sorcket; did you mean socket?"),
        ("frob = 1", "there is no setting frob; the known ones are store, host"),
        ("store = 5", "store is 5; it must be text in quotes"),
        ('scripts = "x"', "scripts is 'x'; it must be a list of texts"),
        ("scripts = [1]", "it must be a list of texts"),
        ('serve = "some"', "serve is 'some'; it must be ours or all"),
        ('log = "xml"', "it must be console or journal or json"),
        ('host = ""', "host is empty; leave it out"),
        ('parents = ["img"]', "parents is ['img']; it must name directories by their whole paths"),
        ('parents = "/img"', "it must be a list of texts"),
        ("kinds = []", "kinds is []; it must name directories of xenstore"),
        ('kinds = ["../x"]', "it must name directories of xenstore"),
        ("limits = 4", "limits is not a table"),
        ("[limits]\nmax_queue = 4", "did you mean max_queues?"),
        ("[limits]\nmax_queues = true", "it must be a whole number"),
        ("[limits]\nmax_queues = 9", "limits.max_queues is 9; it must be from 1 to 8"),
        ("[limits]\nmax_ring_order = 5", "it must be from 0 to 4"),
        ("serve = ", "is not TOML"),
        ("\xff", "is not TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, sentence: str) -> None:
    """A wrong name, type or value is refused with the file, the setting and what it must be."""
    path = tmp_path / "x.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load(path, {})

    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)


def test_a_file_that_was_named_must_exist(tmp_path: Path) -> None:
    """A settings file that --config names must exist; without --config it may be missing."""
    with pytest.raises(ConfigError, match="there is no such file"):
        load(tmp_path / "missing.toml", {})


def test_all_mistakes_are_told_with_their_lines(tmp_path: Path) -> None:
    """All mistakes are listed in the order of the file, each with its line; one on the command line has none."""
    path = tmp_path / "x.toml"
    path.write_text("# one\nfrob = 1\npoll_us = 5000\n[limits]\nmax_queue = 1\nmax_segments = 1\n")
    with pytest.raises(SettingsError) as caught:
        load(path, {"serve": "some"})
    places, sentences = zip(*(each.split(" ", 1) for each in caught.value.mistakes), strict=True)

    assert tuple(f"{path}{line}:" for line in (":2", ":3", ":5", ":6", "")) == places
    assert ("poll_us is 5000", "limits.max_segments is 1") == (sentences[1][:15], sentences[3][:24])
    assert sentences[4].startswith("serve is 'some'")
    assert "; and 4 more mistakes, which `xenbackend run --check` shows" in str(caught.value)


def test_an_override_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    """A mistake on the command line is not reported with the line where the file sets the same thing correctly."""
    path = tmp_path / "x.toml"
    path.write_text('serve = "all"\n')
    with pytest.raises(SettingsError) as caught:
        load(path, {"serve": "some"})

    assert f"{path}: serve is 'some'; it must be ours or all" == str(caught.value)
