"""`python3 -m tests.ci small|full`: runs the steps of CI, or every suite in full, and prints what each took.

Must not need more than Python's standard library: `.ci/run` starts it on a machine where nothing is installed yet.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from tests.ci import blame, full, small
from tests.ci.runner import Interrupted, Runner
from tests.interruption import INTERRUPTED


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments say, and return the exit status."""
    parser = argparse.ArgumentParser(prog="tests.ci", description="Run the steps of CI, or every suite in full.")
    commands = parser.add_subparsers(required=True, metavar="small|full")
    command = commands.add_parser("small", help="what decides whether a change lands, up to the first failure")
    command.set_defaults(run=lambda runner, commit, args: small.run(runner, commit, blame.on_parent))
    command = commands.add_parser("full", help="every suite at length; what has passed with this code is not run again")
    command.add_argument("--anew", action="store_true", help="run everything again")
    command.set_defaults(run=lambda runner, commit, args: full.run(runner, commit, anew=args.anew))
    args = parser.parse_args(arguments)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    try:
        return int(args.run(Runner(), commit, args))
    except Interrupted:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
