"""The ring fuzzer itself: it finds what is known to be wrong, and what is right passes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ring_fuzz import messages
from tests.ring_fuzz.__main__ import CORPUS, Figures
from tests.ring_fuzz.bed import Bed
from tests.ring_fuzz.episode import Episode, Tally
from tests.ring_fuzz.wrong import WRONG
from xenbackend.blkif.abi import LAYOUTS
from xenbackend.blkif.request import encode_direct, encode_discard, encode_indirect, encode_segments

pytestmark = pytest.mark.slow  # each starts a process


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_found(wrong: str) -> None:
    """Each defence that is taken out is missed within some episodes."""
    command = [sys.executable, "-m", "tests.ring_fuzz", "--episodes", "0-12", "--wrong", wrong]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert 1 == found.returncode
    assert re.search(r"^episode \d+: (Violation|BackendMisbehaved): ", found.stderr, re.MULTILINE), found.stderr


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_message_is_laid_out_as_a_frontend_does(layout: messages.Layout) -> None:
    """The slot of a direct, a discarding and an indirect message is what a frontend makes of the same fields."""
    segments = [(9, 0, 7), (10, 1, 2)]
    content = encode_segments(segments)
    head = messages._HEAD.pack(1, 2, 0, 1500)
    direct = messages.Message((head + content).ljust(112, b"\0"))

    assert encode_direct(layout, 1, 77, 1500, segments) == messages.encode(direct, layout, 77, 5)
    assert encode_discard(layout, 77, 1500, 8) == messages.encode(messages._discard(1500, 8), layout, 77, 5)
    indirect = messages._indirect(1, 2, 1500, content)
    assert encode_indirect(layout, 1, 77, 1500, 2, [5]) == messages.encode(indirect, layout, 77, 5)


@pytest.mark.rows("B10", "R1", "R7")
def test_kept_messages_are_answered_as_they_were(tmp_path: Path) -> None:
    """Every message of the corpus is read, and messages made of them do no harm."""
    corpus, tally, bed = messages.read(CORPUS), Tally(), Bed(tmp_path)
    for number in range(3):
        Episode(bed, 7, number, corpus, tally).run(1000)
    bed.close()

    assert len(corpus) > 50
    assert corpus == [messages.read_line(messages.as_line(message)) for message in corpus]
    assert tally.counts["messages"] >= 3000
    assert tally.counts["rewritten"] > 10
    assert tally.counts["episodes"] == 3


def test_an_episode_is_the_same_again(tmp_path: Path) -> None:
    """Seed and number choose an episode's messages, whatever was run before it."""
    bed, sent = Bed(tmp_path), []
    for before in (0, 1):
        for number in range(before, -1, -1):
            episode = Episode(bed, 3, 5 + number, [], Tally())
            episode.run(100)
        sent.append(list(episode.recent))
    bed.close()

    assert sent[0] == sent[1]


def test_figures_go_on(tmp_path: Path) -> None:
    """A run goes on where the one before has ended, with the same seed; another seed, or a failure, begins anew."""
    file = tmp_path / "fuzz.json"
    figures = Figures(file, 1, anew=False)
    figures.add({"counts": {"messages": 7}, "kept": {}}, 40)
    figures.write()

    assert (40, 7) == (
        Figures(file, 1, anew=False).known["next"],
        Figures(file, 1, anew=False).known["counts"]["messages"],
    )
    assert 0 == Figures(file, 2, anew=False).known["next"]
    figures.known["failed"] = ["0-40"]
    figures.write()
    assert 0 == Figures(file, 1, anew=False).known["next"]
