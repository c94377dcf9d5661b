"""`xenbackend image map`: where the data of a disk are.

Must not find out anything itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from xenbackend.block.extents import Extent, Kind
from xenbackend.errors import printable
from xenbackend.image.extents import changes_of, map_chain
from xenbackend.image.names import find_chain
from xenbackend.image.session import Session


def show_map(arguments: argparse.Namespace) -> int:
    """Print the extents of a disk. Raises: ChainError, ConfigError, DriverError."""
    with Session() as session:
        layers = session.open(find_chain(arguments.image), read_only=True).chain.layers
        extents = map_chain(layers) if arguments.since is None else changes_of(layers, arguments.since)
        if arguments.json:
            _print_map_json(extents)
        else:
            _print_map(extents, [each.text for each in layers if not each.driver.is_filter])
    return 0


def _print_map_json(extents: Iterator[Extent]) -> None:
    """Print one extent a line as it comes, so that a large map needs no memory."""
    before = "["
    for extent in extents:
        print(f"{before}{json.dumps(in_qemus_words(extent))}", end="")
        before = ",\n "
    print("]" if before != "[" else "[]")


def in_qemus_words(extent: Extent) -> dict[str, int | bool]:
    """Return an extent as an entry of `qemu-img map --output=json`."""
    is_data = extent.kind is Kind.DATA
    values: dict[str, int | bool] = {
        "start": extent.start,
        "length": extent.length,
        "depth": extent.depth,
        "present": extent.kind is not Kind.ABSENT,
        "zero": extent.is_zeros,
        "data": is_data,
    }
    return values if extent.place is None else {**values, "offset": extent.place}


def _print_map(extents: Iterator[Extent], layers: list[str]) -> None:
    print(f"{'start':>16}  {'length':>16}  {'what':6}  {'at':>16}  layer")
    for extent in extents:
        place = "" if extent.place is None else str(extent.place)
        where = "" if extent.kind is Kind.ABSENT else printable(layers[extent.depth])
        what = "hole" if extent.is_hole else extent.kind.value
        print(f"{extent.start:>16}  {extent.length:>16}  {what:6}  {place:>16}  {where}".rstrip())
