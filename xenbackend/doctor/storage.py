"""Looks at the storage of a chain: whether its files exist, who uses them, and whether servers and clusters answer.

Must not take a lock or a claim, write, or send anything to a server: a connection is made and closed again.

NBD servers and monitors of Ceph forget a connection on which nothing was sent; `qemu-nbd` ends with its last client
only if that has negotiated (qemu-nbd.c, `nbd_client_closed`).
"""

from __future__ import annotations

import os
import shlex
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from xenbackend.block.keys import key_files_of
from xenbackend.block.options import files_of
from xenbackend.block.servers import Account, Endpoint, account_of, servers_of
from xenbackend.block.spec import LayerSpec, only_read_from, parse_chain
from xenbackend.doctor.finding import Finding, ok, unknown, wrong
from xenbackend.doctor.probes import Probe, Result
from xenbackend.errors import ChainError, DriverError, printable
from xenbackend.kernel import locks
from xenbackend.kernel.users import users_of
from xenbackend.opener.cluster import read_settings

CONNECT_S = 2.0
_LOOK = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_LISTENS = 0x10000  # __SO_ACCEPTCON, linux/net.h
_MONITOR_PORTS = (3300, 6789)  # of Ceph: msgr2, msgr1


def probes(disk: str, chain: str, *, read_only: bool) -> Iterator[Probe]:
    """Yield a look for each file and each server that a chain names; the worker of `disk` itself may use them."""
    try:
        spec = parse_chain(chain)
    except ChainError as error:
        finding = wrong(
            "chain", printable(error.problem), f"xenbackend check {shlex.quote(printable(chain))}", disk=disk
        )
        yield Probe("chain", "the chain", partial(Result, [finding]), disk)
        return
    reading = only_read_from([each.driver for each in spec.layers])
    for place, layer in enumerate(spec.layers):
        is_bottom = place == len(spec.layers) - 1
        access = locks.access(read_only=read_only or place >= reading, shareable=False) if is_bottom else None
        for name, check, look in _looks(layer, access, disk):
            yield Probe(check, printable(name), partial(_about, look, disk), disk)


def _looks(
    layer: LayerSpec, access: locks.Access | None, owner: str
) -> Iterator[tuple[str, str, Callable[[], Finding]]]:
    options = layer.options
    makes = bool(getattr(layer.driver, "keeps_writes", False)) or layer.driver.name == "log"  # creates its own file
    for file in files_of(options).values():
        yield file, "file", partial(look_at_file, file, access, owner, may_be_missing=makes)
    for file in key_files_of(options).values():
        yield file, "key", partial(look_at_key, file)
    for name, endpoint in servers_of(options).items():
        yield name, "engine", partial(look_at_server, endpoint)
    if account := account_of(options):
        yield account.conf, "engine", partial(look_at_cluster, account)


def _about(look: Callable[[], Finding], disk: str) -> Result:
    return Result([replace(look(), disk=disk)])


def look_at_file(path: str, access: locks.Access | None, owner: str = "", *, may_be_missing: bool = False) -> Finding:
    """Return whether a file or device exists, and who else uses it.

    Args:
        path: of the file.
        access: what would be done with it; None: its users do not matter.
        owner: the disk whose worker may use it.
        may_be_missing: the driver creates it when it is needed.
    """
    shown, ls = printable(path), f"ls -l {shlex.quote(printable(path))}"
    try:
        fd = _open(path)
    except FileNotFoundError:
        if may_be_missing:
            return ok("file", f"{shown} will be made when it is needed")
        return wrong("file", f"there is no file or device {shown}", ls)
    except PermissionError:
        return unknown("file", f"{shown} may not be opened by this user", "sudo xenbackend doctor")
    except OSError as error:
        return wrong("file", f"{shown} cannot be opened: {error.strerror}", ls)
    if fd is None:
        return wrong("file", f"{shown} is neither a file nor a block device", ls)
    try:
        return _who_has(fd, shown, access, owner)
    finally:
        os.close(fd)


def _open(path: str) -> int | None:
    """Return a descriptor of a file or block device; None for anything else, since opening that may have effects.

    Raises: OSError.
    """
    node = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(node).st_mode
        return os.open(f"/proc/self/fd/{node}", _LOOK) if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else None
    finally:
        os.close(node)


def _who_has(fd: int, shown: str, access: locks.Access | None, owner: str) -> Finding:
    is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
    if access is None or (not is_device and locks.is_free(fd, access)):
        return ok("file", f"{shown} is there")
    users = users_of(fd)
    if not users and is_device:
        return ok("file", f"{shown} is there, and no program is known to use it")
    if owner and f"the disk {owner} " in f"{users} ":
        return ok("file", f"{shown} is used by the disk's own worker")
    if not users and os.geteuid() != 0:
        return unknown("file", f"{shown} is locked; only root may see by which program", "sudo xenbackend doctor")
    return wrong(
        "file", f"{shown} is in use by {users or 'a program on another host'}", f"fuser -v {shlex.quote(shown)}"
    )


def look_at_key(path: str) -> Finding:
    """Return whether the file of a passphrase can be used, without reading it."""
    shown = printable(path)
    try:
        status = Path(path).stat()
    except FileNotFoundError:
        return wrong("key", f"there is no file {shown}, which has the passphrase", f"ls -l {shlex.quote(shown)}")
    except OSError as error:
        return unknown("key", f"{shown} cannot be examined: {error.strerror}", "sudo xenbackend doctor")
    if status.st_mode & 0o007:
        return wrong(
            "key", f"{shown} holds a passphrase, and every user may access it", f"chmod o= {shlex.quote(shown)}"
        )
    return ok("key", f"{shown} is there")


def look_at_server(endpoint: Endpoint) -> Finding:
    """Return whether a server listens at an endpoint."""
    if endpoint.path:
        return _look_at_socket(endpoint.path)
    try:
        _connect(endpoint.host, endpoint.port)
    except OSError as error:
        return wrong("engine", f"{endpoint} cannot be reached: {_said(error)}", _reach(endpoint.host, endpoint.port))
    return ok("engine", f"{endpoint} can be reached from this host")


def _look_at_socket(path: str) -> Finding:
    """Return whether a server listens at a socket, from the kernel's table, so that the server is not disturbed."""
    shown = printable(path)
    listens = f"ss -xl | grep -F {shlex.quote(shown)}"
    try:
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            return wrong("engine", f"{shown} is not a socket", f"ls -l {shlex.quote(shown)}")
    except FileNotFoundError:
        return wrong("engine", f"there is no socket {shown}: its server does not run", listens)
    except OSError as error:
        return unknown("engine", f"{shown} cannot be examined: {error.strerror}", "sudo xenbackend doctor")
    if path in _listening(Path("/proc/net/unix").read_text(errors="surrogateescape")):
        return ok("engine", f"a server listens at {shown}")
    return wrong("engine", f"nothing listens at {shown}: its server does not run", listens)


def _listening(table: str) -> set[str]:
    """Return the paths of listening sockets. Source: proc_net_unix(5)."""
    rows = [line.split(maxsplit=7) for line in table.splitlines()[1:]]
    return {row[7] for row in rows if len(row) == 8 and int(row[3], 16) & _LISTENS}


def look_at_cluster(account: Account) -> Finding:
    """Return whether a monitor of a cluster can be reached; the key is not used."""
    try:
        monitors = monitors_of(read_settings(account)["mon_host"])
    except DriverError as error:
        return wrong("engine", printable(str(error)), f"ls -l {shlex.quote(printable(account.conf))}")
    except PermissionError as error:
        return unknown("engine", f"{error.filename} may not be read by this user", "sudo xenbackend doctor")
    except OSError as error:
        sentence = f"{printable(str(error.filename or account.conf))} cannot be read: {error.strerror}"
        return wrong("engine", sentence, f"ls -l {shlex.quote(printable(account.conf))}")
    why = "no monitor is named in the configuration"
    for host, port in monitors:
        try:
            _connect(host, port)
        except OSError as error:
            why = f"{host}:{port}: {_said(error)}"
        else:
            return ok("engine", f"a monitor of the cluster can be reached at {host}:{port}")
    host, port = monitors[0] if monitors else ("", 0)
    return wrong("engine", f"no monitor of the cluster can be reached ({why})", _reach(host, port))


def monitors_of(text: str) -> list[tuple[str, int]]:
    """Return host and port of the monitors in Ceph's ``mon_host``; without a port, all ports that they may have."""
    found = []
    for each in text.replace("[v", "v").replace(" ", ",").split(","):
        place = each.strip().rpartition("/")[0] or each.strip()
        for kind in ("any:", "v1:", "v2:"):
            place = place.removeprefix(kind)
        host, _, port = place.rpartition(":") if place.count(":") == 1 or "]:" in place else (place, "", "")
        host = host.strip("[]")
        if host:
            found += [(host, int(port))] if port.isdecimal() else [(host, each) for each in _MONITOR_PORTS]
    return found


def _connect(host: str, port: int) -> None:
    socket.create_connection((host, port), CONNECT_S).close()


def _said(error: OSError) -> str:
    return "it did not answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)


def _reach(host: str, port: int) -> str:
    return f"nc -vz {shlex.quote(host)} {port}"
