"""Typed options."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from xenbackend.block.grammar import parse
from xenbackend.block.options import (
    Count,
    Duration,
    Errno,
    FilePath,
    Fraction,
    OptionHelp,
    Size,
    Span,
    describe_options,
    files_of,
    nearest,
    option,
    parse_options,
)
from xenbackend.errors import ChainError


@dataclass(frozen=True, slots=True)
class Everything:
    """One option of each kind."""

    file: FilePath = option("the image", target=True)
    size: Size = option("a size", default=0)
    wait: Duration = option("a time", default=0.0)
    code: Errno = option("an error", default=errno.EIO)
    on: bool = option("a switch", default=False)
    number: int = option("a number", default=0)
    real: float = option("a real number", default=0.0)
    count: Count = option("a count", default=0)
    part: Fraction = option("a part", default=1.0)
    where: Span | None = option("a range", default=None)
    word: Literal["a", "b"] = option("a word", default="a")
    text: str = option("a text", default="")

    def __post_init__(self) -> None:
        if self.number == 13:
            raise ValueError("13 brings bad luck")


@dataclass(frozen=True, slots=True)
class Needy:
    """Options without a target, one of which must be given."""

    key: int = option("the key")


@dataclass(frozen=True, slots=True)
class Lenient:
    """A target that can be omitted."""

    file: FilePath = option("a file", default="", target=True)
    size: Size = option("a size", default=0)


@dataclass(frozen=True, slots=True)
class Sized:
    """A target that is no file."""

    size: Size = option("a size", target=True)


@dataclass(frozen=True, slots=True)
class Worded:
    """Options whose target may be omitted, and is no file."""

    word: str = option("a word", default="", target=True)
    size: Size = option("a size", default=0)


def parsed(text: str, options: type = Everything) -> Any:
    """Return the options of the first layer."""
    return parse_options(options, parse(text)[0], text)


@pytest.mark.parametrize(
    ("item", "name", "expected"),
    [
        ("size=64M", "size", 64 << 20),
        ("wait=5ms", "wait", 0.005),
        ("code=ENOSPC", "code", errno.ENOSPC),
        ("code=enospc", "code", errno.ENOSPC),
        ("code=5", "code", errno.EIO),
        ("on=yes", "on", True),
        ("on=off", "on", False),
        ("number=-3", "number", -3),
        ("real=1.5", "real", 1.5),
        ("count=0", "count", 0),
        ("part=0.5", "part", 0.5),
        ("where=1M-2M", "where", (1 << 20, 2 << 20)),
        ("word=b", "word", "b"),
        (r"text=a\,b=c", "text", "a,b=c"),
        ("text=", "text", ""),
    ],
)
def test_the_annotation_chooses_how_a_value_is_read(item: str, name: str, expected: object) -> None:
    """Each kind of option is read from its text into a value of its type."""
    assert expected == getattr(parsed(f"x:/img,{item}"), name)


@pytest.mark.parametrize(
    ("text", "problem", "marked"),
    [
        ("x:", "the file is missing", "x:"),
        ("x:,on=yes", "the file is missing", "x:,on=yes"),
        ("x:/img,", "an option is empty", ""),
        ("x:/img,on", "'on' is not key=value", "on"),
        ("x:/img,file=/b", "write file first", "file"),
        ("x:/img,wort=a", "did you mean word?", "wort"),
        ("x:/img,on=yes,on=no", "option on is given twice", "on=no"),
        ("x:/img,on=maybe", "not one of on, off, yes, no", "maybe"),
        ("x:/img,size=big", "is not a size", "big"),
        ("x:/img,wait=soon", "is not a duration", "soon"),
        ("x:/img,code=EFOO", "is not an error of this system", "EFOO"),
        ("x:/img,code=9999", "is not an error of this system", "9999"),
        ("x:/img,code=0", "is not an error of this system", "0"),
        ("x:/img,code=errorcode", "is not an error of this system", "errorcode"),
        ("x:/img,number=1.5", "is not a whole number", "1.5"),
        ("x:/img,count=-1", "is not a whole number of 0 or more", "-1"),
        ("x:/img,part=1.5", "is not a number from 0 to 1", "1.5"),
        ("x:/img,part=nan", "is not a number from 0 to 1", "nan"),
        ("x:/img,where=5", "write START-END", "5"),
        ("x:/img,where=2-2", "is an empty range", "2-2"),
        ("x:/img,word=c", "is not one of a, b", "c"),
        (r"x:/a\,b,word=c", "is not one of a, b", "c"),
        ("x:/img,number=13", "13 brings bad luck", "x:/img,number=13"),
        ("tap2:x:/img,word=c|y:", "is not one of a, b", "c"),
    ],
)
def test_a_bad_option_is_marked_where_it_stands(text: str, problem: str, marked: str) -> None:
    """Each fault of an option has a message of its own, with the caret under the key or the value at fault."""
    with pytest.raises(ChainError) as caught:
        parsed(text)

    error = caught.value
    assert problem in error.problem
    assert marked == text[error.position : error.position + error.length]


def test_an_option_without_default_must_be_given() -> None:
    """An option without a default, unless it is the target, must be given as key=value."""
    assert Needy(key=3) == parsed("x:key=3", Needy)
    with pytest.raises(ChainError, match="the key is missing"):
        parsed("x:", Needy)


def test_the_target_is_whatever_the_first_item_contains() -> None:
    """If a driver has a target, the first item is the target; a path may look like key=value behind a slash."""
    assert Everything(file="/on=yes", on=True) == parsed("x:/on=yes,on=yes")
    assert Everything(file="./szie=4K") == parsed("x:./szie=4K")
    assert Worded(word="szie=4K") == parsed("x:szie=4K", Worded)


def test_a_target_that_may_be_left_out_is_no_other_option() -> None:
    """If the target can be omitted, ``log:track=off`` switches tracking off and names no file."""
    assert Lenient(size=4096) == parsed("x:size=4K", Lenient)
    assert Lenient(file="./size=4K") == parsed("x:./size=4K", Lenient)


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ("x:szie=4K", Lenient, "option 'szie' (a file needs its whole path); it knows size; did you mean size?"),
        ("x:other=/a/b,size=4K", Lenient, "unknown option 'other' (a file needs its whole path); it knows size"),
        ("x:wiat=1,on=yes", Everything, "; did you mean wait?"),
        ("x:wait=1", Everything, "x: the file is missing: the image"),
        ("x:file=/img,size=4K", Lenient, "write file first and without file="),
        ("x:file=/img,on=yes", Everything, "write file first and without file="),
        ("x:size=4K", Sized, "write size first and without size="),
    ],
)
def test_an_option_is_no_file(text: str, options: type, problem: str) -> None:
    """An option in the place of a file is refused and creates no file of that name; the caret is under its key."""
    with pytest.raises(ChainError, match=re.escape(problem)) as caught:
        parsed(text, options)

    key = text[2:].partition("=")[0]
    assert key == text[caught.value.position : caught.value.position + caught.value.length]


def test_files_are_found_by_their_kind() -> None:
    """Only options of the type `FilePath` that are given count as files."""
    assert files_of(parsed("x:/img,text=/other")) == {"file": "/img"}


def test_the_help_comes_from_the_dataclass() -> None:
    """The table of options shows the type, default and text of each option, and marks the target."""
    table = {each.name: each for each in describe_options(Everything)}

    assert OptionHelp("file", "file", "", "the image", is_target=True) == table["file"]
    assert OptionHelp("code", "errno", "EIO", "an error", is_target=False) == table["code"]
    assert OptionHelp("on", "on or off", "off", "a switch", is_target=False) == table["on"]
    assert OptionHelp("where", "range", "none", "a range", is_target=False) == table["where"]


def test_a_word_that_resembles_nothing_gets_no_proposal() -> None:
    """A similar word is proposed only if there is one."""
    assert nearest("zzzz", ["aio", "log"]) == ""
    assert nearest("LOH", ["aio", "log"]) == "; did you mean log?"
