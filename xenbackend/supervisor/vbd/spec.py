"""What a toolstack asked for in a vbd's backend directory, read strictly.

Must not read xenstore, and must not trust anything that a guest can write.

Source of the keys: libxl `device_disk_add`; see also io/blkif.h, "Backend XenBus Nodes".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from xenbackend.block.chain import parse_chain
from xenbackend.errors import ChainError, ConfigError
from xenbackend.supervisor.xenstore.paths import VbdPath

_MODES = {"r": (True, False), "w": (False, False), "w!": (False, True)}  # mode -> (read_only, shareable)
_CARRIERS = ("aio:", "vhd:")  # libxl of Xen 4.19 and later puts one in front of the target of kind vbd3


@dataclass(frozen=True, slots=True)
class Spec:
    """One disk as the toolstack wants it."""

    chain: str
    read_only: bool
    shareable: bool  # mode "w!": others may write the image too
    cdrom: bool
    removable: bool

    def is_served_like(self, other: Spec) -> bool:
        """Return whether both differ at most in what only the guest is told, and no worker."""
        return (self.chain, self.read_only, self.shareable) == (other.chain, other.read_only, other.shareable)


def is_ours(keys: Mapping[str, str], scripts: Collection[str]) -> bool:
    """Return whether the vbd's hotplug script is one of ours; `scripts` are base names."""
    return keys.get("script", "").rpartition("/")[2] in scripts


def frontend_path(path: VbdPath, keys: Mapping[str, str]) -> str | None:
    """Return the frontend's directory, None while there is none.

    Raises: ConfigError when it lies outside the domain that the backend's own path names.
    """
    frontend = keys.get("frontend")
    if frontend is not None and not frontend.startswith(f"/local/domain/{path.frontend_domid}/"):
        raise ConfigError(f"the key frontend is {frontend!r}, which is not below domain {path.frontend_domid}'s path")
    return frontend


def parse_spec(path: VbdPath, keys: Mapping[str, str]) -> Spec:
    """Return what the backend directory's keys ask for. Raises: ConfigError (ChainError), with a sentence."""
    if frontend_path(path, keys) is None:
        raise ConfigError("the key frontend is missing in the backend's directory")
    mode = keys.get("mode")
    if mode not in _MODES:
        raise ConfigError(f"the key mode is {mode!r}; it must be r, w or w!")
    if not keys.get("params"):
        raise ConfigError("the key params is missing; it names the chain, such as log:|aio:/img/disk.raw")
    read_only, shareable = _MODES[mode]
    return Spec(
        chain=_chain_text(path.kind, keys["params"]),
        read_only=read_only,
        shareable=shareable,
        cdrom=keys.get("device-type") == "cdrom",
        removable=keys.get("removable") == "1",
    )


def _chain_text(kind: str, params: str) -> str:
    """Return the chain in `params`, without the carrier that libxl needed to accept it. Raises: ChainError."""
    carrier = next((each for each in _CARRIERS if kind == "vbd3" and params.startswith(each)), "")
    if carrier:
        try:
            parse_chain(params.removeprefix(carrier))
        except ChainError:
            carrier = ""  # a plain path was asked for, and the carrier is its driver
    text = params.removeprefix(carrier)
    parse_chain(text)
    return text


def in_one_line(error: ConfigError) -> str:
    """Return an error's sentence in one line, without the carets that a terminal shows below a chain."""
    if isinstance(error, ChainError):
        return f"{error.problem}: {error.chain}"
    return str(error)
