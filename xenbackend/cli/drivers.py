"""`xenbackend drivers [NAME]`: list the words that a chain may use, or print a driver's manual.

Must not describe a driver: its module's docstring does.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from xenbackend.block.drivers import UNBUILT, driver_names, find_driver, manual, summary
from xenbackend.block.options import describe_options
from xenbackend.cli import output
from xenbackend.cli.arguments import add_json
from xenbackend.cli.columns import print_manual
from xenbackend.errors import ConfigError

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "drivers",
        help="list the drivers, or print the manual of one",
        description="List the drivers that a chain may use, or print the manual of one: what it does, its options, an "
        "example, its limits.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="the driver whose manual to print")
    add_json(parser, "print the list, with all options, as JSON; docs/json.md has its keys")
    parser.set_defaults(run=drivers)


def drivers(arguments: argparse.Namespace) -> int:
    """Print the list or a manual. Raises: ConfigError, for a driver that does not exist or cannot be loaded."""
    if arguments.name:
        try:
            driver = find_driver(arguments.name)
        except LookupError as error:
            raise ConfigError(str(error)) from error
        if not arguments.json:
            print_manual(manual(driver))
            return 0
    rows = [_describe(name) for name in ([arguments.name] if arguments.name else driver_names())]
    if arguments.json:
        output.print_json({"drivers": rows}, indent=2)
    else:
        _print_table(rows)
    return 0


def _describe(name: str) -> dict[str, Any]:
    """Return one row of the list; for a driver that cannot be loaded, the reason."""
    try:
        driver = find_driver(name)
    except LookupError as error:
        return {"name": name, "kind": "unusable", "summary": str(error), "options": []}
    return {
        "name": name,
        "kind": "filter" if driver.is_filter else "source",
        "summary": summary(driver).removeprefix(f"{name}: "),
        "options": [asdict(each) for each in describe_options(driver.Options)],
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("driver", "kind", "what it is", caption_justify="left")
    for row in rows:
        table.add_row(*(Text(row[key]) for key in ("name", "kind", "summary")))
    unbuilt = sorted(set(UNBUILT) - {row["name"] for row in rows})
    table.caption = Text(f"known names without a driver in this version: {', '.join(unbuilt)}")
    Console().print(table)
