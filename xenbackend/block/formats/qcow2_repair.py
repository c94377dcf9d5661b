"""Plans the writes that repair the refcounts of a QCOW2 image after a `Check`.

Must not touch anything that the guest's data depend on: an image with broken tables is refused.

The order makes it safe to stop after any write: refcounts are right before a flag or the header relies on them.
"""

from __future__ import annotations

from array import array

from xenbackend.block.formats.common import Write
from xenbackend.block.formats.qcow2 import CORRUPT, DIRTY, incompatible_bytes
from xenbackend.block.formats.qcow2_check import Check
from xenbackend.block.formats.qcow2_tables import COPIED, pack_refcounts, pack_table
from xenbackend.errors import DriverError
from xenbackend.units import SECTOR, round_up


def plan_repair(check: Check) -> list[list[Write]]:
    """Return the writes that repair an image: lists, each to be made durable before the next one is begun.

    Args:
        check: was run; it cannot be used again afterwards.

    Raises: DriverError if more than refcounts and flags is wrong.
    """
    report = check.report
    if report.broken:
        problem = (
            "more than its refcounts are damaged; restore it, or copy it and try qemu-img check -r all on the copy"
        )
        raise DriverError(problem)
    new_blocks = _place_missing_blocks(check)
    _check_refcounts_fit(check)
    plan = [
        [(offset, _block(check, index)) for index, offset in enumerate(check.blocks) if offset],
        [_table_sector(check, index) for index in new_blocks],
        _flags(check),
        [incompatible_bytes(check.header.incompatible & ~(DIRTY | CORRUPT))]
        if report.is_dirty or report.is_corrupt
        else [],
    ]
    return [writes for writes in plan if writes]


def _place_missing_blocks(check: Check) -> list[int]:
    """Put refcount blocks that are missing after the end of the file; return their indices."""
    header, counts, blocks = check.header, check.counts, check.blocks
    end = round_up(check.file_size, header.cluster_size) >> header.cluster_bits
    added: list[int] = []
    shift = header.block_bits - counts.page_bits
    while missing := {number >> shift for number, page in counts.pages.items() if any(page)} - _present(blocks):
        for index in sorted(missing):
            if index >= len(blocks):
                raise DriverError("its refcount table is too small for the file; qemu-img check -r all makes a new one")
            blocks[index] = end << header.cluster_bits
            counts.add(end, 1)
            added.append(index)
            end += 1
    return added


def _present(blocks: list[int]) -> set[int]:
    return {index for index, offset in enumerate(blocks) if offset}


def _check_refcounts_fit(check: Check) -> None:
    most = max(map(max, check.counts.pages.values()))
    if most > check.header.max_refcount:
        raise DriverError(
            f"a cluster is used {most} times, but its refcounts only go up to {check.header.max_refcount}"
        )


def _block(check: Check, index: int) -> bytes:
    counts, header = check.counts, check.header
    per_block = 1 << header.block_bits - counts.page_bits
    empty = counts.empty()
    pages = (counts.pages.get(number, empty) for number in range(index * per_block, (index + 1) * per_block))
    return b"".join(pack_refcounts(page, header.refcount_order) for page in pages)


def _table_sector(check: Check, index: int) -> Write:
    return _sector(check.header.refcount_table.offset, array("Q", check.blocks), index)


def _flags(check: Check) -> list[Write]:
    """Return the sectors of L1 and L2 tables that change when all flags are made right."""
    changed: dict[int, tuple[array[int], int, int]] = {}
    for offset, table, index in check.wrong_flags():
        table[index] ^= COPIED
        changed[offset + index * 8 // SECTOR * SECTOR] = table, offset, index
    return [_sector(offset, table, index) for table, offset, index in changed.values()]


def _sector(table_offset: int, table: array[int], index: int) -> Write:
    first = index // (SECTOR // 8) * (SECTOR // 8)
    return table_offset + first * 8, pack_table(table[first : first + SECTOR // 8])
