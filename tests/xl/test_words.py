"""Words that are left behind a chain."""

from __future__ import annotations

import pytest

from xenbackend.errors import ConfigError
from xenbackend.xl import words


@pytest.mark.parametrize(
    ("chain", "left"),
    [
        ("log:|aio:/img", []), ("aio:/img,xvda,w", ["xvda", "w"]), ("aio:/img,cache=on,xvda", ["xvda"]),
        ("log:/x,xvda|aio:/img", []), (r"aio:/a\,b", []), (r"aio:/a\\,b", ["b"]), ("aio:/img, xvda ,,", ["xvda"]),
    ],
)  # fmt: skip
def test_what_is_left_over(chain: str, left: list[str]) -> None:
    """Words without ``=`` behind the last layer's first word are left; an escaped comma belongs to a file's name."""
    assert left == words.trailing(chain)


@pytest.mark.parametrize(
    ("chain", "found"), [("aio:/img,xvda,w", ",xvda,w"), ("aio:/img,sda1", ",sda1"), ("aio:/i,x", ""), ("aio:/i", "")]
)
def test_what_belongs_to_the_configuration(chain: str, found: str) -> None:
    """Words from a device on belong to the configuration; anything else may be a mistyped option."""
    assert found == words.misplaced(chain)


def test_the_first_wrong_word_is_blamed() -> None:
    """The first word must be a device, and at most one access mode may follow."""
    for wrong, said in ((["foo", "w"], "'foo' is not a virtual"), (["xvda", "x"], "'x' is not an access mode"),
                        (["xvda", "r", "w"], "'r' and 'w' both")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            words.check(wrong)


@pytest.mark.parametrize("access", ["r", "ro", "w", "rw"])
def test_each_access_that_xl_knows_is_taken(access: str) -> None:
    """Every access mode of xl is accepted behind a device, which may also stand alone."""
    words.check(["xvda", access])
    words.check(["xvda"])


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("0xca00", True), ("0x10000000", True), ("0x100000000", False), ("0xca00,", False), ("0xcag0", False)],
)
def test_a_device_may_be_a_number_as_xl_takes_it(name: str, *, is_one: bool) -> None:
    """A device may be a number of 32 bits with nothing behind it."""
    assert is_one == words.is_device(name)
