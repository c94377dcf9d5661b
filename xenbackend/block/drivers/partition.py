"""partition: shows a partition of the layer below as a disk.

Synopsis:
    partition:NUMBER

Description:
    Finds the partition in the table of the layer below, MBR with its logical partitions or GPT, and shows it. NUMBER
    is the one that Linux gives it: that of its place in a GPT, 1 to 4 for the primary partitions of an MBR, from 5 on
    for the logical ones. `xenbackend check` shows where the partition lies, and its type.

Behaviour:
    The table is read when the chain is opened, and not again: a table that is written to meanwhile takes effect with
    the next `xenbackend set`, `resize` or attach. Requests then go through as with `offset:`, and none of them reaches
    the table or another partition.

    Checksums of a GPT are checked. Where the first header, or its array of entries, is damaged, the second one at the
    end of the disk is used. What is wrong with either is shown as `trouble`, and nothing is repaired. With both
    damaged, without a table, or for a number that there is not, the chain is refused, with the numbers that there are.
    A partition that ends behind the disk is refused, too, where the kernel would cut it.

    A table counts in sectors: where a disk was copied from a medium with other sectors, add `sector=512` or
    `sector=4096` to the layer that has it.

Example:
    partition:1|aio:/srv/images/disk.raw
    log:|partition:5|qcow2:/srv/images/disk.qcow2

Limits:
    Only MBR and GPT are known, no table of BSD or of Apple. Ranges and numbers of partitions are checked, their overlap
    is not. It costs as much as `offset:`.
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

        number: Count = option("which partition, as Linux counts", target=True)

        def __post_init__(self) -> None:
            if self.number == 0:
                raise ValueError("partitions are counted from 1 on")

    options: Options

    def open(self, env: Env) -> Geometry:
        """Read the table. Raises: DriverError, OSError."""
        below = super().open(env)
        found = partitions.find(self.look, below.size, below.sector_size, self.options.number)
        env.report("partition", f"{found.table}, type {found.kind}, from {format_size(found.start)}")
        if found.trouble:
            env.report("trouble", found.trouble)
        return self.show(found.start, found.length)
