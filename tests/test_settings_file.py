"""Tests of `xenbackend.settings_file`; supervisor/service/test_settings.py has the settings themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend.errors import ConfigError
from xenbackend.settings_file import read


def test_a_file_that_need_not_be_there(tmp_path: Path) -> None:
    """A missing default file means no values; a file that was named must exist."""
    assert {} == read(tmp_path / "none", must_exist=False)
    with pytest.raises(ConfigError, match="none: there is no such file"):
        read(tmp_path / "none", must_exist=True)


@pytest.mark.parametrize(("data", "sentence"), [(b"a = ", "is not TOML"), (b"\xff", "is not TOML")])
def test_a_file_that_says_nothing(tmp_path: Path, data: bytes, sentence: str) -> None:
    """A file that cannot be read is named in the error."""
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/a: {sentence}"):
        read(tmp_path / "a", must_exist=False)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path, must_exist=False)


def test_values_as_they_are_written(tmp_path: Path) -> None:
    """Values are returned by name, without checking them."""
    (tmp_path / "a").write_text('parents = ["/img"]\n[limits]\nx = 1\n')

    assert {"parents": ["/img"], "limits": {"x": 1}} == read(tmp_path / "a", must_exist=True)
