"""`xenbackend image info` and `image map`: what an image is, and where its data are.

Must not find out anything itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict

from xenbackend.block.extents import Extent, Kind
from xenbackend.block.spec import parse_chain
from xenbackend.errors import printable
from xenbackend.image.extents import map_chain
from xenbackend.image.facts import ChainFacts, Facts, chain_facts
from xenbackend.image.names import find_image, has_driver, layer_of_file, probe
from xenbackend.image.session import Session
from xenbackend.units import format_size


def info(arguments: argparse.Namespace) -> int:
    """Say what an image is. Raises: ChainError, DriverError."""
    probed = "" if has_driver(arguments.image) else probe(arguments.image)
    spec = parse_chain(layer_of_file(probed, arguments.image) if probed else arguments.image)
    facts = chain_facts(spec)
    if arguments.json:
        print(json.dumps({**asdict(facts), "probed": probed or None}, indent=2))
        return 0
    if probed:
        print(f"{printable(arguments.image)} looks like {probed}; as a layer it is {printable(spec.text)}")
    _print_facts(facts)
    return 0


def show_map(arguments: argparse.Namespace) -> int:
    """Print the extents of a disk. Raises: ChainError, ConfigError, DriverError."""
    if not has_driver(arguments.image):
        find_image(arguments.image)  # it says what to write
    spec = parse_chain(arguments.image)
    with Session() as session:
        layers = session.open(spec, read_only=True).chain.layers
        extents = map_chain(layers)
        if arguments.json:
            _print_map_json(extents)
        else:
            _print_map(extents, [each.text for each in layers if not each.driver.is_filter])
    return 0


def _print_facts(facts: ChainFacts) -> None:
    if facts.in_use:
        print("somebody writes to it: this may be old already")
    for layer in facts.layers:
        print(printable(layer.layer))
        for key, value in _lines(layer):
            print(f"  {key + ':':14}{printable(value)}")


def _lines(layer: Facts) -> Iterator[tuple[str, str]]:
    yield "format", layer.format
    yield "disk", f"{format_size(layer.virtual_size)} ({layer.virtual_size} bytes)"
    if layer.file_size:
        yield "file", f"{format_size(layer.file_size)}, of which {format_size(layer.allocated)} are allocated"
    if layer.cluster_size:
        yield "clusters", format_size(layer.cluster_size)
    if layer.parent:
        yield "parent", layer.parent
    if layer.is_dirty:
        yield "dirty", "yes: its refcounts may be out of date; image check --repair mends them"
    if layer.is_corrupt:
        yield "corrupt", "yes: it says so itself; image check says what is wrong"
    yield from layer.more.items()


def _print_map_json(extents: Iterator[Extent]) -> None:
    """Print one extent a line, so that a large map needs no memory."""
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
