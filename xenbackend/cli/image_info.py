"""`xenbackend image info`: what an image is, its parents, and why it cannot be served, if so.

Must not find out anything itself, nor import what looking at an image does not need: it is run for each image of a
directory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict

from xenbackend.block.spec import parse_chain
from xenbackend.errors import DriverError, printable
from xenbackend.image import looks
from xenbackend.image.facts import ChainFacts, Facts, chain_facts, file_facts
from xenbackend.image.names import has_driver
from xenbackend.units import format_size


def info(arguments: argparse.Namespace) -> int:
    """Print what is known of an image, then why it cannot be served, if so. Raises: ChainError, DriverError."""
    look = None if has_driver(arguments.image) else looks.look_at(arguments.image)
    if look is None:
        facts = chain_facts(parse_chain(arguments.image))
    elif look.driver:
        facts = chain_facts(parse_chain(looks.layer_of(look, arguments.image)))
    else:
        facts = file_facts(arguments.image, look)
    if arguments.json:
        from xenbackend.cli import output  # late: needed only for --json
        from xenbackend.protocol.codes import Code

        error = output.error_object(Code.INVALID, facts.problem) if facts.problem else {}
        output.print_json({**asdict(facts), "probed": look.name if look else None, **error}, indent=2)
        arguments.json = False  # the error is printed already
    else:
        if look and look.driver:
            _print_look(look, arguments.image, facts.chain)
        _print_facts(facts)
    if facts.problem:
        raise DriverError(facts.problem)
    return 0


def _print_look(look: looks.Look, path: str, layer: str) -> None:
    note = f" ({look.advice})" if look.advice else ""
    print(f"{printable(path)} looks like {look.name}; as a layer it is {printable(layer)}{note}")


def _print_facts(facts: ChainFacts) -> None:
    if facts.in_use:
        print(f"in use{f' by {printable(facts.used_by)}' if facts.used_by else ''}: this may be out of date")
    for layer in facts.layers:
        print(printable(layer.layer or layer.file))
        for key, value in _lines(layer):
            print(f"  {key + ':':14}{printable(value)}")


def _lines(layer: Facts) -> Iterator[tuple[str, str]]:
    if layer.format:
        yield "format", layer.format
    if layer.virtual_size:
        yield "disk", f"{format_size(layer.virtual_size)} ({layer.virtual_size} bytes)"
    if layer.file_size:
        yield "file", f"{format_size(layer.file_size)}, of which {format_size(layer.allocated)} are allocated"
    if layer.cluster_size:
        yield "clusters", format_size(layer.cluster_size)
    if layer.parent:
        yield "parent", f"{layer.parent} (allowed by {layer.parent_by})" if layer.parent_by else layer.parent
    if layer.parent_names:
        yield "parent", f"called {' or '.join(map(repr, layer.parent_names))} by the image"
    if layer.is_dirty:
        yield "dirty", "yes: its refcounts may be out of date; image check --repair fixes them"
    if layer.is_corrupt:
        yield "corrupt", "yes: it is marked so; image check says what is wrong"
    yield from layer.more.items()
