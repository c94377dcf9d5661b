"""Tests of `xenbackend.block.mapped.parents`; opener/test_parents.py tests where an image may lead to."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from xenbackend.block.driver import Found
from xenbackend.block.mapped.parents import PARENT, find_named, is_file_name, parent_ref, places_of
from xenbackend.block.spec import parse_chain


@pytest.mark.parametrize("name", ["a|b", "a,b", r"a\b", "aio:x", " "])
def test_a_parent_is_one_layer(name: str) -> None:
    """Whatever characters its path has, a parent is written as one layer with that file. Empty options are omitted."""
    text = parent_ref("vhd", f"/img/{name}", parents="/a,b", cache="").text
    (layer,) = parse_chain(text).layers

    assert (f"/img/{name}", "/a,b", False) == (layer.options.file, layer.options.parents, layer.options.cache)
    assert os.fspath(layer.options.file) == f"/img/{name}"


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("", []),
        ("/img", ["/img"]),
        ("/img:/srv/base", ["/img", "/srv/base"]),
        ("img:/srv", ["img", "/srv"]),
        ("/dev/disk/by-path/pci-0000:00:1f.2", ["/dev/disk/by-path/pci-0000:00:1f.2"]),
    ],
)
def test_several_places(text: str, places: list[str]) -> None:
    """In `parents=`, a colon before a slash separates two places. Any other colon is part of a name."""
    assert places == places_of(text)


def test_the_act_is_reported() -> None:
    """A disk passes on what its image names and where that may be, and reports by whose decision it was opened."""
    asked: list[Any] = []
    facts: dict[str, str] = {}

    def find(*question: Any) -> Found:
        asked.append(question)
        return Found("/img/base", "its mark")

    env = SimpleNamespace(files=SimpleNamespace(find=find), report=facts.__setitem__)
    disk: Any = SimpleNamespace(options=SimpleNamespace(file="/img/a", parents="/img"), env=env)

    assert "/img/base" == find_named(disk, PARENT, ["base"])
    assert [("parent", "/img/a", ["base"], "/img")] == asked
    assert {"parent_by": "its mark"} == facts


@pytest.mark.parametrize(
    ("name", "expected"), [("base", True), ("/img/base", True), ("nbd://x", False), ("json:{}", False), ("C:x", False)]
)
def test_what_is_a_file_to_qemu(name: str, expected: bool) -> None:
    """In QEMU's names, a word and a colon at the beginning are a protocol, and the rest is not a file."""
    assert expected == is_file_name(name)
