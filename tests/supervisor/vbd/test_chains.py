"""How orders change the text of the chain in service."""

from __future__ import annotations

import pytest

from xenbackend.errors import ConfigError
from xenbackend.supervisor.vbd import chains


def test_a_chain_gets_a_name_in_the_place_of_its_unnamed_file() -> None:
    """The layers around the unnamed file stay as they are, and the new name is escaped as the grammar requires."""
    assert "log:|cow:/a\\|b|delay:|aio:/img" == chains.with_named("log:|cow:block=8K|delay:|aio:/img", "/a|b")


def test_of_two_unnamed_files_the_upper_one_is_named() -> None:
    """Of two unnamed files the upper one gets the name; the lower one is only read, and holds nothing."""
    assert "cow:/a|cow:|aio:/img" == chains.with_named("cow:|cow:|aio:/img", "/a")


@pytest.mark.parametrize("chain", ["aio:/img", "log:|cow:/a|aio:/img"])
def test_a_chain_without_an_unnamed_file_is_refused(chain: str) -> None:
    """A chain without an unnamed file has nothing to keep or to drop, so both are refused."""
    with pytest.raises(ConfigError, match="the disk has no unnamed file"):
        chains.with_named(chain, "/b")
    with pytest.raises(ConfigError, match="the disk has no unnamed file"):
        chains.with_unnamed(chain)


def test_a_chain_has_a_place_for_an_unnamed_file_or_not() -> None:
    """A chain with a layer for the unnamed file keeps it, whatever else it has; any other chain is refused."""
    chains.check_keeps_unnamed("log:|cow:block=8K|aio:/other")
    for chain in ("aio:/img", "log:|cow:/a|aio:/img"):
        with pytest.raises(ConfigError, match=r"would be lost: in .* there is no cow: without a file"):
            chains.check_keeps_unnamed(chain)


def test_what_does_not_fit_into_xenstore_is_refused() -> None:
    """A chain that is longer than xenstore's quota for a value, 2048 characters, is refused."""
    assert "a" * 2048 == chains.short("a" * 2048)
    with pytest.raises(ConfigError, match="a chain of 2049 characters"):
        chains.short("a" * 2049)


def test_a_file_is_named_whole() -> None:
    """Files must be named by absolute paths, because the service has its own working directory."""
    assert "/a" == chains.whole("/a")
    with pytest.raises(ConfigError, match="is not an absolute path"):
        chains.whole("a")


@pytest.mark.parametrize("chain", ["aio:/other", "log:|aio:/new", "delay:|qcow2:/new", "frob:/new", ""])
def test_another_image_is_none_over_the_former(chain: str) -> None:
    """A worker's new chain is accepted only if it has the file that was asked for, below the same filters."""
    assert chains.is_over("log:|qcow2:/new", "log:|aio:/img", "/new")
    assert chains.is_over(chain, "log:|aio:/img", "/new") == (chain == "log:|aio:/new")
