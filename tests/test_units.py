"""Tests of `xenbackend.units`."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from xenbackend.units import PAGE, format_duration, format_size, format_time, parse_duration, parse_size, round_up


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE), (2**70, 2**70)])
def test_round_up(value: int, expected: int) -> None:
    """Rounding up gives the smallest multiple that is not below the value."""
    assert expected == round_up(value, PAGE)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("512", 512), ("512b", 512), ("1k", 1024), ("1K", 1024), ("1KB", 1024), ("1KiB", 1024),
        ("64M", 64 << 20), ("2g", 2 << 30), ("3T", 3 << 40), ("1p", 1 << 50), (" 8M ", 8 << 20), ("007", 7),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    """A size is a number of bytes or one with a suffix for a power of 1024, in either case, with or without B."""
    assert size == parse_size(text)


@pytest.mark.parametrize(
    "text",
    ["", "M", "-1", "+1", "1.5G", "1 K", "1e3", "0x10", "1E", "1KK", "1_000", "\u0661", "1\u212a", "1\x00", "1K\n2"],
)
def test_what_is_no_size(text: str) -> None:
    """Anything else is refused, including digits and letters that are only Unicode variants of ours."""
    with pytest.raises(ValueError, match="is not a size; write bytes or a number with K, M"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("1.5", 1.5),
        ("2s", 2.0),
        ("5ms", 0.005),
        ("5MS", 0.005),
        ("7us", 7e-6),
        ("9ns", 9e-9),
        ("2m", 120.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    """A duration is a number with a unit; without one it is in seconds."""
    assert seconds == pytest.approx(parse_duration(text))


@pytest.mark.parametrize("text", ["", "s", "-1", "1 s", ".5", "1.", "1h", "1e-3", "inf", "nan", "\u0661s", "1\u017f"])
def test_what_is_no_duration(text: str) -> None:
    """Anything else is refused, including letters that are only Unicode variants of ours."""
    with pytest.raises(ValueError, match="is not a duration; write a number with ns, us"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (512, "512 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (64 << 20, "64 MiB"),
        ((1 << 30) - 1, "1024 MiB"), (1 << 30, "1 GiB"), (3 << 40, "3 TiB"), (5 << 50, "5 PiB"),
    ],
)  # fmt: skip
def test_sizes_for_people(size: int, text: str) -> None:
    """A size is shown in the largest unit that it fills."""
    assert text == format_size(size)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 us"), (1e-7, "0.1 us"), (12e-6, "12 us"), (0.0009999, "1 ms"), (0.0034, "3.4 ms"), (0.9999, "1 s"),
        (1, "1 s"), (2.5, "2.5 s"), (999.4, "999 s"), (1234.5, "1234 s"), (86400, "86400 s"),
    ],
)  # fmt: skip
def test_durations_for_people(seconds: float, text: str) -> None:
    """A duration is shown with three digits in the unit that suits it, never with an exponent."""
    assert text == format_duration(seconds)


def test_sizes_round_trip() -> None:
    """A size in whole units is read back from what is shown, without its space."""
    chance = random.Random(3)
    for _ in range(200):
        size = chance.randrange(1, 1000) << chance.choice([0, 10, 20, 30, 40])

        assert size == parse_size(format_size(size).replace(" ", ""))


@pytest.fixture(params=["UTC", "Asia/Kolkata", "America/St_Johns"])
def _zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("_zone")
@pytest.mark.parametrize("precision", ["seconds", "milliseconds", "microseconds"])
def test_a_time_means_the_same_everywhere(precision: str) -> None:
    """A time is one word with the host's zone, in winter and summer, so it means the same moment anywhere."""
    for moment in (0, 1_700_000_000, 1_720_000_000.25, 1_700_000_000.999999):
        text = format_time(moment, precision)
        read = datetime.fromisoformat(text)

        assert read.utcoffset() == datetime.fromtimestamp(moment).astimezone().utcoffset()
        assert 0 <= moment - read.timestamp() < {"seconds": 1, "milliseconds": 1e-3, "microseconds": 2e-6}[precision]
        assert [text] == text.split()
