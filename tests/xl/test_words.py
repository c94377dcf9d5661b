"""Words that are left over behind a chain."""

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
    """What has no ``=`` behind the last layer's first word; an escaped comma belongs to a file's name."""
    assert left == words.trailing(chain)


@pytest.mark.parametrize(
    ("chain", "found"), [("aio:/img,xvda,w", ",xvda,w"), ("aio:/img,sda1", ",sda1"), ("aio:/i,x", "")]
)
def test_what_belongs_to_the_configuration(chain: str, found: str) -> None:
    """Words that begin with a device; anything else may be a mistyped option."""
    assert found == words.misplaced(chain)


def test_the_first_wrong_word_is_blamed() -> None:
    """A device first, then one access."""
    for wrong, said in ((["foo", "w"], "'foo' is not a virtual"), (["xvda", "x"], "'x' is no access"),
                        (["xvda", "w", "w"], "remove one")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            words.check(wrong)
    words.check(["xvda", "rw"])
    assert words.is_device("0xca00")
