"""Pages in memory and in a file; tests/block/test_durable_map.py lets each step of their flush fail."""

from __future__ import annotations

from pathlib import Path

from tests.helpers_block import StepEnv
from tests.recorded import RecordedFile
from xenbackend.block.durable_pages import PAGE, TOKEN, DurablePages


def opened(env: StepEnv, file: RecordedFile, token: bytes = b"t" * TOKEN) -> DurablePages:
    """Return three pages behind the first one of a file."""
    found = DurablePages(env, "pages", file, PAGE, 3 * PAGE, token)
    found.are_sound()
    file.complete = lambda batch: [found.take(part) for part in batch]
    return found


def test_they_are_taken_from_memory_only_for_the_same_file() -> None:
    """Pages are taken from memory only with the same token. With another one, or without memory, the file counts."""
    file = RecordedFile(bytearray(b"f" * 4 * PAGE))
    env = StepEnv()
    first = opened(env, file)
    assert not first.is_left
    first.bytes[0] = 1
    assert (True, 1) == (opened(env, file).is_left, opened(env, file).bytes[0])
    other = DurablePages(env, "pages", file, PAGE, 3 * PAGE, b"o" * TOKEN)
    assert (False, ord("f")) == (other.is_left, other.bytes[0])

    assert not DurablePages(StepEnv(), "pages", file, PAGE, 3 * PAGE, b"t" * TOKEN).is_left


def test_what_is_altered_during_a_flush_is_of_the_next_one() -> None:
    """A page that is altered during a flush is written by the next one, as its data may not be durable yet."""
    env, file, ended = StepEnv(), RecordedFile(bytearray(4 * PAGE)), list[int]()
    pages = opened(env, file)
    pages.bytes[PAGE] = 1
    pages.touch(1)
    pages.flush(ended.append)
    pages.bytes[PAGE] = 2
    pages.touch(1)
    while not ended:
        assert not pages.is_idle
        assert file.step()
    assert (1, True) == (file.bytes[2 * PAGE], pages.is_idle)
    pages.close(writes=True)

    assert 2 == file.bytes[2 * PAGE]


def test_many_pages_take_few_mappings() -> None:
    """A discard of 1 TiB changes many pages, but needs few mappings, of which the kernel gives a process 65530.
    Adjacent pages are written together, 1 MiB at a time, and pages between them that did not change are not written.
    """
    env, file, ended, size = StepEnv(), RecordedFile(bytearray(1800 * PAGE)), list[int](), 1800 * PAGE
    pages = DurablePages(env, "pages", file, 0, size, b"t" * TOKEN)
    file.complete = lambda batch: [pages.take(part) for part in batch]
    changed = [*range(600), *range(601, 1800, 2)]
    for page in changed:
        pages.bytes[page * PAGE] = 1
        pages.touch(page)
    pages.flush(ended.append)
    before = len(Path("/proc/self/maps").read_text().splitlines())
    while len(file.waiting) < 2:
        assert file.step()
    assert len(Path("/proc/self/maps").read_text().splitlines()) < before + 50
    while file.step():
        pass

    assert [0] == ended
    writes = [each for each in file.log if each.kind == "write"]
    assert 603 >= len(writes)
    assert 1 << 20 == max(len(each.data) for each in writes)
    assert changed == [page for page in range(1800) if file.bytes[page * PAGE]]
