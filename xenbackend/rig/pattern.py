"""Disk contents that identify their place, and a model of a disk's contents after any mix of requests.

Must not send a request: the code that drives a disk asks the model for the next step and reports the result.

A written sector consists of 16 equal units of 32 bytes: (magic, seed, sector, generation). So the bytes alone show
whether a sector is misplaced, stale, torn or from another disk. Generation 0 is a sector of zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from struct import Struct

from xenbackend.blkif.abi import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_RSP_OKAY,
)
from xenbackend.errors import XenbackendError
from xenbackend.units import SECTOR

_UNIT = Struct("<8sQQQ")
_UNITS = SECTOR // _UNIT.size
_MAGIC = b"xbsector"
_ZEROS = bytes(SECTOR)


class WrongData(XenbackendError):
    """A disk returned data that was not written there; the message says what the data are instead."""


def make(seed: int, sector: int, generations: Iterable[int]) -> bytes:
    """Return the bytes of sectors from `sector` on, one per generation."""
    return b"".join(
        _UNIT.pack(_MAGIC, seed, place, generation) * _UNITS if generation else _ZEROS
        for place, generation in enumerate(generations, sector)
    )


def describe(data: bytes, seed: int, sector: int, expected: Iterable[int]) -> str:
    """Return a sentence about one sector's bytes, where one of the generations `expected` should be."""
    wanted = " or ".join(f"generation {generation}" if generation else "zeros" for generation in expected)
    return f"sector {sector} holds {_content(data, seed, sector)} where {wanted} belongs"


def _content(data: bytes, seed: int, sector: int) -> str:
    if data == _ZEROS:
        return "zeros"
    units = [data[place : place + _UNIT.size] for place in range(0, SECTOR, _UNIT.size)]
    if len(set(units)) > 1:
        change = next(place for place, unit in enumerate(units) if unit != units[0]) * _UNIT.size
        before, after = _unit(units[0], seed, sector), _unit(data[change:], seed, sector)
        return f"a torn sector: {before} up to byte {change}, then {after}"
    return _unit(units[0], seed, sector)


def _unit(data: bytes, seed: int, sector: int) -> str:
    magic, its_seed, its_sector, generation = _UNIT.unpack_from(data)
    if magic != _MAGIC:
        return "zeros" if not any(data[: _UNIT.size]) else f"foreign bytes ({data[:16].hex()}…)"
    if its_seed != seed:
        return f"a sector of another disk (seed {its_seed})"
    return f"generation {generation}" if its_sector == sector else f"generation {generation} of sector {its_sector}"


@dataclass(slots=True, eq=False)
class Step:
    """One request that a model asks for: `count` sectors from `sector` on, and the data of a write."""

    operation: int  # BLKIF_OP_READ, _WRITE, _FLUSH_DISKCACHE or _DISCARD
    sector: int = 0
    count: int = 0
    data: bytes = b""
    generation: int = 0


@dataclass
class DiskModel:
    """The possible contents of the first `sectors` sectors of a disk: for each sector, the generations it may have.

    Normally that is one. After a discard, the old ones and zeros are possible; after a failed write, the old ones and
    the new one. Requests in flight never overlap if one of them writes, since they may be carried out in any order.
    """

    seed: int
    sectors: int
    random: Random
    operations: tuple[int, ...] = (BLKIF_OP_READ, BLKIF_OP_WRITE)  # one is chosen at random; repeat one to favour it
    max_count: int = 88  # sectors per request; 11 whole pages
    alignment: int = 1  # sectors; of every request's start and length
    first: int = 0  # the generation that all sectors have at first
    failures: int = 0  # steps that ended with an error
    verified: int = 0  # sectors that were compared and are correct
    _possible: list[tuple[int, ...]] = field(init=False)
    _writing: bytearray = field(init=False)  # per sector: a write or discard is in flight
    _reading: list[int] = field(init=False)  # per sector: reads in flight
    _generation: int = field(init=False)

    def __post_init__(self) -> None:
        self._generation = self.first
        self._possible = [(self.first,)] * self.sectors
        self._writing = bytearray(self.sectors)
        self._reading = [0] * self.sectors

    def next_step(self) -> Step | None:
        """Return a random step that does not conflict with one in flight, or None if a few tries found none."""
        operation = self.random.choice(self.operations)
        if operation == BLKIF_OP_FLUSH_DISKCACHE:
            return Step(operation)
        for _ in range(8):
            sector = self.random.randrange(0, self.sectors, self.alignment)
            largest = min(self.max_count, self.sectors - sector) // self.alignment
            count = self.random.randint(1, largest) * self.alignment if largest else 0
            if count and self._is_free(operation, sector, count):
                return self.step(operation, sector, count)
        return None

    def step(self, operation: int, sector: int, count: int) -> Step:
        """Return the given step and count it as in flight. The caller has to avoid overlaps."""
        step = Step(operation, sector, count)
        end = sector + count
        if operation == BLKIF_OP_READ:
            self._reading[sector:end] = [readers + 1 for readers in self._reading[sector:end]]
            return step
        self._writing[sector:end] = b"\1" * count
        if operation == BLKIF_OP_WRITE:
            self._generation += 1
            step.generation = self._generation
            step.data = make(self.seed, sector, [step.generation] * count)
        return step

    def finish(self, step: Step, status: int, data: bytes = b"") -> None:
        """Note the result of a step: its status (BLKIF_RSP_*), and the data of a read. Raises: WrongData."""
        end = step.sector + step.count
        if status != BLKIF_RSP_OKAY:
            self.failures += 1
        if step.operation == BLKIF_OP_READ:
            self._reading[step.sector : end] = [readers - 1 for readers in self._reading[step.sector : end]]
            if status == BLKIF_RSP_OKAY:
                self.check(step.sector, data)
            return
        self._writing[step.sector : end] = bytes(step.count)
        if step.operation == BLKIF_OP_WRITE and status == BLKIF_RSP_OKAY:
            self._possible[step.sector : end] = [(step.generation,)] * step.count
        elif step.count:
            # A discard leaves zeros or the old contents; a failed write may have been carried out in part.
            new = 0 if step.operation == BLKIF_OP_DISCARD else step.generation
            self._possible[step.sector : end] = [
                old if new in old else (*old, new) for old in self._possible[step.sector : end]
            ]

    def check(self, sector: int, data: bytes) -> None:
        """Compare bytes read from `sector` on with the possible contents. Raises: WrongData."""
        possible = self._possible[sector : sector + len(data) // SECTOR]
        self._compare(sector, data, possible)
        self.verified += len(possible)

    def _compare(self, sector: int, data: bytes, possible: list[tuple[int, ...]]) -> None:
        if data == make(self.seed, sector, [generations[0] for generations in possible]):
            return
        for place, generations in enumerate(possible):
            found = data[place * SECTOR : (place + 1) * SECTOR]
            if not any(found == make(self.seed, sector + place, [generation]) for generation in generations):
                raise WrongData(describe(found, self.seed, sector + place, generations))

    def _is_free(self, operation: int, sector: int, count: int) -> bool:
        end = sector + count
        return not any(self._writing[sector:end]) and (operation == BLKIF_OP_READ or not any(self._reading[sector:end]))
