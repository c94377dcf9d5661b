r"""One disk line: finds out whether it asks for a chain of ours in words that xl would drop, and rewrites it for xl.

Must not know where a line comes from, and must not touch a file.

    tap2:log:|aio:/img,xvda,w      becomes      vdev=xvda,access=rw,script=block-xenbackend,target=log:|aio:/img

xl drops the words ``tap2:`` and ``tap:`` and the driver's word behind them, or refuses the line (libxl's
libxlu_disk_l.l). A line that begins with ``tap2:`` asks for us and is always rewritten. A line that begins with
``tap:`` is left alone if xl understands it: hosts have served such lines by blkback and QEMU for years. Lines with
``target=``, with another hotplug script, or with another backendtype are left alone, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xenbackend.block.spec import check_whole_paths, parse_chain
from xenbackend.errors import ConfigError
from xenbackend.xl import words

Version = tuple[int, int]

SCRIPTS: Final = ("block-xenbackend", "tap2")  # our hotplug scripts; rewritten lines name the first one
_OWN_KIND: Final = (4, 19)  # from this Xen on, backendtype=tap is the kind vbd3, which no kernel driver serves

_BLANK = " \t\n"
_ASKS = re.compile(r"(tap2?):")
_NAMES_TARGET = re.compile(r"(?:^|,)[ \t\n]*target=")
_DROPPED = r"(?:tapdisk|tap2?|aio|ioemu|file|phy|raw|qcow2?|vhd|iscsi|e?nbd|drbd):"
_XL_UNDERSTANDS = re.compile(rf"(?:{_DROPPED})*(?![a-z][a-z0-9_-]*:)[^|]*")
_ACCESS = re.compile(r"(?P<access>r|ro|w|rw|w!|)")
_VDEV = re.compile(r"(?P<vdev>[a-z0-9]+)(?::(?P<devtype>disk|cdrom))?")
_OPTION = re.compile(
    r"(?P<key>format|access|devtype|backend|backendtype|specification|vdev|script|grant_usage"
    r"|colo-host|colo-port|colo-export|active-disk|hidden-disk)=(?P<value>.+)"
    r"|(?P<flag>cdrom|discard|no-discard|direct-io-safe|colo|no-colo|trusted|untrusted)"
)


def rewrite(line: str, xen: Version) -> str | None:
    """Return a line that tells xl what the author of `line` means; None if xl understands `line`, or it is not for us.

    Raises: ChainError, ConfigError if the line asks for us but its disk is not possible.
    """
    found: dict[str, str] = {}
    rest = _take_leading(line.lstrip(_BLANK), found)
    asks = _ASKS.match(rest)
    if asks is None or _NAMES_TARGET.search(rest):
        return None
    target = _take_trailing(rest[asks.end() :], found)
    is_of_others = found.get("backendtype", "tap") != "tap" or Path(found.get("script", SCRIPTS[0])).name not in SCRIPTS
    if is_of_others or (asks[1] == "tap" and _XL_UNDERSTANDS.fullmatch(target)):
        return None
    return _meant(line, target, found, xen).line


@dataclass(frozen=True, slots=True)
class Meant:
    """What a disk line means: its chain, how the guest sees it, and the same as a `line` for xl."""

    chain: str
    vdev: str
    is_read_only: bool
    line: str


def read(line: str, xen: Version) -> Meant:
    """Return the meaning of a line for us, in blktap2's syntax or in xl's. Raises: ChainError, ConfigError."""
    found: dict[str, str] = {}
    rest = _take_leading(line.strip(_BLANK), found)
    if names_target := _NAMES_TARGET.search(rest):
        before, target = rest[: names_target.start()], rest[names_target.end() :]
        if before or rest.startswith(","):
            raise ConfigError(f"{before!r} is before target=, and is not an option of a disk line")
        if behind := words.misplaced(target):
            raise ConfigError(
                f"{behind!r} is after target=, and all of that is the chain: move it before target=, as vdev= and "
                "access="
            )
    else:
        target = _take_trailing(_ASKS.sub("", rest, count=1), found)
    script = Path(found.get("script", SCRIPTS[0])).name
    if script not in SCRIPTS:
        raise ConfigError(f"the line is for the hotplug script {script!r}, not for {SCRIPTS[0]}")
    if found.get("backendtype", "tap") != "tap":
        raise ConfigError(
            f"the line is for the backend {found['backendtype']!r}, not for xenbackend: leave backendtype out"
        )
    return _meant(line, target, found, xen)


def _meant(line: str, target: str, found: dict[str, str], xen: Version) -> Meant:
    """Return the meaning of a line, given its parts. Raises: ChainError, ConfigError, with the word at fault."""
    positional = [found[key] for key in ("vdev", "access") if key in found and f"{key}=" not in line]
    if left := words.trailing(target):
        words.check([*left, *(each for each in positional if each)])
    chain = _check_chain(target.lstrip(_BLANK))
    if found.get("vdev"):
        words.check_device(found["vdev"])
    access, vdev = found.get("access", ""), found.get("vdev", "")
    formatted = _format(line, chain, found, xen)
    return Meant(chain, vdev, access in ("r", "ro"), formatted)


def _take_leading(text: str, found: dict[str, str]) -> str:
    """Return a text without the options at its beginning, which are added to `found`."""
    while True:
        item, comma, rest = text.partition(",")
        if not comma or not _take(_OPTION, item, found):
            return text
        text = rest.lstrip(_BLANK)


def _take_trailing(text: str, found: dict[str, str]) -> str:
    """Return a text without the part that xl takes from its end: device, access, and options before or after them."""
    text = _take_last(_OPTION, text.removesuffix(","), found, many=True)
    if "access" not in found:
        text = _take_last(_ACCESS, text, found)
    text = _take_last(_OPTION, text, found, many=True)
    if "vdev" not in found:
        text = _take_last(_VDEV, text, found)
    return _take_last(_OPTION, text, found, many=True)


def _take_last(pattern: re.Pattern[str], text: str, found: dict[str, str], *, many: bool = False) -> str:
    """Return a text without its last item (`many`: items) of this kind; the part before the first comma is kept."""
    while True:
        rest, comma, item = text.rpartition(",")
        is_escaped = (len(rest) - len(rest.rstrip("\\"))) % 2
        if not comma or is_escaped or not _take(pattern, item, found):
            return text
        text = rest
        if not many:
            return text


def _take(pattern: re.Pattern[str], item: str, found: dict[str, str]) -> bool:
    """Add an item to `found` if it matches. Return whether it does. Raises: ConfigError if it was given before."""
    match = pattern.fullmatch(item.strip(_BLANK))
    if match is None:
        return False
    said = {key: value for key, value in match.groupdict().items() if value is not None}
    if "key" in said:
        said = {said["key"]: said["value"]}
    elif "flag" in said:
        said = {"devtype": "cdrom"} if said["flag"] == "cdrom" else {said["flag"]: ""}
    for key in said.keys() & found.keys():
        raise ConfigError(f"{key} is given twice in a disk line; remove one")
    found.update(said)
    return True


def _check_chain(text: str) -> str:
    """Return the canonical text of a chain, after checking it. Raises: ChainError, ConfigError."""
    chain = parse_chain(text)
    check_whole_paths(chain)
    if "\n" in chain.text:
        raise ConfigError("xl cannot pass on a file name with a line break; rename the file")
    return chain.text


def _format(line: str, chain: str, found: dict[str, str], xen: Version) -> str:
    access = found.pop("access", "")
    vdev = found.pop("vdev", "")
    if not vdev:
        raise ConfigError(f"{line!r} names no device for the guest; write it after the chain, as in ,xvda,w")
    if access not in ("", *words.ACCESS):
        raise ConfigError(f"{line!r} asks for the access {access!r}; xl knows r and w")
    found["access"] = "ro" if access.startswith("r") and access != "rw" else "rw"
    found.pop("backendtype", None)
    script = found.pop("script", SCRIPTS[0])
    if xen >= _OWN_KIND:
        found["backendtype"] = "tap"
    options = [f"{key}={value}" if value else key for key, value in {"vdev": vdev, **found, "script": script}.items()]
    comma = "," if chain.endswith(",") else ""  # xl removes one comma from the end
    return f"{','.join(options)},target={chain}{comma}"
