"""The tags of a write-back cache; tests/block/test_write_back.py tests them in a disk, with kills and power loss."""

from __future__ import annotations

import pytest

from tests.helpers_block import StepEnv
from tests.recorded import RecordedFile
from xenbackend.block.durable_pages import PAGE, TOKEN
from xenbackend.block.durable_tags import DurableTags
from xenbackend.errors import DriverError


def opened(env: StepEnv, file: RecordedFile) -> DurableTags:
    """Return tags of 1024 slots at the beginning of a file."""
    found = DurableTags(env, file, 0, 2 * PAGE, b"t" * TOKEN)
    file.complete = lambda batch: [found.pages.take(part) for part in batch]
    return found


def test_a_tag_is_put_and_taken_away() -> None:
    """The slots that have a tag are returned with their blocks, from memory and, after a flush, from the file."""
    env, file, ended = StepEnv(), RecordedFile(bytearray(2 * PAGE)), list[int]()
    tags = opened(env, file)
    for slot, block in ((3, 0), (700, 12), (8, 2**40)):
        tags.put(slot, block)
    tags.drop(8)
    assert [(3, 0), (700, 12)] == list(tags.tagged())
    assert not any(file.bytes)
    tags.flush(ended.append)
    while file.step():
        pass

    assert [0] == ended
    assert [(3, 0), (700, 12)] == list(opened(StepEnv(), file).tagged())


def test_what_a_predecessor_left_is_durable_before_anything_is_made_of_it() -> None:
    """Tags that a predecessor left are written durably before use: the file may show them, but not its medium."""
    env, file = StepEnv(), RecordedFile(bytearray(2 * PAGE))
    opened(env, file).put(1, 1)
    opened(env, file)
    assert (["flush", "write", "flush", "flush"], 2) == ([each.kind for each in file.log], file.bytes[8])
    begun = len(file.log)
    opened(env, file)

    assert ["flush"] == [each.kind for each in file.log[begun:]]


@pytest.mark.parametrize(
    ("tags", "fits"),
    [
        ({0: 0, 9: 1, 17: 130}, True),
        ({0: 1}, False),  # a block of another set
        ({0: 0, 1: 0}, False),  # the same block twice
        ({0: 1024}, False),  # beyond the end of the disk
        ({0: 2**60}, False),
    ],
)
def test_tags_that_cannot_be_are_refused(tags: dict[int, int], *, fits: bool) -> None:
    """Tags that cannot be right are refused, whether a guest has taken over the worker or the disk has shrunk."""
    found = opened(StepEnv(), RecordedFile(bytearray(2 * PAGE)))
    for slot, block in tags.items():
        found.put(slot, block)
    if fits:
        found.check(8, 128, 1000, most=3)
        with pytest.raises(DriverError, match="its map is damaged: more than 2 blocks are marked as dirty"):
            found.check(8, 128, 1000, most=2)
    else:
        with pytest.raises(DriverError, match="its map is damaged, or the disk below has shrunk: slot"):
            found.check(8, 128, 1000, most=3)
