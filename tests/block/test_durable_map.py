"""The map of `cow:`; tests/block/drivers/test_cow.py tests it in a disk, with kills and power loss."""

from __future__ import annotations

from random import Random

import pytest

from tests.helpers_block import StepEnv
from tests.recorded import RecordedFile
from xenbackend.block.durable_map import DurableMap
from xenbackend.block.durable_pages import PAGE, TOKEN
from xenbackend.errors import DriverError


def opened(env: StepEnv, file: RecordedFile, pages: int = 3, token: bytes = b"t" * TOKEN) -> DurableMap:
    """Return a map at the beginning of a file."""
    found = DurableMap(env, file, 0, pages * PAGE, token)
    file.complete = lambda batch: [found.take(part) for part in batch]
    return found


def run(file: RecordedFile) -> None:
    """Do all steps that are due."""
    while file.step():
        pass


def test_only_pages_that_changed_are_written() -> None:
    """A flush writes each changed page once, and the next flush writes none of them."""
    env, file, ended = StepEnv(), RecordedFile(bytearray(3 * PAGE)), list[int]()
    found = opened(env, file)
    found.mark(1, 1)
    found.mark(2 * PAGE, 2)
    for _ in range(2):
        found.flush(ended.append)
        run(file)
    kinds = [(each.kind, each.place) for each in file.log]

    assert ([0, 0], ("flush", 0)) == (ended, kinds[0])
    assert {("write", 0), ("write", 2 * PAGE)} == set(kinds[1:3])
    assert [("flush", 0)] * 2 == kinds[3:]
    assert (1, 2) == (file.bytes[1], file.bytes[2 * PAGE])


def test_a_successor_knows_what_was_never_written() -> None:
    """A successor's next flush writes the pages that a killed worker had changed only in memory."""
    env, file, ended = StepEnv(), RecordedFile(bytearray(3 * PAGE)), list[int]()
    opened(env, file).mark(PAGE + 5, 1)
    again = opened(env, file)
    assert (1, 1) == (again.states[PAGE + 5], again.counts[1])
    again.flush(ended.append)
    run(file)

    assert ([0], 1) == (ended, file.bytes[PAGE + 5])


@pytest.mark.parametrize("step", ["first flush", "write", "second flush"])
def test_what_failed_is_done_again(step: str) -> None:
    """If a step of a flush fails, the flush fails, and the next one writes the same pages again."""
    env, file, ended = StepEnv(), RecordedFile(bytearray(3 * PAGE)), list[int]()
    found = opened(env, file)
    found.mark(7, 1)
    seen: list[int] = []
    file.fails = lambda request: (seen.append(request.op), 5 if len(seen) == fails else 0)[1]
    fails = ["first flush", "write", "second flush"].index(step) + 1
    for _ in range(2):
        found.flush(ended.append)
        run(file)

    assert ([5, 0], 1) == (ended, file.bytes[7])


def test_closing_writes_what_is_left() -> None:
    """Closing without a flush makes data and map durable. A reader's closing writes nothing."""
    for writes in (True, False):
        env, file = StepEnv(), RecordedFile(bytearray(3 * PAGE))
        found = opened(env, file)
        found.mark(3, 2)
        found.close(writes=writes)
        assert (["flush", "write", "flush"] if writes else []) == [each.kind for each in file.log]


def test_a_range_is_marked_like_each_of_its_blocks() -> None:
    """Marking a range changes its blocks in the expected state and no others, and only changed pages are written."""
    chance = Random(1)
    for _ in range(50):
        states = chance.choices(range(3), k=3 * PAGE)
        env, file, ended = StepEnv(), RecordedFile(bytearray(states)), list[int]()
        found, former, state = opened(env, file), chance.randrange(3), chance.randrange(3)
        first = chance.randrange(3 * PAGE)
        last = chance.randrange(first, 3 * PAGE)
        found.exchange(first, last, former, state)
        states[first : last + 1] = [state if each == former else each for each in states[first : last + 1]]
        assert (states, [states.count(each) for each in range(3)]) == (list(found.states), found.counts)
        found.flush(ended.append)
        run(file)
        assert ([0], states) == (ended, list(file.bytes))
        pages = {each.place // PAGE for each in file.log if each.kind == "write"}
        assert pages <= set(range(first // PAGE, last // PAGE + 1))


@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_state_that_is_none_is_refused(where: str) -> None:
    """A state that does not exist, in the file or in the memory that a predecessor left, is refused with what to do."""
    env, file = StepEnv(), RecordedFile(bytearray(3 * PAGE))
    opened(env, file)
    if where == "memory":
        env.memories["map"][PAGE + 5] = 3
    else:
        env.memories.clear()
        file.bytes[PAGE + 5] = 3
    said, way_out = {"memory": (" in memory", "detach the disk"), "file": ("", "the file cannot be used")}[where]
    problem = f"its map{said} is damaged: block 4101 has state 3, which does not exist; {way_out}"
    with pytest.raises(DriverError, match=problem):
        opened(env, file)
