"""The driver sync."""

from __future__ import annotations

from pathlib import Path

from tests.helpers_block import Machine, content, flush, image, read, write


def test_everything_is_done_when_submit_returns(machine: Machine, tmp_path: Path) -> None:
    """Requests complete inside `submit`, with the file's content and without the worker's loop."""
    path = image(tmp_path / "img")
    chain = machine.open(f"sync:{path}")
    done = []
    chain.complete = done.extend
    request = read(0, 4096)
    chain.submit([write(0, b"s" * 4096)])
    chain.submit([request, flush()])
    chain.close()

    assert [0, 0, 0] == [each.status for each in done]
    assert b"s" * 4096 == content(request)
    assert path.read_bytes()[:4096] == b"s" * 4096


def test_it_says_that_it_blocks(machine: Machine, tmp_path: Path) -> None:
    """The reported mode distinguishes it from aio."""
    chain = machine.open(f"sync:{image(tmp_path / 'img')},cache=on")
    mode = chain.layers[0].driver.env.facts["mode"]
    chain.close()

    assert mode == "page cache, blocking calls"
