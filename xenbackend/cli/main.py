"""The command line: finds the command, calls it, and turns what went wrong into one sentence and an exit status.

Must not contain logic that a test would want to call. Exit status: 0 done; 1 it failed; 2 the operator's mistake, with
nothing touched; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from xenbackend import __version__
from xenbackend.errors import ConfigError, DriverError, XenbackendError

MODULES = {  # of the commands, in the order of the help
    "run": "run", "status": "status", "attach": "attach", "detach": "attach", "check": "check",
    "drivers": "drivers", "log": "log", "demo": "demo", "bench": "bench",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _fail(problem: XenbackendError, status: int) -> int:
    print(f"xenbackend: {problem}", file=sys.stderr)
    return status
