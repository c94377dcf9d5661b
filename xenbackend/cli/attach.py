"""`xenbackend attach` and `xenbackend detach`: a disk for a running guest without xl.

Must not know a key of xenstore.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from xenbackend.block.spec import check_whole_paths, parse_chain
from xenbackend.cli.arguments import duration
from xenbackend.protocol.client import DEFAULT_SOCKET
from xenbackend.supervisor.xenstore.store import Store
from xenbackend.supervisor.xenstore.toolstack import (
    DETACH_TIMEOUT_S,
    OPEN_TIMEOUT_S,
    Attachment,
    attach,
    detach,
    vbd_path,
    wait_until_connected,
    wait_until_there,
)


def register(subparsers: Any) -> None:
    """Add both commands."""
    parser = subparsers.add_parser(
        "attach",
        help="give a running guest a disk made of a chain",
        description="Give a running guest a disk, and return when its chain is open. The disk is gone after the "
        "guest's reboot, save or migration: it is not in the guest's configuration. A disk for the domain that this "
        "command runs in, such as 0, is there as soon as its name is printed: /dev/xvdq.",
    )
    _add_place(parser)
    parser.add_argument("chain", metavar="CHAIN", help="the disk, such as log:|aio:/img/disk.raw")
    parser.add_argument("--read-only", action="store_true", help="the guest may not write")
    parser.add_argument("--wait", action="store_true", help="return only when the guest is connected")
    parser.add_argument("--socket", default=DEFAULT_SOCKET, metavar="PATH", help="the service's socket (%(default)s)")
    parser.add_argument(
        "--timeout", type=duration, default=OPEN_TIMEOUT_S, metavar="SECONDS", help="wait so long (%(default)s)"
    )
    parser.set_defaults(run=run_attach)
    parser = subparsers.add_parser(
        "detach",
        help="take such a disk away again",
        description="Take a disk away from a guest, once the guest has let go of it.",
    )
    _add_place(parser)
    parser.add_argument("--force", action="store_true", help="even while the guest uses it")
    parser.add_argument(
        "--timeout", type=duration, default=DETACH_TIMEOUT_S, metavar="SECONDS", help="wait so long (%(default)s)"
    )
    parser.set_defaults(run=run_detach)


def run_attach(args: argparse.Namespace) -> int:
    """Attach, and print which vbd it became, or which device of our own domain."""
    check_whole_paths(parse_chain(args.chain))
    with Store(args.store) as store:
        path = vbd_path(store, args.domid, args.vdev)
        attach(store, Attachment(path, args.chain, read_only=args.read_only), args.socket, args.timeout)
        is_ours = path.frontend_domid == path.backend_domid
        if args.wait or is_ours:
            wait_until_connected(store, path, args.timeout)
    device = Path("/dev", args.vdev.removeprefix("/dev/"))
    if is_ours:
        wait_until_there(device, args.timeout)
    print(device if is_ours else f"attached {path}")
    return 0


def run_detach(args: argparse.Namespace) -> int:
    """Detach."""
    with Store(args.store) as store:
        path = vbd_path(store, args.domid, args.vdev)
        detach(store, path, args.timeout, force=args.force)
    print(f"detached {path}")
    return 0


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("domid", type=int, metavar="DOMID", help="the guest's domain number")
    parser.add_argument("vdev", metavar="VDEV", help="the device in the guest, such as xvdb")
    parser.add_argument("--store", metavar="PATH", help="xenstore's socket or device")
