"""Files that tell the next service which chain has a guest's data, if xenstore does not say it, or not yet.

Must not be believed for another vbd, nor after the host was booted anew, when the guest is another one.

The keeper is no place for this: when a service is stopped, systemd drops what it keeps, and the unit's own directory.
So there is one file for each such vbd, ``vbd-0-5-51712.json``, in a directory below the one that ``STATE_DIRECTORY``
names, else below the control socket's. It is there from before a worker is asked for an exchange until ``params`` has
been seen with a value other than a former chain, or the vbd is gone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from xenbackend.errors import KernelError
from xenbackend.supervisor.vbd import notes
from xenbackend.supervisor.vbd.inheritance import parse_prefix, prefix_of
from xenbackend.supervisor.xenstore.paths import VbdPath

DIRECTORY = "xenbackend-last-chains"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MAX = notes.SIZE  # bytes, more than all that the notes can say of the chain


@dataclass(frozen=True, slots=True)
class LastChain:
    """What the notes say of the chain.

    chain         the chain that was in service
    stale_params  the values that ``params`` may still have instead of it
    next_chain    the chain that was being put in, and may be in service by now; empty if there is none
    """

    chain: str
    stale_params: list[str]
    next_chain: str = ""


def state_directory(environment: Mapping[str, str], socket: str) -> Path:
    """Return the directory to leave files in: the first that systemd's ``STATE_DIRECTORY`` names, else the socket's."""
    named = environment.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(named) if named else Path(socket).parent


class LastChains:
    """All such files.

    left       what the files say that this service has written and not removed
    on_change  called when a vbd's notes, and so perhaps its file, have changed
    """

    def __init__(self, directory: Path, boot: str = "") -> None:
        """Keep files below `directory`, which is made with the first one; `boot` is the id of this boot of the host."""
        self.left: dict[VbdPath, LastChain] = {}
        self.on_change: Callable[[], None] = lambda: None
        self._directory = directory / DIRECTORY
        self._boot = boot or _this_boot()

    def paths(self) -> list[VbdPath]:
        """Return the vbds that have a file. Files of another boot are removed."""
        try:
            names = sorted(each.name for each in self._directory.glob("*.json"))
        except OSError:
            return []
        found = [path for name in names if (path := parse_prefix(name.removesuffix(".json"))) is not None]
        return [path for path in found if self.of(path) is not None]

    def of(self, path: VbdPath) -> LastChain | None:
        """Return what the file of a vbd says; None if there is none of this boot. Any other one is removed."""
        try:
            with self._file(path).open("rb") as file:
                values = json.loads(file.read(_MAX))
            chain, stale_params, next_chain = values["chain"], values["stale_params"], values.get("next_chain", "")
            is_ours = values["boot"] == self._boot and isinstance(chain, str) and isinstance(next_chain, str)
            is_ours = is_ours and isinstance(stale_params, list) and all(isinstance(each, str) for each in stale_params)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            is_ours = False
        if not is_ours:
            self.forget(path)
            return None
        return LastChain(chain, stale_params, next_chain)

    def leave(self, path: VbdPath, last: LastChain) -> Path:
        """Write the file of a vbd atomically, and return its path. Raises: KernelError."""
        file = self._file(path)
        values = {"boot": self._boot, **asdict(last)}
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with file.with_suffix(".new").open("w", encoding="ascii") as new:
                json.dump(values, new)
                new.flush()
                os.fsync(new.fileno())
            file.with_suffix(".new").replace(file)
        except OSError as error:
            raise KernelError(f"write {file}", error.errno or 0) from None
        self.left[path] = last
        return file

    def forget(self, path: VbdPath) -> None:
        """Remove the file of a vbd, if there is one."""
        self.left.pop(path, None)
        with suppress(OSError):
            self._file(path).unlink(missing_ok=True)
            self._directory.rmdir()

    def _file(self, path: VbdPath) -> Path:
        return self._directory / f"{prefix_of(path)}.json"


def _this_boot() -> str:
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"
