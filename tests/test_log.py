"""What a line of the log looks like, and what limits lines."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from datetime import datetime

import pytest
import structlog

from xenbackend import log


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_journal_lines_carry_their_priority() -> None:
    """Each line begins with the priority of sd-daemon(3) and the vbd that it is about."""
    stream = io.StringIO()
    log.configure("journal", "info", stream)
    logger = log.get_logger("supervisor", vbd="vbd/5/51712")
    logger.info("Connected", frontend="Initialised", worker=12)
    logger.error("it broke")
    logger.debug("not shown")

    assert "<6>vbd/5/51712: Connected frontend=Initialised worker=12\n<3>vbd/5/51712: it broke\n" == stream.getvalue()


def test_every_line_of_a_traceback_has_the_priority() -> None:
    """Every line of a traceback in the journal has the same priority."""
    stream = io.StringIO()
    log.configure("journal", "info", stream)
    try:
        raise ValueError("x\ny")
    except ValueError:
        log.get_logger("service").exception("bug")

    assert {"<3>"} == {line[:3] for line in stream.getvalue().splitlines()}


def test_json_lines_are_json() -> None:
    """With --log json each line is one object with component, event, level and time."""
    stream = io.StringIO()
    log.configure("json", "info", stream)
    log.get_logger("service").warning("hello")
    line = json.loads(stream.getvalue())

    assert ("service", "hello", "warning") == (line["component"], line["event"], line["level"])


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_line_says_when_it_was(form: str) -> None:
    """A line has the time with its zone; in the journal's format it has none, as the journal adds its own."""
    stream = io.StringIO()
    log.configure(form, "info", stream)
    log.get_logger("service").warning("hello")
    [text] = re.findall(r"\d{4}-\d\d-\d\dT[0-9:.]+[+-]\d\d:\d\d", stream.getvalue())

    assert abs(datetime.fromisoformat(text).timestamp() - time.time()) < 60


@pytest.mark.rows("R13", "A30")
def test_guest_text_cannot_forge_lines() -> None:
    """R13: control characters in a value are escaped and long values are cut, in every format."""
    stream = io.StringIO()
    log.configure("journal", "info", stream)
    log.get_logger("x").info("said", text="a\n<0>forged\x1b[2J\u202e" + "b" * 9000)

    assert 1 == stream.getvalue().count("\n")
    assert "\\n<0>forged\\x1b[2J\\u202e" in stream.getvalue().replace("\\\\", "\\")
    assert len(stream.getvalue()) < 700


@pytest.mark.parametrize("form", log.FORMATS)
def test_a_line_tells_its_length_and_is_cut_after_it_was_escaped(form: str) -> None:
    """R13: the limit is applied after escaping, so a line of escapes is not much longer than one of plain text."""
    lengths = []
    for text in ("x" * 9000, "\x1b" * 9000, "\udcff" * 9000):
        stream = io.StringIO()
        log.configure(form, "info", stream)
        logger = log.get_logger("x")
        lengths.append(logger.warning(text))

        assert len(stream.getvalue().encode()) == lengths[-1]
        assert logger.debug(text) is None
    assert max(lengths) <= 2 * min(lengths)  # JSON doubles a backslash
