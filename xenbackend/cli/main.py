"""The command line: finds the command, calls it, and turns what went wrong into one sentence and an exit status.

Must not contain logic that a test would want to call. Exit status: 0 done; 1 it failed; 2 the operator's mistake, with
nothing touched; 3 of `bench`: nothing can be concluded (`image check` and `compare` have their own); 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from xenbackend import __version__
from xenbackend.errors import ChainError, ConfigError, DriverError, XenbackendError, printable

MODULES = {  # of the commands, in the order of the help
    "run": "run", "status": "status", "attach": "attach", "detach": "attach", "check": "check",
    "pause": "disk", "resume": "disk", "set": "disk", "resize": "disk", "snapshot": "disk",
    "policy": "disk", "upgrade": "upgrade",
    "stop": "upgrade", "drivers": "drivers", "log": "log", "demo": "demo", "bench": "bench",
    "install": "install", "uninstall": "install", "xl": "xl", "convert": "convert", "image": "image",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be anything, a terminal's alphabet small
    parser = argparse.ArgumentParser(
        prog="xenbackend",
        description="Disks for Xen guests, made of chains of block drivers: log:|aio:/img",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    words = list(sys.argv[1:] if arguments is None else arguments)
    # A command that is named needs no other one: importing them all takes half a second.
    wanted = {MODULES[words[0]]} if words and words[0] in MODULES else dict.fromkeys(MODULES.values())
    for module in wanted:
        importlib.import_module(f"xenbackend.cli.{module}").register(commands)
    given = parser.parse_args(words)
    try:
        status: int = given.run(given)
        sys.stdout.flush()
    except (ConfigError, DriverError) as problem:
        return _fail(problem, 2)
    except XenbackendError as problem:
        return _fail(problem, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        _flush_or_forget()
        return 0
    except OSError as problem:  # whatever else the host refuses: a full disk below our output, a file to write
        _flush_or_forget()
        where = f"{problem.filename}: " if problem.filename else ""
        return _fail(XenbackendError(f"{where}{problem.strerror or problem}"), 1)
    return status


def _flush_or_forget() -> None:
    """Write what is left of our output; what cannot be written now must not be tried again at the very end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(problem: XenbackendError, status: int) -> int:
    text = str(problem) if isinstance(problem, ChainError) else printable(str(problem))
    print(f"xenbackend: {text}", file=sys.stderr)
    return status
