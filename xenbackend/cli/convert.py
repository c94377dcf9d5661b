"""`xenbackend convert FILE`: a guest's configuration with its disk lines in the form that xl understands.

Must not change any byte outside of those lines.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from xenbackend.cli import output
from xenbackend.cli.arguments import add_json
from xenbackend.errors import ConfigError
from xenbackend.xl.host import parse_version, running_xen
from xenbackend.xl.rewrite import convert


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "convert",
        help="write a guest's tap2: disk lines so that plain xl understands them",
        description="Print a guest's configuration with disk lines such as tap2:log:|aio:/img,xvda,w in the form that "
        "plain xl understands; everything else stays as it is, to the byte. A tap: line is only rewritten where xl "
        "would refuse it.",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="such as /etc/xen/vm.cfg")
    parser.add_argument("-i", "--in-place", action="store_true", help="rewrite the files; mode and owner stay")
    parser.add_argument(
        "--xen-version", metavar="VERSION", help="for this version of Xen, such as 4.19 (default: the running one)"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert all files, or none. Raises: ChainError, ConfigError, with file and line."""
    xen = running_xen() if arguments.xen_version is None else parse_version(arguments.xen_version)
    converted = [(file, *convert(_read(file), str(file), xen)) for file in arguments.files]
    for file, text, count in converted:
        if arguments.in_place and count:
            _replace(file, os.fsencode(text))
        if arguments.json:
            continue
        if arguments.in_place:
            print(f"{file}: {f'rewritten disk lines: {count}' if count else 'unchanged'}")
        else:
            sys.stdout.flush()
            sys.stdout.buffer.write(os.fsencode(text))
    if arguments.json:
        output.print_json({"files": [_values(arguments, *each) for each in converted]})
    return 0


def _read(file: Path) -> str:
    try:
        return os.fsdecode(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None


def _values(arguments: argparse.Namespace, file: Path, text: str, count: int) -> dict[str, Any]:
    return {"file": str(file), "rewritten": count} | ({} if arguments.in_place else {"text": text})


def _replace(file: Path, content: bytes) -> None:
    """Replace a file atomically, for others that read it meanwhile; a link to it stays a link."""
    file = file.resolve()
    before = file.stat()
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as new:
        try:
            new.write(content)
            new.flush()
            os.fchown(new.fileno(), before.st_uid, before.st_gid)
            shutil.copymode(file, new.name)
            os.fsync(new.fileno())
            Path(new.name).replace(file)
        except BaseException:
            Path(new.name).unlink()
            raise
