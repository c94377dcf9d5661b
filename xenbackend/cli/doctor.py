"""`xenbackend doctor [DISK]`: why a disk does not connect, and what to do about it.

Must not look at anything itself, nor change anything. Exit status: 0 all is well; 1 something is wrong; 3 nothing was
found wrong, but not everything could be looked at.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xenbackend import settings_file
from xenbackend.cli.arguments import add_json, add_socket, disk
from xenbackend.cli.output import print_json
from xenbackend.doctor.finding import Verdict, verdict_of

EXIT_STATUS = {Verdict.OK: 0, Verdict.WRONG: 1, Verdict.UNKNOWN: 3}


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="say why a disk does not connect",
        description="Examine Xen, its devices, xenstore, the service, the hotplug script and the disks: which side "
        "has to act next, which program uses their images, whether their servers answer. Each finding is a sentence, "
        "and a command to "
        "run next. Nothing is changed, and it does not wait for anything that hangs. Works without the service, too.",
        epilog="Exit status: 0 all is well; 1 something is wrong; 3 something could not be examined.",
    )
    parser.add_argument("disk", nargs="?", type=disk, metavar="DISK", help="only this disk, such as 5/xvda")
    parser.add_argument("--all", action="store_true", help="also show what is in order")
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"settings in TOML (default: {settings_file.PATH})")
    parser.add_argument(
        "--store", default="", metavar="PATH", help="xenstore's socket or device (default: the service's)"
    )
    add_json(parser)
    add_socket(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine, print, and return the exit status."""
    from xenbackend.cli import doctor_text
    from xenbackend.doctor.examine import Wanted, examine  # late: it speaks to xenstore

    findings = examine(Wanted(args.socket, args.store, args.config, args.disk))
    if args.json:
        print_json({"verdict": verdict_of(findings), "findings": [asdict(each) for each in findings]})
    else:
        is_colored = doctor_text.wants_color(sys.stdout)
        print("\n".join(doctor_text.lines(findings, with_ok=args.all, is_colored=is_colored)))
    return EXIT_STATUS[verdict_of(findings)]
