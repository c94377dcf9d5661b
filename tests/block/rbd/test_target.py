"""Tests of `xenbackend.block.rbd.target`: how an image is named."""

from __future__ import annotations

import pytest

from xenbackend.block.rbd.target import Target, parse_target

GOOD = {
    "rbd/guest1": Target("rbd", "", "guest1"),
    "rbd/tenant/guest1": Target("rbd", "tenant", "guest1"),
    "rbd/guest1@then": Target("rbd", "", "guest1", "then"),
    "a b/c,d/e|f@g h": Target("a b", "c,d", "e|f", "g h"),
    "p/Volume-ä.1:2": Target("p", "", "Volume-ä.1:2"),
}
BAD = {
    "": "neither POOL/IMAGE",
    "guest1": "neither POOL/IMAGE",
    "a/b/c/d": "neither POOL/IMAGE",
    "/guest1": "empty name",
    "rbd/": "empty name",
    "rbd//guest1": "empty name",
    "rbd/guest1@": "empty name",
    "rbd/guest1@a@b": "one snapshot",
    "rbd/guest1@a/b": "one snapshot",
    "rbd@a/guest1": "neither POOL/IMAGE",
    "rbd/a\0b": "no pool or image can have",
    "rbd/" + 5000 * "a": "no pool or image can have",
    "rbd/a:id=xen:conf=/etc/c.conf": "rbd:rbd/a,id=xen,conf=/etc/c.conf",
}


@pytest.mark.parametrize("text", GOOD)
def test_what_is_written_is_what_is_meant(text: str) -> None:
    """Pool, namespace, image and snapshot are read as `rbd` reads them, and shown as they were written."""
    assert GOOD[text] == parse_target(text)
    assert text == str(parse_target(text))


@pytest.mark.parametrize("text", BAD)
def test_what_cannot_be_is_refused_in_a_sentence(text: str) -> None:
    """A text that names no image is refused. For QEMU's syntax, the error shows how to write it here."""
    with pytest.raises(ValueError, match=BAD[text]):
        parse_target(text)
