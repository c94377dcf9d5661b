"""`xenbackend xl ...`: xl itself, with disk lines that it understands.

Must not stay in between: in the end xl runs, with our process, terminal and exit status.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from functools import partial
from typing import Any, NoReturn

from xenbackend.xl.command import translate
from xenbackend.xl.host import find_xl, parse_version, running_xen

_DESCRIPTION = """\
Run xl with these arguments. Disk lines that begin with tap2: (create, config-update, block-attach; save, restore,
migrate where they are given a file) reach it in the form it understands; files stay as they are. A line that begins
with tap: does so only where xl would refuse it: what blkback or QEMU serve today, they go on serving. Write tap2: for
ours. What a line becomes is printed by: xenbackend convert FILE"""


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "xl",
        help="xl, with disk lines such as tap2:log:|aio:/img",
        usage="xenbackend xl [--xen-version VERSION] ARGUMENTS OF XL ...",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prefix_chars="\0",  # every option is xl's
        add_help=False,
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=partial(run, parser))


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Become xl. Raises: ChainError, ConfigError, before xl is started; XenbackendError, if there is no xl."""
    words: list[str] = arguments.words
    if words[:1] in (["-h"], ["--help"]):  # xl has neither
        parser.print_help()
        return 0
    return _become(words)


def _become(words: list[str]) -> NoReturn:
    """Check and translate the words, then become xl."""
    xen = running_xen()
    if words[:1] == ["--xen-version"] and len(words) > 1:
        xen, words = parse_version(words[1]), words[2:]
    file = find_xl(os.environ.get("PATH", ""), xen)
    words = translate(words, xen, _as_file)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and xl would inherit that
        signal.signal(number, signal.SIG_DFL)
    sys.stderr.flush()
    os.execv(file, ["xl", *words])  # noqa: S606 - no shell: these are the operator's words as given


def _as_file(text: str) -> str:
    """Return the path of a file with a text, which goes when xl ends: nobody has to remove it."""
    memory = os.memfd_create("config", 0)  # 0: the descriptor stays open in xl
    with os.fdopen(memory, "wb", closefd=False) as file:
        file.write(os.fsencode(text))
    return f"/proc/self/fd/{memory}"
