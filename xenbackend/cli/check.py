"""`xenbackend check CHAIN`: open a chain as a worker would, explain it layer by layer, close it.

Must not know anything about a chain but what its drivers say.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

from xenbackend.block.chain import Chain, open_chain, parse_chain
from xenbackend.block.order import remarks, words_of
from xenbackend.block.spec import ChainSpec, check_whole_paths
from xenbackend.cli import output
from xenbackend.cli.arguments import add_json
from xenbackend.errors import ChainError, ConfigError, printable
from xenbackend.protocol.messages import LayerFacts
from xenbackend.units import format_size
from xenbackend.xl import disk, words
from xenbackend.xl.config import quote
from xenbackend.xl.host import running_xen

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_HELP = "open a chain and explain it layer by layer"
_DESCRIPTION = (
    "Open a chain as a worker would, explain it layer by layer, and close it. Nothing is changed. Files that a worker "
    "would create are named, and it is tried whether they could be created."
)


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("check", help=_HELP, description=_DESCRIPTION)
    parser.add_argument(
        "chain", metavar="CHAIN", help="the layers, the one next to the guest first, such as log:|aio:/img"
    )
    parser.add_argument(
        "--disk", action="store_true", help="CHAIN is a whole disk line, of a guest's configuration or blktap2"
    )
    parser.add_argument("--read-only", action="store_true", help="open it as a read-only disk")
    add_json(parser)
    parser.set_defaults(run=check)


def check(arguments: argparse.Namespace) -> int:
    """Open, explain and close the chain. Raises: ChainError, ConfigError, DriverError."""
    meant = disk.read(arguments.chain, running_xen()) if arguments.disk else None
    spec = parse_chain(meant.chain) if meant else _parse(arguments.chain)
    check_whole_paths(spec)
    facts, missing = open_once(spec, read_only=arguments.read_only or bool(meant and meant.is_read_only))
    notes = remarks(words_of(spec.layers))
    if arguments.json:
        layers = [output.layer_values(asdict(each)) for each in facts]
        line = {"vdev": meant.vdev, "line": meant.line} if meant else {}
        output.print_json({"chain": spec.text, "layers": layers, "notes": notes, "creates": missing, **line}, indent=2)
    else:
        _print_table(spec.text, facts)
        for path in missing:
            print(f"creates: {printable(path)}, when the disk is attached")
        for note in notes:
            print(f"note: {note}")
        if meant:
            print(f"for the guest's configuration: disk = [{quote(printable(meant.line))}]")
    return 0


def _parse(text: str) -> ChainSpec:
    """Parse a chain; say which part belongs to a disk line, if one does. Raises: ChainError, ConfigError."""
    try:
        return parse_chain(text)
    except ChainError:
        if not (behind := words.misplaced(text)):
            raise
        whole = f"xenbackend check --disk {shlex.quote(printable(text))}"
        raise ConfigError(
            f"{behind!r} is not part of the chain, but belongs into the guest's configuration; for the whole line: "
            f"{whole}"
        ) from None


def open_once(spec: ChainSpec, *, read_only: bool) -> tuple[list[LayerFacts], list[str]]:
    """Open a chain as a worker would, and close it, without changing anything.

    Returns: what each layer reported, and the files that a worker would create. Raises: DriverError.
    """
    from xenbackend.loop.reactor import Reactor
    from xenbackend.opener.local import LocalOpener
    from xenbackend.worker.env import EnvFactory
    from xenbackend.worker.files import HostFiles

    reactor = Reactor()
    opener = LocalOpener()
    files = HostFiles(reactor, opener, changes=False)
    try:
        chain = open_chain(spec, EnvFactory(reactor, files, is_check=True), read_only=read_only)
        try:
            return layer_facts(chain), opener.missing
        finally:
            chain.close()
    finally:
        files.close()
        opener.close()
        reactor.close()


def layer_facts(chain: Chain) -> list[LayerFacts]:
    """Return what each layer reported, top first."""
    return [
        LayerFacts(text=each.text, parent_of=each.parent_of, facts=dict(each.driver.env.facts), **asdict(each.geometry))
        for each in chain.layers
    ]


def _print_table(text: str, layers: list[LayerFacts]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(text)), title_justify="left")
    for heading in ("#", "layer", "size", "sector", "abilities", "says"):
        table.add_column(heading, overflow="fold")
    for index, layer in enumerate(layers):
        name = printable(layer.text) + (f"\nparent of {printable(layer.parent_of)}" if layer.parent_of else "")
        says = "\n".join(printable(f"{key}: {value}") for key, value in layer.facts.items())
        cells = (str(index), name, format_size(layer.size), _sectors(layer), _abilities(layer), says)
        table.add_row(*map(Text, cells))
    Console().print(table)


def _sectors(layer: LayerFacts) -> str:
    """Return logical and physical sector size, as fdisk shows them."""
    is_larger = layer.physical_sector_size > layer.sector_size
    return f"{layer.sector_size} / {layer.physical_sector_size}" if is_larger else str(layer.sector_size)


def _abilities(layer: LayerFacts) -> str:
    discard = f"discard ({format_size(layer.discard_granularity)})" if layer.can_discard else ""
    words = ["read", "" if layer.read_only else "write", "flush" if layer.can_flush else "", discard]
    return ", ".join(filter(None, words))
