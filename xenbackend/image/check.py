"""Checking an image file by itself, and repairing what can be repaired without risk.

Must not look at an image that somebody writes to, nor repair what data may depend on, nor import what looks at another
format than the image's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from xenbackend.block.driver import File
from xenbackend.errors import DriverError, printable
from xenbackend.image.faults import Faults
from xenbackend.image.names import Image
from xenbackend.image.session import Session
from xenbackend.units import PAGE, round_up

if TYPE_CHECKING:
    from xenbackend.block.formats.qcow2_repair import Write

_SECTOR = 512
CLEAN, ERRORS, LEAKS = 0, 2, 3  # as qemu-img check ends
STEP = {"qcow2": 64 * 1024, "qcow": 64 * 1024, "vhd": 512, "raw": 512}  # bytes: what a file that is written ends at


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found. `leaks` are clusters or blocks that nothing uses: lost room, and no danger."""

    image: str
    errors: int
    leaks: int
    is_dirty: bool = False
    sentences: Sequence[str] = ()
    repaired: int = 0  # errors and leaks

    @property
    def status(self) -> int:
        """What `image check` ends with."""
        return ERRORS if self.errors or self.is_dirty else LEAKS if self.leaks else CLEAN


def check(image: Image) -> Verdict:
    """Look at an image that nobody writes to. Raises: DriverError, where it is in use or no image of its format."""
    with Session(use_queues=False) as session:
        file = session.open_file(image.path, read_only=True, step=512)
        return _look(session, image, file)


def repair(image: Image) -> Verdict:
    """Check an image that nobody uses, write what mends it, and check it again.

    Raises: DriverError, where it is in use, cannot be repaired without risk, or has its data in a file that only it
        names; OSError.
    """
    with Session(use_queues=False) as session:
        file = session.open_file(image.path, read_only=True, step=512)
        refuse_unchosen_data(image, file)
        session.close(file)
        file = session.open_file(image.path, read_only=False, step=STEP[image.format])
        before = _look(session, image, file)
        if before.status:
            try:
                write_plan(file, _plan(image, file))
            except DriverError as error:
                error.layer = error.layer or image.text
                raise
        after = _look(session, image, file)
        return replace(after, repaired=before.errors + before.leaks - after.errors - after.leaks)


def refuse_unchosen_data(image: Image, file: File) -> None:
    """Refuse to write to an image whose data are in another file, where its layer does not say in which.

    Raises: DriverError, OSError.
    """
    options: Any = image.chain.layers[0].options
    if image.format != "qcow2" or options.data_file:
        return
    from xenbackend.block.formats import qcow2
    from xenbackend.block.qcow.datafile import find_data

    try:
        header = qcow2.parse_header(file.read_at, file.size)
        if header.has_data_file:
            find_data(image.path, header.data_name, "", options.parents, read_only=False)
    except DriverError as error:
        error.layer = error.layer or image.text
        raise


def write_plan(file: File, plan: Sequence[Sequence[Write]]) -> None:
    """Do lists of writes, each durable before the next one is begun; the file grows as it has to. Raises: OSError."""
    for writes in filter(None, plan):
        end = max(offset + len(data) for offset, data in writes)
        if end > file.size:
            file.grow(round_up(end, PAGE))
        for offset, data in writes:
            file.write_at(offset, data)
        file.sync()


def _plan(image: Image, file: File) -> list[list[Write]]:
    if image.format == "vhd":
        from xenbackend.block.drivers.vhd import is_device
        from xenbackend.image import vhd_check

        return vhd_check.plan_repair(file, on_device=is_device(image.path))
    if image.format == "qcow2":
        from xenbackend.block.formats import qcow2_check
        from xenbackend.block.formats.qcow2_repair import plan_repair

        found = qcow2_check.Check(file.read_at, file.size)
        found.run()
        return plan_repair(found)
    return []


def _look(session: Session, image: Image, file: File) -> Verdict:
    try:
        faults = _faults(image, file)
        if image.format == "vhd" and not faults.errors:
            _open_parents(session, image, faults)
    except DriverError as error:
        error.layer = error.layer or image.text
        raise
    return Verdict(image.text, faults.errors, faults.leaks, faults.is_dirty, tuple(faults.sentences))


def _open_parents(session: Session, image: Image, faults: Faults) -> None:
    """Open the image with its parents, by the rules of a disk in service: what cannot be opened is not sound.

    A lock would be in the way of the one that the caller has, and says nothing of what is in the files.
    """
    try:
        session.close(session.open(image.chain, read_only=True, locked=False))
    except DriverError as error:
        where = "" if error.layer == image.text else f"its parent {printable(error.layer)}: "
        faults.add_error(f"it cannot be opened: {where}{error.problem}")


def _faults(image: Image, file: File) -> Faults:
    if image.format == "vhd":
        from xenbackend.block.drivers.vhd import is_device
        from xenbackend.image import vhd_check

        return vhd_check.check(file.read_at, file.size, on_device=is_device(image.path))
    if image.format == "qcow":
        from xenbackend.image import qcow_check

        return qcow_check.check(file.read_at, file.size)
    from xenbackend.block.formats import qcow2_check

    report = qcow2_check.check(file.read_at, file.size)
    faults = Faults(report.errors + report.is_corrupt, report.leaks, is_dirty=report.is_dirty)
    faults.sentences = report.sentences[:]
    _look_for_data(image, file, faults)
    return faults


def _look_for_data(image: Image, file: File, faults: Faults) -> None:
    """See that an external data file is there, may be opened, and is as long as the disk."""
    from xenbackend.block.formats import qcow2
    from xenbackend.block.qcow.datafile import check_length, find_data

    header, options = qcow2.parse_header(file.read_at, file.size), image.chain.layers[0].options
    if not header.has_data_file:
        return
    try:
        chosen = options.data_file
        path = find_data(image.path, header.data_name, chosen, options.parents, read_only=True)
        with Session(use_queues=False) as session:
            check_length(path, session.open_file(path, read_only=True, step=_SECTOR).size, header.size)
    except OSError as error:
        faults.add_error(str(error))
    except DriverError as error:
        faults.add_error(error.problem)
