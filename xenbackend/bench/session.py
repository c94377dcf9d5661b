"""One session: the bench file, the targets, and the rounds in which they take turns.

Must not print.

Targets take turns within each round, so that other activity of the machine affects all of them alike. Only ratios
within one session are meaningful.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import BinaryIO

from xenbackend.bench import calls, native
from xenbackend.bench.beside import Loops
from xenbackend.bench.disturbance import Usage, between, look
from xenbackend.bench.plan import LENGTH, SMALLEST, BenchError, Sample, Work, stamp
from xenbackend.bench.server import choose_cpus
from xenbackend.bench.target import Bed, Target, chain_target, limit_target, peers
from xenbackend.block.formats.table import BY_QEMU_NAME
from xenbackend.errors import ConfigError
from xenbackend.rig.xen import Xen
from xenbackend.units import SECTOR, format_size, round_up

FILE = "{file}"  # stands for the bench file in a chain
IMAGES = {name: row for name, row in BY_QEMU_NAME.items() if name != "raw"}  # possible formats of the bench file
NEVER_LOOKS = ", never looking"  # suffix of the name of a chain whose worker sleeps as soon as its ring is empty
_FIRST_DOMID = 1
_COUNTED_S = 0.3  # how long each workload runs while system calls are counted
_FRESH = 64 << 30  # bytes of an empty image

Start = Callable[[Bed], Target]
Progress = Callable[[str, int], None]  # gets what is measured next, and the total number of measurements


@dataclass(frozen=True, slots=True)
class Session:
    """What to measure. A chain without the bench file, ``{file}``, is only read, unless `overwrite` is set."""

    chains: list[str]
    works: list[Work]
    file: Path  # the bench file, which the session creates and removes
    size: int  # bytes
    image: str = "raw"  # the format of the bench file, as qemu-img calls it
    compare: bool = False
    direct: bool = False
    overwrite: bool = False
    persistent: bool = True
    rounds: int = 5
    seconds: float = 1.0
    warm_up: float = 0.3
    poll: float = 100e-6  # seconds that a load generator polls before it sleeps
    beside: str = ""  # a loop of this kind (`beside.NICE`) on each CPU; each chain is measured without polling, too
    calls: bool = False  # count system calls after all measurements


@dataclass(frozen=True, slots=True)
class Measured:
    """The samples of one workload on one target, in the order of the rounds.

    client   the language of the load generator, empty if the target generates its own load
    calls    system calls per request, if they were counted
    """

    work: Work
    target: str
    samples: list[Sample]
    client: str = ""
    calls: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a session: the samples, what else used the CPUs, and notes on what could not be measured."""

    measured: list[Measured]
    usage: Usage
    notes: list[str]


def run(session: Session, progress: Progress) -> Outcome:
    """Run a session, and leave no file or process behind.

    Raises: BenchError, ConfigError, KernelError.
    """
    if session.rounds < 1 or session.seconds <= 0:
        raise ConfigError("a session needs at least one round, of more than 0 seconds")
    before = look()
    notes: list[str] = []
    measured = _measure(session, progress, notes)
    return Outcome(measured, between(before, look()), notes)


def _measure(session: Session, progress: Progress, notes: list[str]) -> list[Measured]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xenbackend-bench-")))
        built = native.build(directory)
        if built.missing:
            notes.append(f"The load generator for rings is in Python, and there is no C limit: {built.missing}.")
        loops = Loops(session.beside, directory) if session.beside else None
        if loops is not None:
            stack.callback(loops.close)
        cpus = choose_cpus()
        if cpus is not None:
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cpus[1]})
        if session.compare or any(FILE in chain for chain in session.chains):
            stack.enter_context(bench_file(session.file, session.size, session.image))
        poll_ns = int(session.poll * 1e9)
        bed = Bed(
            file=session.file,
            directory=directory,
            direct=session.direct,
            backend_cpu=cpus[0] if cpus else None,
            poll_ns=poll_ns,
            native=built,
            loops_time=loops.cpu_time if loops else None,
            image=session.image,
        )
        stack.enter_context(Xen(directory))
        runners = _runners(session, has_limit=built.ring_server is not None)
        targets: list[Target] = []
        for start in runners:
            targets.append(start(bed))
            stack.callback(targets[-1].close)
        measured = _rounds(session, bed, list(zip(runners, targets, strict=True)), progress)
        return _with_calls(measured, targets, directory, notes) if session.calls else measured


def _runners(session: Session, *, has_limit: bool) -> list[Start]:
    """Return a function for each target, which starts it on a bed and may be called any number of times."""
    domids = count(_FIRST_DOMID)
    starts: list[Start] = []
    for chain in session.chains:
        starts.append(partial(_start_chain, session, chain, domids))
        if session.beside:
            starts.append(partial(_start_chain, session, chain, domids, never_looks=True))
    if session.compare and session.image == "raw" and has_limit:
        starts.append(partial(_start_limit, session, domids))
    if session.compare:
        starts += [peer.start for peer in peers(direct=session.direct, image=session.image != "raw")]
    return starts


def _start_limit(session: Session, domids: Iterator[int], bed: Bed) -> Target:
    return limit_target(bed, next(domids), persistent=session.persistent)


def _start_chain(session: Session, chain: str, domids: Iterator[int], bed: Bed, *, never_looks: bool = False) -> Target:
    ours = FILE in chain
    return chain_target(
        bed,
        chain.replace(FILE, _escaped(bed.file)),
        next(domids),
        name=chain + (NEVER_LOOKS if never_looks else ""),
        never_looks=never_looks,
        read_only=not (ours or session.overwrite) or is_read_only(session.image),
        verify=ours,
        persistent=session.persistent,
    )


def _escaped(path: Path) -> str:
    # As the grammar of chains requires.
    return "".join(f"\\{character}" if character in "|,\\" else character for character in str(path))


def _rounds(session: Session, bed: Bed, runners: list[tuple[Start, Target]], progress: Progress) -> list[Measured]:
    targets = [target for _, target in runners]
    table = {
        (work.name, target.name): Measured(work, target.name, [], target.client)
        for work in session.works
        for target in targets
    }
    total = session.rounds * len(table)
    for number in range(session.rounds):
        for work in session.works:
            for start, target in runners:
                progress(f"round {number + 1} of {session.rounds}: {work.title}, {target.name}", total)
                sample = _fresh(session, bed, start, work) if work.fresh else _of(target, session, work)
                table[work.name, target.name].samples.append(sample)
    return list(table.values())


def _with_calls(measured: list[Measured], targets: list[Target], directory: Path, notes: list[str]) -> list[Measured]:
    """Return the measurements with the system calls per request added, if a tool here can count them."""
    by_name = {target.name: target for target in targets}
    try:
        return [
            each
            if each.work.fresh
            else replace(each, calls=by_name[each.target].count_calls(each.work, _COUNTED_S, directory))
            for each in measured
        ]
    except calls.Uncountable as error:
        notes.append(f"System calls were not counted: {error}.")
        return measured


def _of(target: Target, session: Session, work: Work) -> Sample:
    return target.measure(work, session.seconds, session.warm_up)


def _fresh(session: Session, bed: Bed, start: Start, work: Work) -> Sample:
    """Measure a new target on a new, empty image."""
    file = bed.file.with_name(bed.file.name + ".fresh")
    try:
        _qemu_img("create", "-q", "-f", session.image, *_options(session.image), str(file), str(_FRESH))
        target = start(replace(bed, file=file, label="-fresh"))
        try:
            return _of(target, session, work)
        finally:
            target.close()
    finally:
        file.unlink(missing_ok=True)


def is_read_only(image: str) -> bool:
    """Return whether we only read a format; `image` is its name in qemu-img."""
    return not BY_QEMU_NAME[image].blank


@contextlib.contextmanager
def bench_file(path: Path, size: int, image: str = "raw") -> Iterator[None]:
    """Create a stamped disk of about `size` bytes at `path`, and remove it in the end.

    Args:
        path: of the file, which must not exist.
        size: bytes of the disk; rounded up to a multiple of `LENGTH`.
        image: the format of the file, as qemu-img calls it.

    Raises: ConfigError, BenchError.
    """
    if size < SMALLEST:
        raise ConfigError(f"a bench file needs at least {format_size(SMALLEST)}, not {format_size(size)}")
    try:
        file = path.open("xb")
    except FileExistsError:
        raise ConfigError(
            f"{path} exists; name a file that does not: a bench makes its own, and removes it at the end"
        ) from None
    except OSError as error:
        raise ConfigError(f"the bench file {path} cannot be made: {error.strerror}") from None
    try:
        _fill(file, round_up(size, LENGTH))
        if image != "raw":
            _convert(path, image)
        yield
    finally:
        path.unlink()


def _convert(path: Path, image: str) -> None:
    raw = path.with_name(path.name + ".raw")
    path.rename(raw)
    path.touch()  # so that it can be removed, whatever happens
    try:
        _qemu_img("convert", "-S", "0", "-f", "raw", "-O", image, *_options(image), str(raw), str(path))
    finally:
        raw.unlink()


def _options(image: str) -> tuple[str, ...]:
    return ("-o", "force_size=on") if image == "vpc" else ()


def _qemu_img(*arguments: str) -> None:
    try:
        done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BenchError("qemu-img, which makes images, is not installed (Debian: qemu-utils)") from None
    if done.returncode:
        raise BenchError(f"qemu-img {arguments[0]}: {done.stderr.strip()}")


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
