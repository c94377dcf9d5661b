"""The errors and leaks that a check counts, with sentences about them.

Must not decide what they mean for the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_SENTENCES = 50


@dataclass
class Faults:
    """What a check has found. Errors endanger data; leaks are clusters or blocks of the file that nothing uses."""

    errors: int = 0
    leaks: int = 0
    is_dirty: bool = False  # the image itself says that its tables may be out of date
    sentences: list[str] = field(default_factory=list)

    def add_error(self, sentence: str) -> None:
        """Count an error, and keep its sentence unless there are MAX_SENTENCES already."""
        self.errors += 1
        if len(self.sentences) < MAX_SENTENCES:
            self.sentences.append(sentence)

    def add_leaks(self, count: int, sentence: str) -> None:
        """Count leaks, and keep the sentence unless there are MAX_SENTENCES already."""
        self.leaks += count
        if len(self.sentences) < MAX_SENTENCES:
            self.sentences.append(sentence)
