"""partition: shows a partition of the layer below as a disk.

Synopsis:
    partition:NUMBER

Description:
    Finds the partition in the partition table of the layer below, an MBR (with logical partitions) or a GPT, and shows
    it. NUMBER is Linux's number of the partition: its place in a GPT; in an MBR 1 to 4 for the primary partitions, and
    from 5 on for the logical ones. `xenbackend check` shows where the partition is, and its type.

Behaviour:
    The table is read when the chain is opened, and not again: a change of it takes effect with the next `xenbackend
    set`, `resize` or attach. Requests are passed on as by `offset:`, and none of them reaches the table or another
    partition.

    The checksums of a GPT are verified. If the first header or its array of entries is damaged, the second one, at the
    end of the disk, is used. Damage to either is shown as `trouble`, and nothing is repaired. The chain is refused if
    both are damaged, if there is no table, or if there is no partition of that number; the error lists the numbers that
    there are. A partition that ends beyond the end of the disk is refused, too, though the kernel would cut it.

    A table counts in sectors. If the disk was copied from a medium with sectors of another size, add `sector=512` or
    `sector=4096` to the layer that opens it.

Example:
    partition:1|aio:/srv/images/disk.raw
    log:|partition:5|qcow2:/srv/images/disk.qcow2

Limits:
    MBR and GPT are the only tables that it knows, not those of BSD and Apple. The ranges of partitions are checked,
    but not whether they overlap. It costs as much as `offset:`.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenbackend.block.driver import Env, Geometry
from xenbackend.block.formats import partitions
from xenbackend.block.options import Count, option
from xenbackend.block.window import Window
from xenbackend.units import format_size


class Partition(Window):
    """See the head of this file."""

    name = "partition"

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `partition:`."""

        number: Count = option("number of the partition, as Linux counts", target=True)

        def __post_init__(self) -> None:
            if self.number == 0:
                raise ValueError("partitions are numbered from 1")

    options: Options

    def open(self, env: Env) -> Geometry:
        """Read the table. Raises: DriverError, OSError."""
        below = super().open(env)
        found = partitions.find(self.look, below.size, below.sector_size, self.options.number)
        env.report("partition", f"{found.table}, type {found.kind}, from {format_size(found.start)}")
        if found.trouble:
            env.report("trouble", found.trouble)
        return self.show(found.start, found.length)
