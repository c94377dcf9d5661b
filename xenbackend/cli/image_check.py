"""`xenbackend image check`: whether an image is sound.

Must not import what a check does not need: it is run for each image of a directory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict

from xenbackend.block.formats.table import WRITTEN
from xenbackend.errors import printable
from xenbackend.image import check as checks
from xenbackend.image.check import Verdict
from xenbackend.image.names import Image, find_image


def check(arguments: argparse.Namespace) -> int:
    """Check an image; return a status as `qemu-img check` does. Raises: ConfigError, DriverError."""
    look: Callable[[Image], Verdict] = checks.repair if arguments.repair else checks.check
    verdict = look(find_image(arguments.image, tuple(each.name for each in WRITTEN.values() if each.cluster_size)))
    if arguments.json:
        from xenbackend.cli import output  # late: needed only for --json

        output.print_json({**asdict(verdict), "status": verdict.status}, indent=2)
        return verdict.status
    for sentence in verdict.sentences:
        print(printable(sentence))
    if verdict.repaired:
        print(f"repaired: {verdict.repaired}")
    dirty = "; it is marked as not closed properly" if verdict.is_dirty else ""
    print(f"{printable(verdict.image)}: {verdict.errors} errors, {verdict.leaks} leaks{dirty}")
    return verdict.status
