"""The nodes of our disks in xenstore as text, with the same share of the output for each guest.

Must not read any other nodes: others keep passwords there. Guests can write anything to their own ends, so only a
limited share of each end is read, and an end that cannot be read does not keep the others from being reported.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from itertools import chain

from xenbackend.doctor.store import paths
from xenbackend.errors import StoreError
from xenbackend.supervisor.xenstore.paths import VbdPath, domain_path, status_root
from xenbackend.supervisor.xenstore.store import Store

_MOST = 6000  # nodes of all guests together; each guest has an equal share
_LEAST = 60  # nodes for one end of a guest's disks: enough for two disks
_WIDTH = 200  # characters per node on average; the text of a share is limited to this as well
_DEPTH = 2  # levels of a disk's directory: its keys, and those of its queues


def text(store: Store, kinds: Collection[str], limit_s: float) -> str:
    """Return a line for each node, and a line wherever nodes were left out. Raises: StoreError if none can be read."""
    until = time.monotonic() + limit_s
    domid = store.own_domid()
    disks: dict[int, list[VbdPath]] = {}
    for path in paths(store, domid, kinds):
        disks.setdefault(path.frontend_domid, []).append(path)
    most = max(_LEAST, _MOST // max(1, len(disks)))
    lines: list[str] = []
    for guest, of_guest in disks.items():
        ours = [each.backend for each in of_guest]
        theirs = list(dict.fromkeys(each.frontend for each in of_guest))
        lines += _some(_trees(store, ours), f"our ends of the disks of domain {guest}", most, until)
        lines += _some(_trees(store, theirs), f"the ends of domain {guest}", most, until)
    for place in (status_root(domid), f"{domain_path(domid)}/error/backend"):
        lines += _some(_tree(store, place, _DEPTH + 2), place, _MOST, until)
    return "".join(f"{each}\n" for each in lines)


def _some(lines: Iterator[str], what: str, most: int, until: float) -> Iterator[str]:
    """Yield lines until there are too many, or no time is left; further nodes are not read."""
    size = count = 0
    try:
        for line in lines:
            count += 1
            size += len(line)
            if count > most or size > most * _WIDTH:
                yield f"# {what}: the rest is left out, after {count - 1} nodes"
                return
            if time.monotonic() > until:
                yield f"# {what}: the rest is left out, because reading took too long"
                return
            yield line
    except StoreError as error:
        yield f"# {what}: {error}"


def _trees(store: Store, places: Iterable[str]) -> Iterator[str]:
    return chain.from_iterable(_tree(store, path, _DEPTH) for path in places)


def _tree(store: Store, path: str, depth: int) -> Iterator[str]:
    value = store.read_if_allowed(path)
    if value is not None:
        yield f"{path} = {value!r}"
    if depth:
        for key in store.directory(path):
            yield from _tree(store, f"{path}/{key}", depth - 1)
