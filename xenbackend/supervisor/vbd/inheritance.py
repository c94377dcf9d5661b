"""The names of a vbd's descriptors in the keeper. Each names the vbd, the kind of descriptor, and its version.

Must not look into a descriptor.

``vbd-0-5-51712.journal.3`` is a journal of version 3. A name without a version is from the last release, and means
version 2. `handover` and `former` convert what is older than ours; what is newer is not touched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress

from xenbackend import journal
from xenbackend.errors import ConfigError, KernelError
from xenbackend.kernel.process import kill
from xenbackend.protocol import messages
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.vbd import former, notes
from xenbackend.supervisor.xenstore.paths import VbdPath

What = tuple[str, int]  # kind of descriptor, and its version

OPEN_FILES = "open"  # what a former version's worker had open when it was ended: `former.remember_files`
_VERSIONS = {
    "journal": journal.VERSION,
    "notes": notes.VERSION,
    "worker": messages.VERSION,
    "pidfd": messages.VERSION,
    OPEN_FILES: 3,
}
_SLOT_VERSION = 3
_SLOT = re.compile(r"[mfs]\d+")


def prefix_of(path: VbdPath) -> str:
    """Return the prefix of the names of a vbd's descriptors."""
    return f"{path.kind}-{path.backend_domid}-{path.frontend_domid}-{path.devid}"


def parse_prefix(text: str) -> VbdPath | None:
    """Return the vbd that has this prefix, None if it is no `prefix_of` a vbd."""
    kind, *numbers = text.split("-")
    if len(numbers) != 3 or not all(each.isascii() and each.isdecimal() for each in numbers):
        return None
    return VbdPath(kind, *map(int, numbers))


def sort_inherited(keeper: Keeper, domid: int) -> dict[VbdPath, dict[What, int]]:
    """Return the descriptors that the keeper handed over, by vbd, for the backend's domain `domid`.

    All others are closed, and the keeper forgets them.
    """
    sorted_: dict[VbdPath, dict[What, int]] = {}
    for name, fd in keeper.inherited.items():
        path, what = _parse_name(name)
        if path is not None and path.backend_domid == domid:
            sorted_.setdefault(path, {})[what] = fd
        else:
            os.close(fd)
            with suppress(KernelError):
                keeper.forget(name)
    keeper.inherited.clear()
    return sorted_


def check_versions(names: Iterable[str]) -> None:
    """Refuse to go on if one of these names of the keeper's is of a newer version than ours.

    Nothing has been touched then: the workers go on, and that version finds them when it is started again. Raises:
    ConfigError.
    """
    for name in names:
        path, (kind, version) = _parse_name(name)
        if path is not None and version > (version_of(kind) or former.VERSION):
            raise ConfigError(
                f"{path} is served by a newer version of xenbackend, whose {kind} this one does not understand; "
                "install that version again, which continues to serve it, or stop its service before you start this one"
            )


def end_predecessor(keeper: Keeper, path: VbdPath, found: dict[What, int]) -> int:
    """Kill the worker of a former version among what was found, and return its pidfd; -1 if there is none.

    The list of the files that it has open is put into `found` before, and kept by the keeper. The pidfd stays in
    `found`; once it is readable, a `Handover` may be made.
    """
    pidfds = [fd for (kind, version), fd in found.items() if kind == "pidfd" and version < _VERSIONS[kind]]
    for pidfd in pidfds:
        with suppress(KernelError):  # without the list, its images have to be trusted anew
            if current(OPEN_FILES) not in found:
                found[current(OPEN_FILES)] = former.remember_files(pidfd)
                keeper.keep(name_of(path, current(OPEN_FILES)), found[current(OPEN_FILES)])
        kill(pidfd)
    return max(pidfds, default=-1)


def is_of_a_disk(name: str) -> bool:
    """Return whether this is the name of a vbd's descriptor."""
    return _parse_name(name)[0] is not None


def _parse_name(name: str) -> tuple[VbdPath | None, What]:
    """Return the vbd in a descriptor's name, None if there is none, and the descriptor's kind and version."""
    vbd, _, what = name.partition(".")
    path = parse_prefix(vbd)
    if not what or path is None:
        return None, ("", 0)
    kind, _, version = what.partition(".")
    return path, (kind, int(version)) if version.isdecimal() else (what, former.VERSION)


def is_memory(kind: str) -> bool:
    """Return whether this kind of descriptor is a memory that a layer keeps."""
    return _is_slot(kind) and kind[0] == "m"


def _is_slot(kind: str) -> bool:
    """Return whether it is a numbered kind: a memory (m0), a file (f0), a connection (s0)."""
    return _SLOT.fullmatch(kind) is not None


def version_of(kind: str) -> int:
    """Return our version of a kind of descriptor, 0 if there is no such kind."""
    return _SLOT_VERSION if _is_slot(kind) else _VERSIONS.get(kind, 0)


def current(kind: str) -> What:
    """Return this kind with our version of it."""
    return kind, version_of(kind)


def name_of(path: VbdPath, what: What) -> str:
    """Return the name under which the keeper has a descriptor."""
    kind, version = what
    return f"{prefix_of(path)}.{kind}" + (f".{version}" if version != former.VERSION else "")
