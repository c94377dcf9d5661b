"""Asks the installed libxlutil, which is xl's own reading of configurations and disk lines. See xlu.c.

Needs gcc and Debian's libxen-dev. Must not import anything of ours: it is the other opinion.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
HEADER = Path("/usr/include/libxlutil.h")


@dataclass(frozen=True)
class Disk:
    """A disk line as xl reads it."""

    target: str | None
    vdev: str | None
    access: str | None
    script: str | None = None
    backend: str | None = "unknown"
    format: str | None = "raw"
    kind: str | None = "disk"


class Xlu:
    """A compiled harness."""

    def __init__(self, folder: Path) -> None:
        self._program = folder / "xlu"
        libraries = ["-lxlutil", "-lxenlight"]
        subprocess.run(["gcc", "-Wall", "-Werror", "-o", self._program, SOURCE, *libraries], check=True)

    def disks(self, lines: Iterable[str]) -> list[Disk | None]:
        """Return each line as xl reads it, None where it refuses it."""
        return [None if answer is None else Disk(*answer) for answer in self._ask("disk", lines)]

    def configs(self, texts: Iterable[str]) -> list[list[str | None] | None]:
        """Return the disk lines of each text as xl reads it, None where it refuses it."""
        return self._ask("cfg", texts)

    def _ask(self, kind: str, texts: Iterable[str]) -> list[list[str | None] | None]:
        encoded = [os.fsencode(text) for text in texts]
        questions = b"".join(f"{kind} {len(text)}\n".encode() + text for text in encoded)
        answers = subprocess.run([self._program], input=questions, check=True, capture_output=True, text=False).stdout
        found = [_parse(line.decode()) for line in answers.splitlines()]
        assert len(encoded) == len(found)
        return found


def can_compile() -> bool:
    """Return whether this machine has what the harness needs."""
    return shutil.which("gcc") is not None and HEADER.exists()


def _parse(answer: str) -> list[str | None] | None:
    error, *texts = answer.split()
    if error != "0":
        return None
    return [os.fsdecode(bytes.fromhex(text[1:])) if text[0] == ":" else None for text in texts]
