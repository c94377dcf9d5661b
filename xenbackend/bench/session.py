"""One session: the bench file, the targets, and the rounds in which they take their turns.

Must not print.

Targets take turns within each round, so that what the machine does meanwhile meets all of them alike: only the ratios
of one session mean anything.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from xenbackend.bench.plan import LENGTH, SECTOR, SMALLEST, BenchError, Sample, Work, stamp
from xenbackend.bench.server import choose_cpus, foreign_time
from xenbackend.bench.target import Bed, Target, chain_target, peers
from xenbackend.errors import ConfigError
from xenbackend.rig.xen import Xen
from xenbackend.units import format_size, round_up

FILE = "{file}"  # in a chain: the bench file
_FIRST_DOMID = 1

Progress = Callable[[str, int], None]  # what is measured next, and how many measurements there are in all


@dataclass(frozen=True, slots=True)
class Session:
    """What to measure. A chain that does not name the bench file, as ``{file}``, is only read unless `overwrite`."""

    chains: list[str]
    works: list[Work]
    file: Path  # the bench file, made and removed by us
    size: int  # bytes
    compare: bool = False
    direct: bool = False
    overwrite: bool = False
    persistent: bool = True
    rounds: int = 5
    seconds: float = 1.0
    warm_up: float = 0.3
    poll: float = 100e-6  # seconds that a load generator looks before it sleeps


@dataclass(frozen=True, slots=True)
class Measured:
    """The samples of one workload on one target, in the order of the rounds."""

    work: Work
    target: str
    samples: list[Sample]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a session yields. `foreign` is how many CPUs were busy with what was not ours; it should be near 0."""

    measured: list[Measured]
    foreign: float


def run(session: Session, progress: Progress) -> Outcome:
    """Measure, and leave nothing behind.

    Raises: BenchError, ConfigError, KernelError.
    """
    if session.rounds < 1 or session.seconds <= 0:
        raise ConfigError("a session takes at least one round of more than no seconds")
    begin, before = time.monotonic(), foreign_time()
    measured = _measure(session, progress)
    return Outcome(measured, max(0.0, (foreign_time() - before) / (time.monotonic() - begin)))


def _measure(session: Session, progress: Progress) -> list[Measured]:
    with ExitStack() as stack:
        cpus = choose_cpus()
        if cpus is not None:
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cpus[1]})
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xenbackend-bench-")))
        if session.compare or any(FILE in chain for chain in session.chains):
            stack.enter_context(bench_file(session.file, session.size))
        poll_ns = int(session.poll * 1e9)
        bed = Bed(session.file, directory, session.direct, cpus[0] if cpus else None, poll_ns)
        stack.enter_context(Xen(directory))
        targets: list[Target] = []
        for target in _start(session, bed):
            stack.callback(target.close)
            targets.append(target)
        return _rounds(session, targets, progress)


def _start(session: Session, bed: Bed) -> Iterator[Target]:
    for domid, chain in enumerate(session.chains, _FIRST_DOMID):
        ours = FILE in chain
        yield chain_target(
            bed,
            chain.replace(FILE, _escaped(bed.file)),
            domid,
            name=chain,
            read_only=not (ours or session.overwrite),
            verify=ours,
            persistent=session.persistent,
        )
    for peer in peers(direct=session.direct) if session.compare else ():
        yield peer.start(bed)


def _escaped(path: Path) -> str:
    # As the chain's grammar wants it.
    return "".join(f"\\{character}" if character in "|,\\" else character for character in str(path))


def _rounds(session: Session, targets: list[Target], progress: Progress) -> list[Measured]:
    table = {(work.name, target.name): Measured(work, target.name, []) for work in session.works for target in targets}
    total = session.rounds * len(table)
    for number in range(session.rounds):
        for work in session.works:
            for target in targets:
                progress(f"round {number + 1} of {session.rounds}: {work.title}, {target.name}", total)
                sample = target.measure(work, session.seconds, session.warm_up)
                table[work.name, target.name].samples.append(sample)
    return list(table.values())


@contextlib.contextmanager
def bench_file(path: Path, size: int) -> Iterator[None]:
    """Make a stamped file of about `size` bytes at `path`, and remove it in the end. Raises: ConfigError."""
    if size < SMALLEST:
        raise ConfigError(f"a bench file takes at least {format_size(SMALLEST)}, not {format_size(size)}")
    try:
        file = path.open("xb")
    except FileExistsError:
        raise ConfigError(f"{path} exists; a bench makes its own file, and removes it in the end") from None
    except OSError as error:
        raise ConfigError(f"the bench file {path} cannot be made: {error.strerror}") from None
    try:
        _fill(file, round_up(size, LENGTH))
        yield
    finally:
        path.unlink()


def _fill(file: BinaryIO, size: int) -> None:
    buffer = bytearray(LENGTH)
    try:
        with file:
            for offset in range(0, size, LENGTH):
                stamp(buffer, offset // SECTOR)
                file.write(buffer)
            os.fsync(file.fileno())
    except OSError as error:
        raise BenchError(f"the bench file {file.name} cannot be written: {error.strerror}") from None
