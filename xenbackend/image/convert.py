"""Converts the disk of a chain to a new image, whose file gets its name only when all of it is durable.

Must not write to the source, nor over anything that exists.

Until then the file is called ``TARGET.partial``, and ``TARGET.partial.json`` says from what it is made and how far it
is durable. So a conversion that was stopped by Ctrl-C, a full disk or SIGKILL can be resumed, unless the source has
changed since. The times and sizes of its files show that; for a block device it cannot be known.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from xenbackend.block.extents import Extent, Kind, merged
from xenbackend.block.formats.blank import Blank, Wishes, blank
from xenbackend.block.formats.table import BY_DRIVER
from xenbackend.block.options import files_of
from xenbackend.block.spec import ChainSpec, parse_chain
from xenbackend.errors import ConfigError, DriverError, printable
from xenbackend.image.check import check, repair
from xenbackend.image.extents import map_chain
from xenbackend.image.names import Image, at_another_path
from xenbackend.image.session import Disk, Progress, RequestFailed, Session
from xenbackend.image.transfer import Piece, Transfer, pieces_of
from xenbackend.opener.newfile import publish, refuse_existing, replace_durably, sync_directory, write_new
from xenbackend.units import SECTOR, format_size

SMALL_HOLE = 64 << 10  # bytes: shorter ranges of zeros are read like data


@dataclass(frozen=True, slots=True)
class Converted:
    """The result in bytes: the size of the disk, how much was written, and where the copy was resumed (0: not)."""

    size: int
    written: int
    resumed_at: int


def convert(
    source: ChainSpec,
    target: Image,
    wishes: Wishes,
    progress: Progress,
    *,
    resume: bool = False,
    direct: bool = False,
) -> Converted:
    """Create `target` from the disk of `source`; `direct` bypasses the page cache if the files allow it.

    Raises: ConfigError if the target exists, or a partial file without `resume` or from another conversion, or if the
        source was changed meanwhile; DriverError. Once the copy has begun, also RequestFailed and OSError. After these,
        and after an exception from `progress`, the partial file is kept so that the conversion can be resumed.
    """
    if target.format == "raw" and Path(target.path).exists():
        raise ConfigError(f"{printable(target.path)} exists already; to overwrite all of its content: --overwrite")
    if target.data_file:
        raise ConfigError(f"{target.text}: a new image holds its data itself; leave data_file= out")
    refuse_existing(target.path)
    partial = at_another_path(target, f"{target.path}.partial")
    state = State(f"{partial.path}.json")
    resume = resume and Path(partial.path).exists()
    if not resume:
        _refuse_partial(partial.path)
        state.remove()  # may be left from a process that was killed after it had published the image
    with Session(direct=direct) as session:
        disk = session.open(source, read_only=True)
        begun = _identity(disk, target, wishes)
        if resume:
            state.load(begun)
            _mend(partial)
        else:
            _begin(partial, blank(target.format, disk.size, wishes, None), state, begun)
        made = session.open(parse_chain(partial.text), read_only=False, is_draft=True)
        if not Path(partial.path).exists():
            raise ConfigError(f"{printable(target.path)} has been completed meanwhile by another process")
        done = state.load(begun)  # the partial file is locked now: nobody else changes the state
        written = _copy(session, disk, made, done, progress, lambda place: state.save(begun, place))
        session.close(made)
        session.open_file(partial.path, read_only=True, step=SECTOR)  # a lock, so that nobody else resumes it
        if _identity(disk, target, wishes) != begun:
            raise ConfigError(f"the source was changed while it was converted to {printable(partial.path)}; {_ANEW}")
        publish(partial.path, target.path)
        state.remove()
        return Converted(disk.size, written, done)


def overwrite(source: ChainSpec, target: ChainSpec, progress: Progress, *, direct: bool = False) -> Converted:
    """Overwrite an existing disk with the disk of `source`, including its zeros. The rest of a larger one is kept.

    This cannot be resumed, only done again.

    Args:
        source: what is read.
        target: one layer: a raw image, a block device, or a disk of a server or cluster.
        progress: is told how many bytes are done.
        direct: bypass the page cache if the files allow it.

    Raises: ConfigError if the target is not a raw disk, or is smaller; DriverError if one is in use; RequestFailed.
    """
    known = BY_DRIVER.get(target.layers[-1].driver.name)
    if known is not None and known.name != "raw":
        raise ConfigError(f"only a raw image can be overwritten, and {target.text} is not raw")
    with Session(direct=direct) as session:
        disk = session.open(source, read_only=True)
        there = session.open(target, read_only=False)
        if there.size < disk.size:
            raise ConfigError(
                f"{target.text} has {format_size(there.size)}, but the source has {format_size(disk.size)}"
            )
        transfer = Transfer(session, disk, there, is_blank=False)
        progress(0, disk.size)
        extents = without_small_holes(map_chain(disk.chain.layers, all_holes=True))
        transfer.run(pieces_of(extents), lambda piece: progress(piece.end, disk.size))
        transfer.flush()
        return Converted(disk.size, transfer.written, 0)


class State:
    """The file that says how far a partial image is durable."""

    def __init__(self, path: str) -> None:
        self._path = path

    def save(self, begun: dict[str, Any], done: int) -> None:
        """Write the state durably; `done` bytes of the target are durable. Raises: OSError."""
        replace_durably(self._path, (json.dumps({**begun, "done": done}, indent=2) + "\n").encode())

    def load(self, begun: dict[str, Any]) -> int:
        """Return how many bytes are done. Raises: ConfigError if the state is of another conversion, or unreadable."""
        path = printable(self._path)
        try:
            found = json.loads(Path(self._path).read_bytes())
            done = int(found.pop("done"))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path} cannot be read, so it is not known how far the conversion went; {_ANEW}"
            ) from error
        wrong = [key for key, value in begun.items() if found.get(key) != value]
        if wrong:
            problem = f"the conversion that {path} records began with another {wrong[0]}"
            if wrong == ["files"]:
                problem = f"the source has changed since the conversion that {path} records"
            raise ConfigError(f"{problem}; {_ANEW}")
        return done

    def remove(self) -> None:
        """Remove the file, if it exists. Raises: OSError."""
        with suppress(FileNotFoundError):
            Path(self._path).unlink()
            sync_directory(self._path)


_ANEW = "remove the .partial file and its .json to start again"


def _refuse_partial(path: str) -> None:
    if os.path.lexists(path):
        raise ConfigError(
            f"{printable(path)} is left from an earlier conversion; continue that with --resume, or remove the file"
        )


def _identity(disk: Disk, target: Image, wishes: Wishes) -> dict[str, Any]:
    """Return the facts that must be unchanged when a conversion is resumed."""
    return {**identity_of(disk), "target": target.text, "wishes": asdict(wishes)}


def identity_of(disk: Disk) -> dict[str, Any]:
    """Return the source of a disk, with numbers, sizes and times of its files, which show whether it has changed."""
    files = {}
    for layer in disk.chain.layers:
        for path in files_of(layer.driver.options).values():
            if layer.driver.is_filter:  # such as a record, which is written while we read
                continue
            found = os.stat(path)  # noqa: PTH116 - as `opening`: pathlib would alter the name
            files[path] = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]
    source = [layer.text for layer in disk.chain.layers]
    return {"source": source, "size": disk.size, "files": files}


def _begin(partial: Image, new: Blank, state: State, begun: dict[str, Any]) -> None:
    """Create a partial image, which fails if it exists, and then its state."""
    write_new(partial.path, new)
    try:
        state.save(begun, 0)
    except BaseException:
        Path(partial.path).unlink()
        raise


def _mend(partial: Image) -> None:
    """Repair a partial image: after a power failure, any part of what was not yet durable may be missing.

    Raises: ConfigError if that is impossible; DriverError if somebody else uses it.
    """
    try:
        verdict = check(partial)
        if verdict.status and partial.format == "qcow2":
            verdict = repair(partial)
    except DriverError as error:
        if error.errno == errno.EBUSY:  # somebody else is resuming it
            raise
        raise ConfigError(f"{error}; that conversion cannot be continued; {_ANEW}") from error
    if verdict.errors:
        problem = verdict.sentences[0] if verdict.sentences else "it is damaged"
        raise ConfigError(f"{printable(partial.text)}: {problem}; that conversion cannot be continued; {_ANEW}")


def _copy(
    session: Session, source: Disk, target: Disk, done: int, progress: Progress, save: Callable[[int], None]
) -> int:
    """Copy from offset `done` on; return how many bytes were written. If it fails, the state allows to resume it."""
    if target.size < source.size:
        layer = target.chain.layers[0].text
        raise DriverError(f"it has {target.size} bytes, but the source has {source.size}", layer=layer)
    transfer = Transfer(session, source, target, is_blank=True)

    def tell(piece: Piece) -> None:
        nonlocal done
        done = piece.end
        progress(done, source.size)

    try:
        progress(done, source.size)
        transfer.run(pieces_of(_to_copy(source, done)), tell, lambda piece: save(piece.end))
    except BaseException:
        with suppress(RequestFailed, OSError):  # the first failure is the one to report
            transfer.flush()
            save(done)
        raise
    transfer.flush()
    progress(source.size, source.size)
    return transfer.written


def _to_copy(source: Disk, done: int) -> Iterator[Extent]:
    """Yield the extents from offset `done` on that may have data."""
    for extent in without_small_holes(map_chain(source.chain.layers, all_holes=True)):
        if not extent.is_zeros and extent.end > done:
            start = max(done, extent.start)
            yield Extent(start, extent.end - start, Kind.DATA)


def without_small_holes(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Yield extents as data or zeros; ranges of zeros below SMALL_HOLE, which cost less than a request, become data."""
    whole = merged(Extent(each.start, each.length, Kind.ZERO if each.is_zeros else Kind.DATA) for each in extents)
    return merged(replace(each, kind=Kind.DATA) if each.length < SMALL_HOLE else each for each in whole)
