"""Parsed chains, which can be opened."""

from __future__ import annotations

import pytest

from xenbackend.block.drivers.aio import Aio
from xenbackend.block.drivers.delay import Delay
from xenbackend.block.spec import check_whole_paths, parse_chain
from xenbackend.errors import ChainError, ConfigError


def test_a_chain_knows_its_drivers_options_and_canonical_text() -> None:
    """A parsed chain has each layer's class, checked options and canonical text. No file has been opened."""
    spec = parse_chain("tap2:delay:read=5ms|aio:/no/such/file")

    assert spec.text == "delay:read=5ms|aio:/no/such/file"
    assert [Delay, Aio] == [layer.driver for layer in spec.layers]
    assert Delay.Options(read=0.005) == spec.layers[0].options
    assert spec.layers[1].text == "aio:/no/such/file"


@pytest.mark.parametrize(
    ("text", "problem", "marked"),
    [
        ("dealy:|aio:/img", "unknown driver 'dealy'; did you mean delay?", "dealy"),
        ("zonk:/img", "`xenbackend drivers` lists", "zonk"),
        ("aio:tap2:delay:|qed:/img", "known but not built in this version", "qed"),
        ("aio:disk:1.img", r"if it begins the name of a file, write aio:disk\:", "disk"),
        ("delay:read=61m|aio:/img", "no request may wait longer than 3600 s", "delay:read=61m"),
        ("aio:/img|delay:", "aio is a source and passes nothing on", "aio:/img"),
        ("delay:|null:|aio:/img", "null is a source and passes nothing on", "null:"),
        ("delay:|delay:read=1s", "delay is a filter and needs a layer below", "delay:read=1s"),
        ("delay:read=x|aio:/img", "option read", "x"),
    ],
)
def test_a_chain_that_cannot_work_is_refused(text: str, problem: str, marked: str) -> None:
    """Unknown drivers, drivers that are not built, and layers in a wrong place each have a message with a caret."""
    with pytest.raises(ChainError) as caught:
        parse_chain(text)

    error = caught.value
    assert problem in error.problem
    assert marked == text[error.position : error.position + error.length]


def test_a_file_that_is_not_named_whole_is_found() -> None:
    """A relative file name, which would mean another file elsewhere, is refused with layer, option and path."""
    check_whole_paths(parse_chain("log:/var/log/x.rec|aio:/img"))

    with pytest.raises(
        ConfigError,
        match=r"^log:x\.rec: option record: x\.rec is relative to the service's working directory; .*/x\.rec$",
    ):
        check_whole_paths(parse_chain("log:x.rec|aio:/img"))
