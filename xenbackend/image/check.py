"""Checks a single image file, and repairs what can be repaired without risk.

Must not check an image that somebody writes to, nor repair anything on which data may depend, nor import modules for
other formats than the image's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from xenbackend.block.driver import File
from xenbackend.image.names import Image, blame
from xenbackend.image.session import Session
from xenbackend.image.tools import tools_of
from xenbackend.image.writing import write_plan
from xenbackend.units import SECTOR

CLEAN, ERRORS, LEAKS = 0, 2, 3  # the exit statuses of qemu-img check


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a check. `leaks` are clusters or blocks that nothing uses: they waste room, but are harmless."""

    image: str
    errors: int
    leaks: int
    is_dirty: bool = False
    sentences: Sequence[str] = ()
    repaired: int = 0  # errors and leaks

    @property
    def status(self) -> int:
        """The exit status of `image check`."""
        return ERRORS if self.errors or self.is_dirty else LEAKS if self.leaks else CLEAN


def check(image: Image) -> Verdict:
    """Check an image to which nobody writes. Raises: DriverError if it is in use, or is not an image of its format."""
    with Session(use_queues=False) as session:
        file = session.open_file(image.path, read_only=True, step=SECTOR)
        return _look(session, image, file)


def repair(image: Image) -> Verdict:
    """Check an image that nobody uses, repair it, and check it again.

    Raises: DriverError if it is in use, cannot be repaired without risk, or has its data in a file that only the image
        itself names; OSError.
    """
    with Session(use_queues=False) as session:
        file = session.open_file(image.path, read_only=True, step=SECTOR)
        tools = tools_of(image.format)
        with blame(image):
            tools.refuse_unchosen_data(image, file)
        session.close(file)
        file = session.open_file(image.path, read_only=False, step=image.row.step)
        before = _look(session, image, file)
        if before.status:
            with blame(image):
                write_plan(file, tools.plan_repair(image, file))
        after = _look(session, image, file)
        return replace(after, repaired=before.errors + before.leaks - after.errors - after.leaks)


def _look(session: Session, image: Image, file: File) -> Verdict:
    with blame(image):
        faults = tools_of(image.format).check(session, image, file)
    return Verdict(image.text, faults.errors, faults.leaks, faults.is_dirty, tuple(faults.sentences))
